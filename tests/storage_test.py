"""Files on disks and in buckets: whole or not there, created once, told apart without being read."""

import hashlib
import os
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

from prophy_jax.run import checksums, cli, storage
from prophy_jax.run.errors import UserError


@pytest.fixture(params=["disk", "bucket", "s3_bucket"])
def place(request, tmp_path):
    """An empty folder of each kind."""
    return tmp_path if request.param == "disk" else storage.path(request.getfixturevalue(request.param))


def names(folder) -> list[str]:
    return list(storage.list_files(folder))


@pytest.mark.parametrize("content", ["ä", "ä".encode(), lambda file: file.write("ä".encode())])
def test_written_files_replace_older_ones(place, content):
    for _ in range(2):
        storage.write_atomically(place / "file", content)
        assert (place / "file").read_text(encoding="utf-8") == "ä" and names(place) == ["file"]


def test_a_file_that_cannot_be_written_leaves_the_older_one(place):
    storage.write_atomically(place / "file", "old")

    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.write_atomically(place / "file", fail)
    if not storage.in_bucket(place):  # which has no folders
        with pytest.raises(OSError):
            storage.write_atomically(place / "no" / "file", "new")
    assert (place / "file").read_text() == "old" and names(place) == ["file"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, name=name, original=original: (calls.append(name), original(*args))
        )
    storage.write_atomically(tmp_path / "file", "text")
    assert calls == ["fsync", "replace", "fsync"]  # the file, then the folder


@pytest.mark.parametrize("links", [True, False])
def test_of_many_that_create_a_file_one_does(place, links, monkeypatch):
    if not links:  # as on some network storage
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links")))
    made = []
    for number in range(5):
        file, won = place / f"file{number}", []

        def create(text, file=file, won=won):
            if storage.create(file, text.encode() * 1000):
                won.append(text)

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(create, "abcdefgh"))
        (winner,) = won
        assert file.read_bytes() == winner.encode() * 1000
        made.append(file.name)
    assert names(place) == made


def test_files_are_listed_copied_and_removed(place):
    for name, content in (("a", b"1"), ("b/c", b"22"), ("b/d/e", b"333")):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        storage.write_atomically(place / name, content)
    listed = storage.list_files(place)
    assert {name: size for name, (size, _) in listed.items()} == {"a": 1, "b/c": 2, "b/d/e": 3}
    if storage.in_bucket(place):
        assert listed["b/c"][1] == hashlib.md5(b"22").hexdigest()
    assert [path.name for path in storage.files_in(place)] == ["a"]
    storage.copy(place / "a", place / "f")
    assert (place / "f").read_bytes() == b"1"
    assert storage.hash_file(place / "b" / "c") == hashlib.sha256(b"22").hexdigest()
    fetched = storage.fetched(place / "b")
    assert (fetched / "d" / "e").read_bytes() == b"333" and not storage.in_bucket(fetched)
    storage.remove(place / "b")
    storage.remove(place / "nothing")
    assert names(place) == ["a", "f"]
    assert storage.list_files(place / "nothing") == {}


def test_a_touched_file_has_another_stamp(place):
    storage.write_atomically(place / "file", b"1")
    first = storage.stamp(place / "file")
    assert storage.stamp(place / "file") == first
    os.utime(place / "file", (1, 1)) if not storage.in_bucket(place) else None
    if str(place).startswith("s3://"):
        time.sleep(1.1)  # it counts whole seconds
    storage.touch(place / "file", b"1")
    assert storage.stamp(place / "file") not in (first, None)
    assert storage.stamp(place / "none") is None


