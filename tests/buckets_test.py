"""The commands in a bucket: what they make there is what they make on a disk, through kills too."""

import json
import pathlib
import shutil

import fsspec
import numpy as np
import pytest
from safetensors.numpy import save_file

from prophy_jax.data import loader
from prophy_jax.prepare import prepare
from prophy_jax.run import checkpoints, metrics, storage
from prophy_jax.run.errors import UserError
from tests import convert_test
from tests.bucket import download
from tests.commands import run_here
from tests.conftest import get_config

pytestmark = pytest.mark.jobs


def files(folder) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in pathlib.Path(folder).rglob("*")
        if path.is_file()
    }


def upload(folder: pathlib.Path, address: str) -> None:
    fsspec.filesystem(address.partition(":")[0]).put(f"{folder}/", f"{address}/", recursive=True)


def test_two_processes_prepare_the_bytes_of_one(tiny_data, bucket, tmp_path):
    config = get_config("tiny")
    assert prepare(config, out=bucket, process=(1, 2)) is None
    with pytest.raises(UserError, match=f"{bucket} is not finished"):
        loader.load_empty_text(bucket)
    prepare(config, out=bucket, process=(0, 2))
    download(bucket, tmp_path / "got")
    assert files(tmp_path / "got") == files(tiny_data)
    assert prepare(config, out=bucket) is not None  # nothing left to do
    config.data.fps += 1
    with pytest.raises(UserError, match=f"{bucket}/manifest.json says that the folder was made differently"):
        prepare(config, out=bucket)
    with pytest.raises(UserError, match="s3://b/x: training data must be on a disk or in gs://"):
        prepare(get_config("tiny"), out="s3://b/x")


@pytest.mark.parametrize("kind", ["bucket", "s3_bucket"])
def test_videos_in_a_bucket_give_the_records_of_those_on_a_disk(
    wisa_sample, bucket, kind, tmp_path, capsys, request
):
    source = tmp_path / "wisa"
    shutil.copytree(wisa_sample, source)
    shutil.make_archive(source / "videos" / "1", "zip", source / "videos", "sandbox_1.mp4")
    (source / "videos" / "sandbox_1.mp4").unlink()
    (source / "videos" / "below").mkdir()
    (source / "videos" / "sandbox_2.mp4").rename(source / "videos" / "below" / "sandbox_2.mp4")
    videos = f"{request.getfixturevalue(kind)}/wisa"
    upload(source, videos)
    config = get_config("tiny")
    config.data.fps = 8
    prepare(config, [source], tmp_path / "disk")
    prepare(config, [videos], f"{bucket}/data")
    download(f"{bucket}/data", tmp_path / "got")
    own, theirs = files(tmp_path / "got"), files(tmp_path / "disk")
    rows = [
        [
            {**json.loads(line), "stamp": None, "checksum": None}
            for line in found.pop("clips.jsonl").splitlines()
        ]
        for found in (own, theirs)
    ]
    manifests = [json.loads(found.pop("manifest.json")) for found in (own, theirs)]
    for manifest in manifests:  # its rows have stamps
        del manifest["checksums"]["clips.jsonl"]
    assert own == theirs and rows[0] == rows[1] and len(rows[0]) == 6
    assert manifests[0].pop("sources") == [videos] and manifests[1].pop("sources")
    assert manifests[0].pop("checksum") != manifests[1].pop("checksum")
    assert manifests[0] == manifests[1]

    # Another video in the place of one: it alone is encoded anew.
    clip = "videos/below/sandbox_2.mp4"
    storage.write_atomically(f"{videos}/{clip}", (source / "videos" / "sandbox_3.mp4").read_bytes() + b"\0")
    capsys.readouterr()
    prepare(config, [videos], f"{bucket}/data")
    assert "videos replaced: 1\n  sandbox_2" in capsys.readouterr().out


def write_wan(folder: pathlib.Path) -> pathlib.Path:
    """A download of a tiny transformer with random weights."""
    table = convert_test.MODELS["transformer"][1]("diffusers")
    (folder / "transformer").mkdir(parents=True)
    save_file(
        convert_test.random_tensors(table), folder / "transformer" / "diffusion_pytorch_model.safetensors"
    )
    fields = {
        "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 3, "ffn_dim": 32, "text_dim": 8,
    }  # fmt: skip
    (folder / "transformer" / "config.json").write_text(json.dumps(fields))
    return folder


