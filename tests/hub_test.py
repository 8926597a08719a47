"""Models by their names on the Hugging Face hub, fetched from a stand-in for it on loopback."""

import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse

import huggingface_hub
import pytest
from huggingface_hub import constants

from prophy_jax.run import checkpoints, hub
from prophy_jax.run.errors import UserError
from tests.commands import run_here
from tests.conftest import ROOT
from tests.convert_cogvideox_test import save_sat
from tests.convert_files_test import contents, params, save  # noqa: F401  a fixture too

COMMIT = hashlib.sha1(b"one").hexdigest()
NAME = "Wan-AI/Tiny"


class Hub(http.server.ThreadingHTTPServer):
    """Folders as repositories, all at one commit of their main branch.

    Attributes:
        folders: by ORG/NAME.
        gated: names whose files take a licence, and the status that says so.
        broken: files that it does not send.
        delay: seconds that a file takes.
        down: the status of every answer, 0 if it works.
        asked: how many requests there were.
        fetched: the files of which the content was sent.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folders, self.gated, self.broken, self.fetched = {}, {}, set(), []
        self.delay = self.down = self.asked = 0
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """A client that went away is no fault."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server, urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        hub.asked += 1
        name, revision = (api[1], api[3]) if api else (file[1], file[2])
        if hub.down:
            self.answer(hub.down)
        elif name not in hub.folders:
            self.answer(401, headers={"X-Error-Code": "RepoNotFound"})
        elif revision not in (None, "main", COMMIT):
            self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        elif api:
            files = {f.relative_to(hub.folders[name]): f for f in hub.folders[name].rglob("*") if f.is_file()}
            sizes = {path.as_posix(): file.stat().st_size for path, file in files.items()}
            listed = [{"rfilename": path, "size": size} for path, size in sizes.items()]
            tree = [{"type": "file", "path": p, "size": s, "oid": p} for p, s in sizes.items()]
            info = {"id": name, "modelId": name, "sha": COMMIT, "private": False, "siblings": listed}
            self.answer(200, json.dumps(tree if api[2] == "tree" else info).encode())
        elif name in hub.gated:
            self.answer(hub.gated[name], headers={"X-Error-Code": "GatedRepo"})
        elif file[3] in hub.broken:
            self.answer(410)
        else:
            body = (hub.folders[name] / file[3]).read_bytes()
            if self.command == "GET":
                hub.fetched.append(file[3])
                time.sleep(hub.delay)
            self.answer(200, body, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"'})

    def answer(self, status, body=b"", headers=()):
        self.send_response(status)
        sent = {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **dict(headers)}
        for key, value in sent.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub, and an empty cache: for this process, and in the environment for others."""
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    settings = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    # huggingface_hub has read its environment by now.
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def offer(server, folder, name=NAME):
    """Makes a folder a repository, with the files that public ones have besides."""
    for extra in ("README.md", "assets/teaser.mp4", "examples/i2v.jpg", "LICENSE.txt", ".gitattributes"):
        (folder / extra).parent.mkdir(exist_ok=True, parents=True)
        (folder / extra).write_text(extra)
    for weights in [*folder.rglob("*.safetensors")]:
        weights.with_suffix(".bin").write_bytes(b"the same in another form")
        weights.with_suffix(".fp16.safetensors").write_bytes(b"and in another")
    server.folders[name] = folder
    return folder


def convert(*flags, src=NAME):
    return run_here("convert.wan", f"--src={src}", "--dst=dst", *flags)


def fails(*flags, src=NAME, module="convert.wan") -> str:
    """The one line of the command, which writes nothing."""
    done = run_here(module, f"--src={src}", "--dst=dst", *flags)
    lines = [line for line in done.stderr.splitlines() if "it/s" not in line and "B/s" not in line]
    assert done.returncode == 1 and lines[-1].startswith("error: "), done
    assert "Traceback" not in done.stderr and not os.path.exists("dst")
    return lines[-1]


def weights_of(fetched) -> list[str]:
    return [file for file in fetched if file.endswith((".safetensors", ".pt", ".bin"))]


WANTED = {
    "official": {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "Wan2.1_VAE.safetensors",
        "models_t5_umt5-xxl-enc-bf16.safetensors",
        *(f"google/umt5-xxl/{file}.json" for file in ("tokenizer", "tokenizer_config", "special_tokens_map")),
    },
    "diffusers": {
        "model_index.json",
        *(f"{part}/config.json" for part in ("transformer", "vae", "text_encoder")),
        *(
            f"{part}/{stem}{end}"
            for part, stem in (
                ("transformer", "diffusion_pytorch_model"),
                ("vae", "diffusion_pytorch_model"),
                ("text_encoder", "model"),
            )
            for end in (".safetensors.index.json", "-00001.safetensors", "-00002.safetensors")
        ),
        *(f"tokenizer/{file}.json" for file in ("tokenizer", "tokenizer_config", "special_tokens_map")),
    },
}


@pytest.fixture(params=["official", "diffusers"])
def wan(server, params, tmp_path, request):  # noqa: F811
    """The repository Wan-AI/Tiny in a layout: its name."""
    shards = 1 if request.param == "official" else 2
    folder = save(params, tmp_path / "origin" / "Tiny", request.param, shards=shards)
    if request.param == "diffusers":
        parts = ("transformer", "vae", "text_encoder", "tokenizer")
        index = {"_class_name": "WanPipeline", **{part: ["diffusers", "Class"] for part in parts}}
        (folder / "model_index.json").write_text(json.dumps(index))
    offer(server, folder)
    return request.param


only_diffusers = pytest.mark.parametrize("wan", ["diffusers"], indirect=True)


def test_the_files_needed_are_fetched_and_converted(server, wan):
    done = convert()
    assert done.returncode == 0 and "MB/s" in done.stdout
    assert sorted(server.fetched) == sorted(WANTED[wan])
    for part in ("transformer", "vae", "text_encoder"):
        source = checkpoints.read_manifest(f"dst/{part}", "")["source"]
        assert source["repository"] == NAME and source["revision"] == COMMIT and source["format"] == wan
    assert run_here("convert.wan", f"--src={server.folders[NAME]}", "--dst=local").returncode == 0
    trees = [
        contents(ROOT / folder / "vae" / "tree")
        for folder in (os.path.abspath("dst"), os.path.abspath("local"))
    ]
    assert trees[0] == trees[1]
    # Once more: nothing is written, and nothing is fetched.
    again = convert()
    assert again.returncode == 0 and "nothing left to do" in again.stdout
    assert sorted(server.fetched) == sorted(WANTED[wan])
    # With another dtype it is other work.
    assert "dst/transformer exists: delete it" in convert("--dtype=bfloat16").stderr


def test_one_component_takes_its_own_files(server, wan):
    assert convert("--component=vae").returncode == 0
    own = {"official": "Wan2.1_VAE", "diffusers": "vae/"}[wan]
    more = {"model_index.json"} if wan == "diffusers" else set()
    assert set(server.fetched) == {file for file in WANTED[wan] if file.startswith(own)} | more
    rest = convert()
    assert rest.returncode == 0 and "dst/vae: of Wan-AI/Tiny at this revision already" in rest.stdout
    assert sorted(server.fetched) == sorted(WANTED[wan])
    assert sorted(os.listdir("dst")) == ["text_encoder", "transformer", "vae"]


def test_a_flipped_bit_in_the_cache_is_found(server, wan, tmp_path):
    assert convert("--component=vae").returncode == 0
    shutil.rmtree("dst")
    blobs = [path for path in (tmp_path / "hf").rglob("blobs/*") if path.is_file()]
    blob = max(blobs, key=lambda path: path.stat().st_size)  # the weights
    whole = bytearray(blob.read_bytes())
    whole[len(whole) * 3 // 4] ^= 1
    blob.write_bytes(whole)
    message = fails("--component=vae")
    assert f"is damaged, its sha256 is not that of the hub: delete {blob}, and run it again" in message
    blob.unlink()
    assert convert("--component=vae").returncode == 0


def test_a_dry_run_fetches_no_weights(server, wan):
    done = convert("--dry_run")
    assert done.returncode == 0 and not os.path.exists("dst") and not weights_of(server.fetched)
    assert re.search(rf"would fetch \d+ files of {NAME}, revision {COMMIT[:12]}, 0\.\d+ GB", done.stdout)
    # With all files in the cache, it checks them.
    assert convert().returncode == 0
    count = len(server.fetched)
    done = run_here("convert.wan", f"--src={NAME}@{COMMIT}", "--dst=other", "--dry_run")
    assert done.stdout.count("everything fits") == 3 and len(server.fetched) == count


@only_diffusers
def test_the_environment_names_the_hub_and_the_cache(server, wan, tmp_path):
    command = [sys.executable, "-m", "convert.wan", f"--src={NAME}@main", "--dst=dst", "--component=vae"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(weights_of(server.fetched)) == 2
    assert list((tmp_path / "hf" / "hub").glob(f"models--Wan-AI--Tiny/snapshots/{COMMIT}"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Wan-AI/None", "Wan-AI/None: there is no such folder, and no such repository on the hub"),
        (f"{NAME}@v2", f"{NAME} has no revision v2"),
        ("a--b/c..d", "there is no such folder, and no repository can have this name"),
    ],
)
@only_diffusers
def test_what_is_neither_a_folder_nor_on_the_hub(server, wan, name, message):
    assert message in fails(src=name)


@pytest.mark.parametrize("status", [401, 403])
@only_diffusers
def test_a_gated_repository(server, wan, status):
    server.gated[NAME] = status
    line = fails()
    assert f"accept its licence at https://huggingface.co/{NAME}, run `hf auth login`" in line


@only_diffusers
def test_without_a_network_the_cache_is_used(server, wan, monkeypatch):
    # 1. There is nothing of it.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = fails()
    assert f"{NAME}: there is no such folder, and the hub cannot be reached (HF_HUB_OFFLINE is set)" in line
    include = re.findall("--include '([^']*)'", line)
    assert f"run hf download {NAME} --include" in line and not server.asked
    # 2. There is a part of it.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.snapshot_download(NAME, allow_patterns=["vae/*"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = fails()
    assert "text_encoder, transformer not in the cache, and the hub cannot be reached" in line
    assert f"run hf download {NAME} --include" in line
    # 3. There is what the command in the message fetches.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.snapshot_download(NAME, allow_patterns=include)
    asked = server.asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert convert().returncode == 0 and server.asked == asked
    assert checkpoints.read_manifest("dst/vae", "")["source"]["revision"] == COMMIT
    assert "nothing left to do" in convert().stdout


@only_diffusers
def test_a_shard_that_the_cache_lacks_is_named(server, wan, monkeypatch):
    huggingface_hub.snapshot_download(NAME, ignore_patterns=["vae/*-00002.safetensors"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "vae/diffusion_pytorch_model-00002.safetensors not in the cache" in fails("--component=vae")


@pytest.mark.parametrize("how", ["refused", "answers 503"])
@only_diffusers
def test_a_hub_that_is_away(server, wan, how, monkeypatch):
    assert convert("--component=vae").returncode == 0
    if how == "refused":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    else:
        server.down = 503
    begin = time.monotonic()
    done = run_here("convert.wan", f"--src={NAME}", "--dst=other", "--component=vae")
    assert done.returncode == 0 and os.listdir("other") == ["vae"]
    missing = run_here("convert.wan", f"--src={NAME}", "--dst=other", "--component=transformer")
    assert "transformer not in the cache, and the hub cannot be reached (" in missing.stderr
    assert time.monotonic() - begin < 5


@only_diffusers
def test_a_download_that_broke_off_goes_on(server, wan):
    server.broken.add("vae/diffusion_pytorch_model-00002.safetensors")
    assert "could not be fetched" in fails("--component=vae")
    first = list(server.fetched)
    server.broken.clear()
    assert convert("--component=vae").returncode == 0
    assert len(server.fetched) == len(set(server.fetched)) and set(first) < set(server.fetched)


@pytest.mark.parametrize("index", [{"transformer_2": ["d", "C"]}, {"_class_name": "WanImageToVideoPipeline"}])
@only_diffusers
def test_another_model_is_refused_before_its_weights_are_fetched(server, wan, index):
    file = server.folders[NAME] / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **index}))
    line = fails()
    assert NAME in line and "give a Wan2.1-T2V" in line and not weights_of(server.fetched)


def test_another_model_is_refused_by_its_configuration_alone(server, wan):
    """That of VACE, whose repository has no other sign of it before the tensors."""
    file = next(server.folders[NAME].rglob("transformer/config.json"), server.folders[NAME] / "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "vace"}))
    line = fails()
    assert f"{NAME}/" in line and "config.json is a model of type vace: give a Wan2.1-T2V" in line
    assert not weights_of(server.fetched)


@only_diffusers
def test_the_name_of_another_model_is_refused(server, wan):
    offer(server, server.folders[NAME], "Wan-AI/Wan2.2-T2V-A14B")
    assert "Wan2.2 is not supported" in fails(src="Wan-AI/Wan2.2-T2V-A14B")
    assert not weights_of(server.fetched)


@only_diffusers
def test_an_index_that_names_a_file_too_many(server, wan):
    (server.folders[NAME] / "vae" / "diffusion_pytorch_model-00002.safetensors").unlink()
    line = fails("--component=vae")
    assert f"{NAME} has no vae/diffusion_pytorch_model-00002.safetensors" in line


@pytest.mark.parametrize(
    "text", ["./Wan-AI/Tiny", "~/Tiny", "/Wan-AI/Tiny", "../Wan-AI/Tiny", "a/b/c", "Tiny"]
)
def test_paths_are_never_names(server, text):
    assert hub.find(text, ()) is None and not server.asked


def test_a_folder_wins(server, tmp_path):
    (tmp_path / "Wan-AI" / "Tiny").mkdir(parents=True)
    assert hub.find(NAME, ()) is None and not server.asked


def test_a_vae_of_sat_comes_with_its_transformer(server, tmp_path):
    offer(server, save_sat(tmp_path / "origin"))
    done = run_here("convert.cogvideox", f"--src={NAME}", "--dst=dst", "--component=vae")
    assert done.returncode == 0 and os.listdir("dst") == ["vae"]
    assert {os.path.basename(file) for file in server.fetched} == {"mp_rank_00_model_states.pt", "3d-vae.pt"}


FETCH = """
import sys
from pathlib import Path
from prophy_jax.run import hub
print(hub.find(sys.argv[1], ()).fetch(lambda folder, whole: folder.glob("*.bin")))
"""


def test_several_processes_fetch_each_file_once(server, tmp_path):
    (tmp_path / "origin").mkdir()
    for i in range(3):
        (tmp_path / "origin" / f"{i}.bin").write_bytes(bytes([i]) * 1000)
    server.folders[NAME], server.delay = tmp_path / "origin", 0.3
    command = [sys.executable, "-c", FETCH, NAME]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment, stderr=subprocess.DEVNULL
        )
        for _ in range(3)
    ]
    folders = {process.communicate()[0].splitlines()[-1] for process in running}
    assert len(folders) == 1 and sorted(os.listdir(folders.pop())) == ["0.bin", "1.bin", "2.bin"]
    assert sorted(server.fetched) == ["0.bin", "1.bin", "2.bin"]


def test_a_vlm_from_the_hub(server, tmp_path, request):
    pytest.importorskip("torch")
    request.getfixturevalue("one_torch_thread")
    from prophy_jax.labels import opening
    from tests.label_test import get_config
    from tests.tiny_vlm import save_tiny_vlm

    save_tiny_vlm(tmp_path / "origin")
    offer(server, tmp_path / "origin", "Qwen/Tiny-VL")
    (tmp_path / "origin" / "LICENSE.txt").unlink()
    (tmp_path / "origin" / "model.fp16.safetensors").unlink()
    model, described = opening.open_model("Qwen/Tiny-VL", get_config(), 0)
    assert model.num_layers == 4
    assert described.items() >= {"name": "Qwen/Tiny-VL", "revision": COMMIT}.items()
    wanted = [
        file for file in os.listdir(tmp_path / "origin") if file.endswith((".json", ".jinja", ".safetensors"))
    ]
    assert sorted(server.fetched) == sorted(wanted)
    config = tmp_path / "origin" / "config.json"
    server.folders["Qwen/Other"] = tmp_path / "other"
    (tmp_path / "other").mkdir()
    config.rename(tmp_path / "other" / "config.json").write_text('{"model_type": "qwen2_vl"}')
    (tmp_path / "other" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="--vlm: Qwen/Other holds a model of type qwen2_vl"):
        opening.open_model("Qwen/Other", get_config(), 0)
    assert server.fetched.count("model.safetensors") == 1