def test_an_uploaded_folder_is_equal_and_what_is_there_is_not_sent_again(tmp_path, bucket, monkeypatch):
    for name, content in (("a", b"1"), ("b/c", b"22"), ("left_out", b"")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    storage.write_atomically(f"{bucket}/of_another", b"")
    sent, send = [], storage.send
    monkeypatch.setattr(storage, "send", lambda *paths: (sent.append(paths[1][len(bucket) :]), send(*paths)))
    storage.upload(tmp_path, bucket, without=["left_out"])
    assert sent == ["/a", "/b/c"] and names(bucket) == ["a", "b/c"]
    (tmp_path / "a").write_bytes(b"9")
    storage.upload(tmp_path, bucket, without=["left_out"])
    assert sent[2:] == ["/a"] and (storage.path(bucket) / "a").read_bytes() == b"9"


def test_checksums_of_a_bucket_are_known_without_reading(bucket, tmp_path, monkeypatch):
    for name in ("a", "b/c"):
        storage.write_atomically(f"{bucket}/{name}", name)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "open_file", None)
        listed = checksums.hash_files(bucket)
        with checksums.verified(bucket, listed, ""):
            pass
        storage.write_atomically(f"{bucket}/b/c", "x/y")
        with (
            pytest.raises(UserError, match="b/c is damaged, its bytes"),
            checksums.verified(bucket, listed, ""),
        ):
            pass
        storage.path(f"{bucket}/b/c").unlink()
        with pytest.raises(UserError, match="b/c is missing"), checksums.verified(bucket, listed, ""):
            pass
    # A folder that was copied from a bucket to a disk, or the other way round, is compared by reading it.
    (tmp_path / "b").mkdir()
    for name in ("a", "b/c"):
        (tmp_path / name).write_text(name)
        storage.write_atomically(f"{bucket}/{name}", name)
    with (
        checksums.verified(tmp_path, listed, ""),
        checksums.verified(bucket, checksums.hash_files(tmp_path), ""),
    ):
        pass
    (tmp_path / "a").write_text("b")
    with pytest.raises(UserError, match="a is damaged"), checksums.verified(tmp_path, listed, ""):
        pass


@pytest.mark.parametrize(
    "address, says",
    [
        ("gs:/b/x", "is no address: write gs://BUCKET/FOLDER"),
        ("gs://", "is no address"),
        ("gs:///x", "is no address"),
        ("gs:b/x", "is no address"),
        (" gs://b/x", "is no address"),
        ("gs://b/../x", "is no address"),
        ("gs://b/x[1]", "has '\\['"),
        ("gs://b/x#1", "has '#'"),
        ("s3://b/x", "--out=s3://b/x is an address, and this must be on a disk or in gs://: copy it"),
        ("file:///tmp/x", "must be on a disk or in gs://"),
        ("https://storage.googleapis.com/b", "must be on a disk or in gs://"),
    ],
)
def test_other_addresses_are_refused(address, says):
    with pytest.raises(UserError, match=says):
        cli.expand_path(address, f"--out={address}", ["gs"])


@pytest.mark.parametrize("kind", ["bucket", "s3_bucket"])
def test_an_address_is_one_of_a_bucket_that_exists(kind, request):
    address, schemes = request.getfixturevalue(kind), ("gs", "s3")
    scheme, _, rest = address.partition("://")
    assert cli.expand_path(f"{address}//a b%ü//c/", "", schemes) == f"{address}/a b%ü/c"
    assert cli.expand_path(f"{scheme}://{rest.partition('/')[0]}/", "", schemes) == f"{scheme}://bucket"
    with pytest.raises(UserError, match="--out: there is no bucket none"):
        cli.expand_path(f"{scheme}://none/x", "--out", schemes)


def test_a_bucket_that_does_not_answer_is_said(server, bucket, monkeypatch, capsys):
    answered = threading.Event()
    monkeypatch.setattr(storage, "WAIT_S", 0.01)
    monkeypatch.setattr(
        storage, "path", lambda _: types.SimpleNamespace(exists=lambda: answered.wait(0.5) or True)
    )
    cli.expand_path(bucket, "--out", ["gs"])
    assert "has not answered yet" in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(storage.PACKAGES, "s3", "no_such_package")
    with pytest.raises(UserError, match=r'--out=s3://b/x: .*pip install "prophy_jax\[s3\]"'):
        cli.expand_path("s3://b/x", "--out=s3://b/x", ["gs", "s3"])


def test_what_buckets_packages_raise_is_one_line():
    gcsfs = pytest.importorskip("gcsfs.retry", reason="tests of buckets need gcsfs, of the test extra")
    with (
        pytest.raises(UserError, match="the bucket cannot be used .*403.*gcloud auth"),
        storage.one_line_errors(),
    ):
        raise gcsfs.HttpError({"code": 403, "message": "no rights"})
    for status in (403, 404, 502):  # these are OSError, FileNotFoundError and an error of requests
        with pytest.raises(UserError, match="the bucket cannot be used"), storage.one_line_errors():
            gcsfs.validate_response(status, b"", "b/x")
    with pytest.raises(KeyError), storage.one_line_errors():
        raise KeyError("a bug")


def test_what_a_killed_writer_left_is_in_no_list_of_checksums(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / ".zarray").write_text("x")
    storage.name_partial(tmp_path / "manifest.json").write_text("x")
    assert list(checksums.hash_files(tmp_path)) == [".zarray", "file"]