def test_weights_are_converted_into_a_bucket_and_exported_from_it(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    src = write_wan(tmp_path / "Wan2.1")
    command = ("convert.wan", f"--src={src}", "--component=transformer")
    send, sent = storage.send, []

    def dies(source, address):
        sent.append(address)
        if len(sent) == 5:
            raise KeyboardInterrupt
        send(source, address)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "send", dies)
        done = run_here(*command, f"--dst={bucket}/w")
    assert done.returncode == 1 and "interrupted" in done.stderr
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoints.read_manifest(f"{bucket}/w/transformer", "")
    sent.clear()
    with monkeypatch.context() as patch:
        patch.setattr(storage, "send", lambda *paths: (sent.append(paths[1]), send(*paths)))
        done = run_here(*command, f"--dst={bucket}/w")
    assert done.returncode == 0, done.stderr
    there = storage.list_files(f"{bucket}/w/transformer")
    assert len(sent) == len(there) - 4 and not files(tmp_path / "cache")  # four were there, none is left here
    run_here(*command, f"--dst={tmp_path}/w")
    own, theirs = (checkpoints.read_manifest(f"{root}/w/transformer", "") for root in (bucket, tmp_path))
    assert own["sha256"] == theirs["sha256"] and own["files"].keys() == theirs["files"].keys()
    assert "nothing left to do" in run_here(*command, f"--dst={bucket}/w").stdout

    for root in (bucket, tmp_path):
        place = tmp_path / ("bucket" if root == bucket else "disk")
        done = run_here(
            "convert.export", f"--checkpoint={root}/w/transformer", "--format=diffusers", f"--dst={place}"
        )
        assert done.returncode == 0, done.stderr
    assert files(tmp_path / "bucket") == files(tmp_path / "disk")
    done = run_here(*command, "--dst=s3://b/w")
    assert done.returncode == 1 and "must be on a disk or in gs://" in done.stderr


def test_a_run_in_a_bucket_is_the_run_on_a_disk(tiny_data, bucket, tmp_path):
    upload(pathlib.Path(tiny_data), f"{bucket}/data")
    found = {}
    for root, data, stops in ((bucket, f"{bucket}/data", (3, 6)), (str(tmp_path), tiny_data, (6,))):
        tiny = [
            "--config=configs/wan.py:tiny", f"--config.data.dir={data}", "--config.backbone.num_layers=1",
            "--config.parts.branch.layers=(0,)", "--config.batch_size=8", "--config.samples.steps=2",
            "--config.log.profile=(1,1)",
        ]  # fmt: skip
        every = [f"--config.{key}.every=3" for key in ("log", "checkpoint", "validation", "samples")]
        for steps in stops:  # where it stops, and resumes
            run_well("prophy_jax.train", *tiny, f"--workdir={root}/run", *every, f"--config.steps={steps}")
        run_well(
            "prophy_jax.sample", *tiny, f"--branch={root}/run/checkpoints/3", "--prompt=a ball falls",
            f"--out={root}/clips", "--batch=8",
        )  # fmt: skip
        run_well("prophy_jax.evaluate", *tiny, f"--workdir={root}/run", f"--out={root}/report")
        place = storage.path(root)
        found[root] = {
            "losses": [
                {name: value for name, value in line.items() if name.startswith(("step", "loss", "valid"))}
                for line in metrics.read_metrics(f"{root}/run")
            ],
            "branch": checkpoints.read_manifest(f"{root}/run/branch", "")["sha256"],
            "clip": (place / "clips" / "0000.mp4").read_bytes(),
            "validation": (place / "run" / "samples" / "step_0000006.mp4").read_bytes(),
            "measured": (place / "report" / "metrics.json").read_bytes(),
            "report": "base64" in (place / "report" / "report.html").read_text(),
            "files": sorted({name.partition("/")[0] for name in storage.list_files(f"{root}/run")}),
        }
    own, theirs = found.values()
    for name in own:
        assert own[name] == theirs[name], name
    assert len(own["losses"]) == 3 and own["report"]
    assert any("events" in name for name in storage.list_files(f"{bucket}/run/tensorboard"))


def run_well(*words: str) -> None:
    done = run_here(*words)
    assert done.returncode == 0, done.stderr


def test_damage_in_a_bucket_is_refused(tiny_data, bucket):
    tree = {"a": np.ones((4, 4), np.float32)}
    checkpoints.save_params(f"{bucket}/branch", tree, {"part": "branch"})
    wanted = {"a": checkpoints.jax.ShapeDtypeStruct((4, 4), "float32")}
    assert np.array_equal(checkpoints.load_params(f"{bucket}/branch", wanted, "")["a"], tree["a"])
    checkpoints.save_params(f"{bucket}/branch", {"a": 2 * tree["a"]}, {"part": "branch"})  # replaces it
    assert checkpoints.load_params(f"{bucket}/branch", wanted, "")["a"][0, 0] == 2
    (name,) = (
        name for name in storage.list_files(f"{bucket}/branch") if "/d/" in name and "process" not in name
    )
    content = bytearray((storage.path(bucket) / "branch" / name).read_bytes())
    content[len(content) // 2] ^= 1
    storage.write_atomically(f"{bucket}/branch/{name}", bytes(content))
    with pytest.raises(UserError, match="is damaged"):
        checkpoints.load_params(f"{bucket}/branch", wanted, "")
