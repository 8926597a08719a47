"""`python -m convert.wan` on files: both layouts, exactness, interruption, and all kinds of bad input."""

import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import command as convert_command
from convert import leaves as lv
from convert import stream
from convert import wan as convert_wan
from prophy_jax import models
from prophy_jax.run import checkpoints
from prophy_jax.run.errors import UserError
from tests import state_dicts
from tests.commands import run_here
from tests.tiny_tokenizer import save_tiny_tokenizer

SPECS = {
    "transformer": dict(module="wan", dim=48, num_heads=4, num_layers=3, ffn_dim=70, text_dim=24),
    "vae": dict(module="wan_vae", base_dim=4),
    "text_encoder": dict(
        module="t5",
        vocab_size=256,
        d_model=24,
        d_kv=6,
        d_ff=40,
        num_layers=3,
        num_heads=4,
        shared_bias=False,
    ),
}
CONFIG_JSON = {
    "official": {
        "transformer": dict(
            model_type="t2v", dim=48, num_heads=4, num_layers=3, ffn_dim=70, text_dim=24, in_dim=16
        )
    },
    "diffusers": {
        "transformer": dict(
            num_attention_heads=4,
            attention_head_dim=12,
            num_layers=3,
            ffn_dim=70,
            text_dim=24,
            image_dim=None,
            patch_size=[1, 2, 2],
        ),
        "vae": dict(base_dim=4, temperal_downsample=[False, True, True], is_residual=False),
        "text_encoder": dict(
            model_type="umt5",
            feed_forward_proj="gated-gelu",
            vocab_size=256,
            d_model=24,
            d_kv=6,
            d_ff=40,
            num_layers=3,
            num_heads=4,
        ),
    },
}
OFFICIAL = {
    "transformer": "diffusion_pytorch_model",
    "vae": "Wan2.1_VAE",
    "text_encoder": "models_t5_umt5-xxl-enc-bf16",
}


def table_of(part: str, naming: str):
    return convert_wan.PARTS[part].leaves(models.build(SPECS[part]).config, naming)


@pytest.fixture(scope="module")
def params():
    """Random trees by part: the text encoder in bfloat16, the others in float32."""
    rng = np.random.default_rng(0)
    trees = {}
    for part in SPECS:
        dtype = ml_dtypes.bfloat16 if part == "text_encoder" else np.float32
        shapes = lv.tensor_shapes(table_of(part, "official"))
        tensors = {n: rng.standard_normal(s, np.float32).astype(dtype) for n, s in shapes.items()}
        trees[part] = state_dicts.read(tensors, table_of(part, "official"))
    return trees


def save(params, folder, layout: str, parts=tuple(SPECS), shards: int = 1):
    """Writes parts in a layout, with the tokenizer. Several shards have an index."""
    for part in parts:
        tensors = state_dicts.write(params[part], table_of(part, layout))
        where = folder if layout == "official" else folder / part
        stem = OFFICIAL[part] if layout == "official" else convert_command.STEMS[part]
        where.mkdir(parents=True, exist_ok=True)
        if part in CONFIG_JSON[layout]:
            (where / "config.json").write_text(json.dumps(CONFIG_JSON[layout][part]))
        if shards == 1:
            save_file(tensors, where / f"{stem}.safetensors")
        else:
            shard = {name: f"{stem}-{i % shards + 1:05}.safetensors" for i, name in enumerate(tensors)}
            for file in set(shard.values()):
                save_file({n: t for n, t in tensors.items() if shard[n] == file}, where / file)
            index = {"metadata": {}, "weight_map": shard}
            (where / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    if "text_encoder" in parts:
        save_tiny_tokenizer(folder / ("google/umt5-xxl" if layout == "official" else "tokenizer"))
    return folder


def convert(src, dst, *flags: str):
    convert_wan.main(["--src", str(src), f"--dst={dst}", *flags])
    return dst


def load(folder, dtype=None):
    """The tree of a converted part, in its own dtypes."""
    manifest = checkpoints.read_manifest(str(folder), "")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    want = {
        path: jax.ShapeDtypeStruct(tuple(shape), dtype or kind, sharding=device)
        for path, (shape, kind) in manifest["shapes"].items()
    }
    return checkpoints.load_params(str(folder), lv.traverse_util.unflatten_dict(want, sep="/"), "")


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def contents(folder) -> dict[str, bytes]:
    """Every file, except two in which Orbax writes the time and the first name of the folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("_CHECKPOINT_METADATA", "commit_success.txt")
    }


@pytest.mark.parametrize(("layout", "shards"), [("official", 1), ("diffusers", 1), ("diffusers", 3)])
def test_every_part_of_both_layouts_is_bit_equal(tmp_path, params, layout, shards, capsys):
    src = save(params, tmp_path / "src", layout, shards=shards)
    dst = convert(src, tmp_path / "dst")
    assert "MB/s" in capsys.readouterr().out
    assert sorted(os.listdir(dst)) == sorted(SPECS)
    for part, spec in SPECS.items():
        manifest = checkpoints.read_manifest(str(dst / part), "")
        assert_same(load(dst / part), params[part])
        # The hash does not depend on the layout, and both ways of computing it agree.
        assert manifest["sha256"] == checkpoints.tree_hash(params[part])
        assert models.build(manifest["model"]) == models.build(spec)
        assert manifest["part"] == part and manifest["source"]["format"] == layout
        assert manifest["source"]["dtypes"] == ["bfloat16" if part == "text_encoder" else "float32"]
        assert len(manifest["source"]["files"]) == shards
        for file in manifest["source"]["files"]:
            data = next(src.rglob(file["name"])) if layout == "official" else src / part / file["name"]
            data = data.read_bytes()
            assert file["bytes"] == len(data) and file["sha256"] == hashlib.sha256(data).hexdigest()
        assert {"prophy_jax", "jax"} <= manifest["versions"].keys()
    tokenizer = src / ("google/umt5-xxl" if layout == "official" else "tokenizer")
    assert contents(dst / "text_encoder" / "tokenizer") == contents(tokenizer)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in contents(tokenizer).items()}
    assert checkpoints.read_manifest(str(dst / "text_encoder"), "")["source"]["tokenizer"] == hashes


def test_official_sizes_are_derived_from_shapes(tmp_path, params):
    src = save(params, tmp_path / "src", "official")
    (src / "config.json").unlink()
    convert(src, tmp_path / "dst")
    for part in ("vae", "text_encoder"):
        model = checkpoints.read_manifest(str(tmp_path / "dst" / part), "")["model"]
        assert models.build(model) == models.build(SPECS[part])
    model = checkpoints.read_manifest(str(tmp_path / "dst" / "transformer"), "")["model"]
    # The number of heads is in no shape: Wan2.1's are 128 wide.
    assert model == {**model, **SPECS["transformer"], "num_heads": 1}


def test_large_arrays_are_cut_and_read_back_sharded(tmp_path, params, monkeypatch):
    """With thresholds of a tiny model: single layers, chunks with a remainder, reads of one row."""
    src = save(params, tmp_path / "src", "official")
    convert(src, tmp_path / "whole")
    for name, value in {"_GATHERED": 256, "_CHUNK": 900, "_READ": 100}.items():
        monkeypatch.setattr(stream, name, value)
    monkeypatch.setattr(lv, "_ROWS", 5)
    dst = convert(src, tmp_path / "dst")
    chunks = sorted(os.listdir(dst / "text_encoder/tree/blocks.ffn.up.kernel"))
    assert {"0.0.0", "2.3.0"} <= set(chunks) and len(chunks) == 1 + 3 * 4  # 3 layers, quarters, .zarray
    chunks = os.listdir(dst / "text_encoder/tree/blocks.attn_norm.scale")
    assert sorted(chunks) == [".zarray", "0.0"]
    for part in SPECS:
        assert_same(load(dst / part), params[part])
        cut, whole = (
            checkpoints.read_manifest(str(folder / part), "") for folder in (dst, tmp_path / "whole")
        )
        for manifest in (cut, whole):
            manifest["files"] = manifest["checksum"] = ""  # of other chunks
        assert cut == whole

    mesh = jax.make_mesh((8,), ("fsdp",))
    split = jax.NamedSharding(mesh, jax.P("fsdp"))
    want = {"embedding": {"embedding": jax.ShapeDtypeStruct((256, 24), "bfloat16", sharding=split)}}
    rest = {k: v for k, v in params["text_encoder"].items() if k != "embedding"}
    want |= jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, jax.P())), rest
    )
    tree = checkpoints.load_params(str(dst / "text_encoder"), want, "")
    assert len(tree["embedding"]["embedding"].addressable_shards) == 8
    assert_same(tree, params["text_encoder"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_values_are_cast_as_jax_casts_them(tmp_path, params, dtype):
    src = save(params, tmp_path / "src", "diffusers", ["transformer", "text_encoder"])
    dst = convert(src, tmp_path / "dst", f"--dtype={dtype}")
    for part in ("transformer", "text_encoder"):
        cast = jax.tree.map(lambda x: np.asarray(jax.numpy.asarray(x).astype(dtype)), params[part])
        assert_same(load(dst / part), cast)


def test_half_precision_is_kept_and_mixed_layers_become_float32(tmp_path, params):
    table = table_of("transformer", "official")
    tensors = state_dicts.write(params["transformer"], table)
    tensors = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    for layer in (0, 2):
        name = f"blocks.{layer}.ffn.0.weight"
        tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
    src = tmp_path / "src"
    src.mkdir()
    save_file(tensors, src / "diffusion_pytorch_model.safetensors")
    (src / "config.json").write_text(json.dumps(CONFIG_JSON["official"]["transformer"]))
    tree = load(convert(src, tmp_path / "dst") / "transformer")
    assert tree["head"]["out"]["kernel"].dtype == np.float16
    assert tree["blocks"]["ffn"]["up"]["kernel"].dtype == np.float32
    back = state_dicts.write(tree, table)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name].astype(tensor.dtype), tensor, err_msg=name)


@pytest.mark.parametrize("both", [True, False])
def test_the_embedding_may_have_its_other_name(tmp_path, params, both):
    src = save(params, tmp_path / "src", "diffusers", ["text_encoder"])
    file = src / "text_encoder" / "model.safetensors"
    tensors = state_dicts.write(params["text_encoder"], table_of("text_encoder", "diffusers"))
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].copy()
    if not both:
        del tensors["shared.weight"]
    save_file(tensors, file)
    assert_same(load(convert(src, tmp_path / "dst") / "text_encoder"), params["text_encoder"])
    if both:
        tensors["encoder.embed_tokens.weight"][255, 3] = 9
        save_file(tensors, file)
        with pytest.raises(UserError, match=r"encoder.embed_tokens.weight differs from shared.weight"):
            convert(src, tmp_path / "other")
        assert not (tmp_path / "other").exists()


def test_missing_parts_are_named_and_one_part_can_be_converted(tmp_path, params, capsys):
    src = save(params, tmp_path / "src", "diffusers", ["transformer", "vae"])
    dst = convert(src, tmp_path / "dst", "--component", "vae")
    assert os.listdir(dst) == ["vae"]
    (src / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    convert(src, dst)
    assert sorted(os.listdir(dst)) == ["transformer", "vae"]
    out = capsys.readouterr().out
    assert "no vae: " in out and "no text_encoder: " in out
    with pytest.raises(UserError, match=r"neither models_t5_umt5-xxl-enc-bf16\.pth nor text_encoder/model"):
        convert(src, tmp_path / "dst", "--component=text_encoder")


def test_a_dry_run_describes_and_writes_nothing(tmp_path, params, capsys):
    src = save(params, tmp_path / "src", "diffusers")
    convert(src, tmp_path / "dst", "--dry-run", "--dtype=bfloat16")
    assert not (tmp_path / "dst").exists()
    out = capsys.readouterr().out
    count = sum(x.size for x in jax.tree.leaves(params["transformer"]))
    assert f"transformer: diffusers naming, {count:,} parameters, everything fits" in out
    assert "model.safetensors" in out and "dim 48" in out and "bfloat16" in out


# Interruption.

KILLED = """
import os, signal, sys
from convert import stream, wan
add, count = stream._Journal.add, 0
def add_then_die(self, name, digests):
    global count
    add(self, name, digests)
    count += 1
    if count == int(sys.argv[3]):
        with open(os.path.join(sys.argv[2], "transformer.partial", "journal.jsonl"), "a") as file:
            file.write('{"name": "torn')
        os.kill(os.getpid(), signal.SIGKILL)
stream._Journal.add = add_then_die
stream._GATHERED = 256
wan.main(["--src", sys.argv[1], "--dst", sys.argv[2]])
"""


@pytest.mark.parametrize("kill_at", [1, 25])
def test_a_killed_run_resumes_and_writes_the_same_files(tmp_path, params, monkeypatch, kill_at):
    src = save(params, tmp_path / "src", "official", ["transformer"])
    dst = tmp_path / "dst"
    command = [sys.executable, "-c", KILLED, str(src), str(dst), str(kill_at)]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert os.listdir(dst) == ["transformer.partial"]

    written = []
    write = stream._write
    monkeypatch.setattr(stream, "_GATHERED", 256)
    monkeypatch.setattr(stream, "_write", lambda *arguments: (written.append(0), write(*arguments)))
    convert(src, dst)
    resumed = len(written)
    written.clear()
    convert(src, tmp_path / "straight")
    assert resumed == len(written) - kill_at
    assert os.listdir(dst) == ["transformer"]
    assert contents(dst) == contents(tmp_path / "straight")


def test_parts_that_are_made_stay_and_the_rest_is_made(tmp_path, params, capsys, monkeypatch):
    src, dst = save(params, tmp_path / "src", "official"), tmp_path / "dst"
    write, written = convert_command._write_part, []

    def dies_at_the_second(component, partial):
        written.append(component.part)
        if len(written) == 2:
            raise KeyboardInterrupt
        return write(component, partial)

    with monkeypatch.context() as patch:
        patch.setattr(convert_command, "_write_part", dies_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            convert(src, dst)
    first = written[0]
    assert (dst / first).is_dir() and len([part for part in SPECS if (dst / part).is_dir()]) == 1
    before = os.stat(dst / first / "manifest.json").st_mtime_ns
    capsys.readouterr()
    convert(src, dst)
    assert f"{dst / first}: made of these files already" in capsys.readouterr().out
    assert os.stat(dst / first / "manifest.json").st_mtime_ns == before
    assert contents(dst) == contents(convert(src, tmp_path / "straight"))
    capsys.readouterr()
    convert(src, dst)  # a finished command, once more
    assert capsys.readouterr().out.endswith("nothing left to do\n")
    # Files of the same names and sizes, of other content.
    (file,) = src.glob("diffusion_pytorch_model.safetensors")
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(UserError, match="dst/transformer exists: delete it"):
        convert(src, dst)


def test_the_work_of_a_run_with_another_dtype_is_discarded(tmp_path, params, capsys, monkeypatch):
    src = save(params, tmp_path / "src", "official", ["transformer"])

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stream._Journal, "add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(src, tmp_path / "dst")
    assert os.listdir(tmp_path / "dst") == ["transformer.partial"]
    dst = convert(src, tmp_path / "dst", "--dtype=bfloat16")
    assert "discarding" in capsys.readouterr().out
    assert contents(dst) == contents(convert(src, tmp_path / "straight", "--dtype=bfloat16"))


@pytest.mark.parametrize("line", [b"{oops", b"[]", b"\xff", b"[" * 100_000])
def test_a_damaged_journal_begins_anew(tmp_path, params, capsys, line):
    src = save(params, tmp_path / "src", "official", ["transformer"])
    partial = tmp_path / "dst" / "transformer.partial"
    partial.mkdir(parents=True)
    (partial / stream.JOURNAL).write_bytes(b"{}\n" + line + b"\n")
    dst = convert(src, tmp_path / "dst")
    assert "discarding" in capsys.readouterr().out
    assert contents(dst) == contents(convert(src, tmp_path / "straight"))


def test_chunks_that_a_power_cut_lost_are_written_again(tmp_path, params, monkeypatch):
    src = save(params, tmp_path / "src", "official", ["transformer"])
    dst = tmp_path / "dst"
    with monkeypatch.context() as patch:
        patch.setattr(type(dst), "rename", lambda *_: sys.exit())
        patch.setattr(type(dst), "unlink", lambda *_: None)
        with pytest.raises(SystemExit):
            convert(src, dst)
    (dst / "transformer.partial/tree/head.out.kernel/0.0").write_bytes(b"")
    (dst / "transformer.partial/tree/head.out.bias/0").unlink()
    convert(src, dst)
    assert_same(load(dst / "transformer"), params["transformer"])


def test_a_second_run_at_the_same_time_is_refused(tmp_path, params):
    src = save(params, tmp_path / "src", "official", ["transformer"])
    component = convert_command.open_component(convert_wan.MODEL, src, "transformer", None)
    partial = tmp_path / "transformer.partial"
    with stream._Journal(partial, {}, None), pytest.raises(UserError, match="another conversion"):
        convert_command.convert(component, tmp_path)
    assert partial.exists()


# Bad input.


def run(src, dst, *flags):
    return run_here("convert.wan", f"--src={src}", f"--dst={dst}", *flags)


def test_bad_input_gives_one_line_of_error(tmp_path, params):
    src = save(params, tmp_path / "src", "official", ["transformer"])
    done = run(src, tmp_path / "dst")
    assert done.returncode == 0 and "MB/s" in done.stdout
    before = contents(tmp_path / "dst")
    for arguments, message in [
        (
            (src, tmp_path / "dst", "--dtype=bfloat16"),
            "dst/transformer exists: delete it or choose another --dst",
        ),
        ((src, tmp_path / "new", "--dtype=float8"), "argument --dtype: invalid choice"),
    ]:
        failed = run(*arguments)
        assert failed.returncode == 1
        assert failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
        assert message in failed.stderr
    assert contents(tmp_path / "dst") == before and not (tmp_path / "new").exists()


def fails(src, tmp_path, *flags) -> str:
    """The error of the command, which writes nothing."""
    with pytest.raises(UserError) as caught:
        convert(src, tmp_path / "dst", *flags)
    assert not (tmp_path / "dst").exists()
    return str(caught.value)


def header_of(file) -> tuple[dict, bytes]:
    data = file.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


def with_header(header, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _edit(**entry):
    def damage(header, data):
        header["head.head.bias"] |= entry
        return with_header(header, data)

    return damage


DAMAGES = {
    "empty": lambda header, data: b"",
    "cut in the header": lambda header, data: with_header(header, data)[:1000],
    "cut in the data": lambda header, data: with_header(header, data[:-1]),
    "trailing garbage": lambda header, data: with_header(header, data + b"garbage"),
    "endless header": lambda header, data: b"\xff" * 8 + with_header(header, data)[8:],
    "no JSON": lambda header, data: with_header(b"{" * 40, data),
    "no text": lambda header, data: with_header(b"\xff\xfe", data),
    "no object": lambda header, data: with_header(b"[1, 2]", data),
    "an entry twice": lambda header, data: with_header(
        json.dumps(header)[:-1].encode() + b', "head.head.bias": {}}', data
    ),
    "no entry": lambda header, data: with_header({**header, "head.head.bias": 3}, data),
    "negative": _edit(shape=[-64], data_offsets=[0, -256]),
    "beyond the file": _edit(data_offsets=[10**9, 10**9 + 256]),
    "backwards": _edit(data_offsets=[256, 0]),
    "overlap": _edit(data_offsets=[0, 256]),
    "other size": _edit(shape=[65]),
    "fractions": _edit(shape=[64.0]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shards_are_refused(tmp_path, params, damage):
    src = save(params, tmp_path / "src", "official", ["transformer"])
    file = src / "diffusion_pytorch_model.safetensors"
    file.write_bytes(DAMAGES[damage](*header_of(file)))
    message = fails(src, tmp_path)
    assert str(file) in message and "cut short or damaged" in message and "\n" not in message


def test_quantised_weights_are_refused(tmp_path, params):
    src = save(params, tmp_path / "src", "official", ["transformer"])
    file = src / "diffusion_pytorch_model.safetensors"
    header, data = header_of(file)
    header["head.head.bias"] |= {"dtype": "F8_E4M3", "shape": [256]}  # as many bytes
    file.write_bytes(with_header(header, data))
    assert "head.head.bias is of type F8_E4M3" in fails(src, tmp_path)


def test_an_index_that_does_not_fit_is_refused(tmp_path, params):
    src = save(params, tmp_path / "src", "diffusers", ["transformer"], shards=3)
    index = src / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    whole = json.loads(index.read_text())
    bias = whole["weight_map"]["proj_out.bias"]

    def change(**entries):
        table = {k: v for k, v in (whole["weight_map"] | entries).items() if v is not None}
        index.write_text(json.dumps({"weight_map": table}))
        return fails(src, tmp_path)

    assert f"proj_out.bias is in {bias} but not in the index" in change(**{"proj_out.bias": None})
    assert f"other.bias is not in {bias}" in change(**{"other.bias": bias})
    assert "names the file gone.safetensors" in change(**{"proj_out.bias": "gone.safetensors"})
    assert "names the file ../x" in change(**{"proj_out.bias": "../x"})
    index.write_text("[]")
    assert "not a JSON object" in fails(src, tmp_path)
    index.write_text('{"weight_map"')
    assert "not a readable JSON file" in fails(src, tmp_path)
    index.write_text('{"weight_map": {"a": 3}}')
    assert "no weight_map" in fails(src, tmp_path)
    index.write_text(json.dumps(whole))
    (index.parent / bias).unlink()
    assert f"names the file {bias}, which is not next to it" in fails(src, tmp_path)


def resave(file, change) -> None:
    save_file(change(load_file(file)), file)


def test_all_keys_that_do_not_fit_are_named_at_once(tmp_path, params):
    src = save(params, tmp_path / "src", "official", ["transformer"])

    def change(arrays):
        del arrays["head.head.bias"]
        odd = {"extra.bias": np.zeros(3, np.float32), "blocks.1.ffn.2.bias": np.zeros(49, np.float32)}
        return {**arrays, **odd}

    resave(src / "diffusion_pytorch_model.safetensors", change)
    message = fails(src, tmp_path)
    for part in (
        "unknown extra.bias",
        "missing head.head.bias",
        "blocks.1.ffn.2.bias is (49,), not (48,)",
        "official naming",
    ):
        assert part in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_written(tmp_path, params, value, dtype):
    """The last value of the largest tensor; a number that only --dtype makes infinite, too."""
    src = save(params, tmp_path / "src", "official", ["transformer"])

    def change(arrays):
        arrays = {name: array.astype(dtype) for name, array in arrays.items()}
        with np.errstate(over="ignore"):
            arrays["blocks.2.ffn.2.weight"][-1, -1] = value
        return arrays

    resave(src / "diffusion_pytorch_model.safetensors", change)
    if value == 3.4e38 and dtype != np.float16:
        if dtype == np.float32:
            error = fails(src, tmp_path, "--dtype=bfloat16")
            assert "blocks.2.ffn.2.weight has numbers too large for bfloat16: leave out --dtype" in error
        else:
            assert "blocks.2.ffn.2.weight holds NaN" in fails(src, tmp_path)  # bfloat16 rounds it up
        return
    for flags in ([], ["--dtype=bfloat16"]):
        error = fails(src, tmp_path, *flags)
        assert "diffusion_pytorch_model.safetensors: blocks.2.ffn.2.weight holds NaN or infinity" in error


@pytest.mark.parametrize(
    ("layout", "part", "change", "message"),
    [
        ("official", "transformer", {"ffn_dim": 71}, "blocks.0.ffn.0.weight is (70, 48), not (71, 48)"),
        ("official", "transformer", {"num_layers": 4}, "missing blocks.3.ffn.2.bias"),
        ("official", "transformer", {"num_heads": 5}, "config.json: Wan width 48"),
        ("official", "transformer", {"dim": "48"}, "config.json does not describe"),
        ("official", "transformer", {"dim": None}, "config.json: Wan sizes"),
        ("official", "transformer", {"model_type": "i2v"}, "is a model of type i2v"),
        ("diffusers", "transformer", {"image_dim": 1280}, "image-to-video model"),
        ("diffusers", "vae", {"is_residual": True}, "VAE of Wan2.2"),
        ("diffusers", "vae", {"dim_mult": [1, 2]}, "config.json: Wan VAE"),
        ("diffusers", "text_encoder", {"feed_forward_proj": "relu"}, "with 'relu'"),
        ("diffusers", "text_encoder", {"d_kv": None}, "config.json lacks 'd_kv'"),
        ("diffusers", "text_encoder", {"vocab_size": 255}, "shared.weight is (256, 24), not (255, 24)"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(tmp_path, params, layout, part, change, message):
    src = save(params, tmp_path / "src", layout, [part])
    where = (src if layout == "official" else src / part) / "config.json"
    fields = json.loads(where.read_text()) | change
    where.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    assert message in fails(src, tmp_path)


def test_diffusers_files_need_their_configuration(tmp_path, params):
    src = save(params, tmp_path / "src", "diffusers", ["vae"])
    (src / "vae" / "config.json").unlink()
    assert "vae/config.json is missing" in fails(src, tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "lora_unet_blocks_0_self_attn_q.lora_down.weight",
            "is a LoRA and not a whole model: convert its base",
        ),
        ("diffusion_model.blocks.0.ffn.0.lora_A.weight", "is a LoRA"),
        ("transformer.blocks.0.attn1.to_q.lora.up.weight", "is a LoRA"),
        ("blocks.0.cross_attn.k_img.weight", "is an image-to-video model"),
        ("condition_embedder.image_embedder.norm1.weight", "is an image-to-video model"),
        ("vace_blocks.0.ffn.0.weight", "is a VACE model"),
    ],
)
@pytest.mark.parametrize("public_name", [True, False])
def test_other_kinds_of_models_are_named(tmp_path, name, message, public_name):
    stem = "diffusion_pytorch_model" if public_name else "downloaded"
    save_file({name: np.zeros((4, 4), np.float32)}, tmp_path / f"{stem}.safetensors")
    error = fails(tmp_path, tmp_path)
    assert message in error and name in error


@pytest.mark.parametrize("layout", ["official", "diffusers"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("transformer_2", "Wan2.2 is not supported (found transformer_2)"),
        ("low_noise_model", "Wan2.2 is not supported (found low_noise_model)"),
        ("image_encoder", "image-to-video is not supported (found image_encoder)"),
    ],
)
def test_a_download_with_more_than_the_model_is_refused(tmp_path, params, layout, name, message):
    src = save(params, tmp_path / "src", layout)
    (src / name).mkdir()
    for flags in ([], ["--component=vae"], ["--dry-run"]):
        assert message in fails(src, tmp_path, *flags)
    if layout == "diffusers":  # Its transformer alone tells nothing of the other one.
        assert message in fails(src / "transformer", tmp_path)
        assert message in fails(src / "transformer" / "diffusion_pytorch_model.safetensors", tmp_path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"boundary_ratio": 0.875}, "Wan2.2 is not supported (found boundary_ratio)"),
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "Wan2.2 is not supported"),
        ({"expand_timesteps": True}, "Wan2.2 is not supported (found expand_timesteps)"),
        ({"image_encoder": ["transformers", "CLIPVisionModel"]}, "image-to-video is not supported"),
        ({"_class_name": "WanVACEPipeline"}, "is of a WanVACEPipeline, which Wan2.1 is not"),
        ({"upsampler": ["diffusers", "Upsampler"]}, "has upsampler, which Wan2.1 does not have"),
        # What later versions of diffusers write of a Wan2.1.
        ({"boundary_ratio": None, "transformer_2": [None, None], "expand_timesteps": False}, None),
    ],
)
def test_the_parts_that_diffusers_lists_are_those_of_the_model(tmp_path, params, entries, message):
    src = save(params, tmp_path / "src", "diffusers", ["vae"])
    index = {"_class_name": "WanPipeline", "_diffusers_version": "0.35.0", "vae": ["diffusers", "V"]}
    (src / "model_index.json").write_text(json.dumps(index | entries))
    if message:
        assert message in fails(src, tmp_path)
    else:
        convert(src, tmp_path / "dst", "--dry-run")


@pytest.mark.parametrize("name", ["Wan2.2-T2V-A14B", "high_noise_model", "wan22_t2v", "Wan2_2"])
def test_a_download_whose_name_is_of_another_model_is_refused(tmp_path, params, name):
    """Either half of Wan2.2 has the tensors of Wan2.1's 14B."""
    src = save(params, tmp_path / name, "official", ["transformer"])
    assert f"Wan2.2 is not supported (found {name})" in fails(src, tmp_path)
    file = src / "diffusion_pytorch_model.safetensors"
    lone = file.rename(tmp_path / "wan2.2_t2v_low_noise_14B.safetensors")
    assert f"Wan2.2 is not supported (found {lone.name})" in fails(lone, tmp_path)


@pytest.mark.parametrize(("inputs", "outputs"), [(52, 16), (48, 16), (48, 48)])
def test_models_with_other_channels_are_refused(tmp_path, params, inputs, outputs):
    src = save(params, tmp_path / "src", "official", ["transformer"])
    (src / "config.json").unlink()
    odd = {
        "patch_embedding.weight": np.zeros((48, inputs, 1, 2, 2), np.float32),
        "head.head.weight": np.zeros((4 * outputs, 48), np.float32),
    }
    resave(src / "diffusion_pytorch_model.safetensors", lambda arrays: arrays | odd)
    message = "Wan2.2 is not supported" if outputs == 48 else f"{inputs} input channels for 16 of the video"
    assert message in fails(src, tmp_path)


PREFIXES = {
    "model.diffusion_model.": "model.diffusion_model.{}",
    "diffusion_model.": "diffusion_model.{}",
    "module.": "module.{}",
    "_orig_mod.": "_orig_mod.{}",
    "module._orig_mod.": "module._orig_mod.{}",
    "within": "_fsdp_wrapped_module.{}",
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_what_other_programs_put_before_names_is_taken_off(tmp_path, params, layout, prefix):
    src = save(params, tmp_path / "src", layout, ["transformer"])
    file = next(src.rglob("*.safetensors"))

    def rename(name: str) -> str:
        if prefix == "within":
            name = re.sub(r"^blocks\.(\d+)\.", r"blocks.\1._checkpoint_wrapped_module._orig_mod.", name)
        return PREFIXES[prefix].format(name)

    resave(file, lambda arrays: {rename(name): array for name, array in arrays.items()})
    assert_same(load(convert(src, tmp_path / "dst") / "transformer"), params["transformer"])


def test_a_file_with_more_than_a_prefixed_model_names_the_rest(tmp_path, params):
    src = save(params, tmp_path / "src", "official", ["transformer"])

    def change(arrays):
        odd = {"vae.conv1.weight": np.zeros(3, np.float32)}
        return {f"model.diffusion_model.{name}": array for name, array in arrays.items()} | odd

    resave(src / "diffusion_pytorch_model.safetensors", change)
    message = fails(src, tmp_path)
    assert "unknown vae.conv1.weight" in message and "missing" not in message


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("given", ["file", "folder"])
def test_a_lone_repackaged_file_is_recognised(tmp_path, params, part, given):
    tensors = state_dicts.write(params[part], table_of(part, "official"))
    if part == "transformer":
        tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
        (tmp_path / "config.json").write_text(json.dumps(CONFIG_JSON["official"]["transformer"]))
    if part == "text_encoder":
        save_tiny_tokenizer(tmp_path / "google/umt5-xxl")
    save_file(tensors, tmp_path / "wan_2.1_repackaged.safetensors")
    src = tmp_path if given == "folder" else tmp_path / "wan_2.1_repackaged.safetensors"
    dst = convert(src, tmp_path / "dst")
    assert os.listdir(dst) == [part]
    assert_same(load(dst / part), params[part])
    other = "vae" if part != "vae" else "transformer"
    with pytest.raises(UserError, match=f"is a {part}: leave out --component={other}"):
        convert(src, tmp_path / "new", f"--component={other}")


@pytest.mark.parametrize(
    "name",
    ["lycoris_blocks_0_ffn_0.lokr_w1", "diffusion_model.blocks.0.ffn.0.hada_w1_a", "lora_unet_x.dora_scale"],
)
def test_files_that_are_added_to_a_model_are_named(tmp_path, name):
    file = tmp_path / "style.safetensors"
    save_file({name: np.zeros((4, 4), np.float32)}, file)
    for src in (file, tmp_path):
        assert re.search("is a (LoRA|LyCORIS) and not a whole model: merge it", fails(src, tmp_path))


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (np.float16, "config.json is missing: download it too"),
        (ml_dtypes.float8_e4m3fn, "is of type F8_E4M3; use unquantised weights"),
    ],
)
def test_a_text_encoder_of_comfyui_says_what_it_needs(tmp_path, params, dtype, message):
    tensors = state_dicts.write(params["text_encoder"], table_of("text_encoder", "diffusers"))
    tensors = {name: np.asarray(tensor).astype(dtype) for name, tensor in tensors.items()}
    file = tmp_path / "umt5_xxl.safetensors"
    save_file(tensors | {"spiece_model": np.zeros(9, np.uint8)}, file)
    for src in (file, tmp_path):
        assert re.search(message, fails(src, tmp_path))


def test_quantised_files_of_other_programs_are_named(tmp_path):
    file = tmp_path / "wan2.1-t2v-1.3b-Q4_K_M.gguf"
    file.write_bytes(b"GGUF" + bytes(20))
    for src in (file, tmp_path):
        assert f"{file} is a gguf file" in fails(src, tmp_path)


NOT_WEIGHTS = {
    "gguf": (b"GGUF\3" + bytes(90), "is a gguf file, of quantised weights"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "is a pointer of Git LFS"),
    "page": (b"<!DOCTYPE html><html>" + b"x" * 90, "is a web page and no weights"),
    "zeros": (bytes(5000), "it begins with zeros): download it again"),
    "empty": (b"", "it is empty): download it again"),
}


@pytest.mark.parametrize("kind", NOT_WEIGHTS)
@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.safetensors", "transformer/diffusion_pytorch_model.safetensors"]
)
def test_a_file_that_is_no_weights_is_named_whatever_it_is_called(tmp_path, kind, name):
    content, message = NOT_WEIGHTS[kind]
    for file in (tmp_path / "src" / name, tmp_path / "pth" / "Wan2.1_VAE.pth"):
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
        for src in (file, file.parent):
            error = fails(src, tmp_path)
            assert message in error and str(file) in error and "\n" not in error


def test_a_gguf_in_the_folder_of_a_part_is_named(tmp_path, params):
    src = save(params, tmp_path / "src", "diffusers", ["transformer"])
    weights = src / "transformer" / "diffusion_pytorch_model.safetensors"
    file = weights.rename(weights.with_name("wan2.1-t2v-1.3b-Q4_K_M.GGUF".lower()))
    assert f"{file} is a gguf file" in fails(src, tmp_path)
    save(params, src, "diffusers", ["vae"])  # which alone would look like success
    assert f"{file} is a gguf file" in fails(src, tmp_path)
    assert os.listdir(convert(src, tmp_path / "dst", "--component=vae")) == ["vae"]


@pytest.mark.parametrize("name", ["Wan2.1_VAE.pth", "wan_vae.SAFETENSORS"])
def test_what_a_file_holds_says_how_it_is_read(tmp_path, params, name):
    """Not its suffix, which people change."""
    save_file(state_dicts.write(params["vae"], table_of("vae", "official")), tmp_path / name)
    assert_same(load(convert(tmp_path, tmp_path / "dst") / "vae"), params["vae"])


def test_a_part_that_is_there_twice_is_refused(tmp_path, params):
    src = tmp_path / "src"
    for layout in ("official", "diffusers"):
        save(params, src, layout, ["transformer"])
    first = src / "transformer" / "diffusion_pytorch_model.safetensors"
    error = fails(src, tmp_path)
    assert f"the transformer is there twice, {first} and {src / first.name}: leave one" in error
    (src / first.name).unlink()
    copy = shutil.copy(first, first.with_name("diffusion_pytorch_model.fp16.safetensors"))
    convert(src, tmp_path / "new", "--dry_run")  # The one of the public name.
    first.rename(first.with_name("diffusion_pytorch_model.bf16.safetensors"))
    error = fails(src, tmp_path)
    assert f"{copy} have the same tensors: leave one of them there" in error


def test_an_empty_folder_of_a_part_does_not_hide_official_files(tmp_path, params):
    src = save(params, tmp_path / "src", "official", ["transformer", "vae"])
    (src / "transformer").mkdir()
    assert sorted(os.listdir(convert(src, tmp_path / "dst"))) == ["transformer", "vae"]


@pytest.mark.parametrize("part", SPECS)
def test_the_folder_of_one_part_is_taken(tmp_path, params, part):
    src = save(params, tmp_path / "src", "diffusers", shards=2)
    assert os.listdir(convert(src / part, tmp_path / "dst")) == [part]
    assert_same(load(tmp_path / "dst" / part), params[part])
    other = next(one for one in SPECS if one != part)
    message = f"is a {part}: leave out --component={other}"
    with pytest.raises(UserError, match=message):
        convert(src / part, tmp_path / "new", f"--component={other}")


def test_the_folder_around_a_download_says_where_it_is(tmp_path, params):
    src = save(params, tmp_path / "src" / "Wan2.1-T2V-1.3B", "official", ["transformer"])
    assert f"no Wan2.1 weights in {src.parent}, but in {src}: give --src={src}" in fails(src.parent, tmp_path)


@pytest.mark.parametrize(
    "name",
    ["diffusion_model.blocks.0.ffn.0.diff_b", "blocks.0.ffn.0.diff", "x.query_key_value.matrix_A.0"],
)
def test_differences_to_a_model_are_a_lora(tmp_path, name):
    save_file({name: np.zeros(4, np.float32)}, tmp_path / "style.safetensors")
    assert f"is a LoRA and not a whole model: merge it into its base model first (it has {name})" in fails(
        tmp_path, tmp_path
    )


def test_a_tokenizer_among_the_weights_is_left_out(tmp_path, params):
    """As in ComfyUI's files of the text encoder; in integers, which weights never are."""
    src = save(params, tmp_path / "src", "official", ["text_encoder"])
    file = src / "models_t5_umt5-xxl-enc-bf16.safetensors"
    resave(file, lambda arrays: arrays | {"spiece_model": np.zeros(9, np.uint8)})
    assert_same(load(convert(src, tmp_path / "dst") / "text_encoder"), params["text_encoder"])
    lone = file.rename(src / "umt5_xxl_fp16.safetensors")
    assert_same(load(convert(lone, tmp_path / "new") / "text_encoder"), params["text_encoder"])


def test_a_model_that_shares_few_names_is_not_told_to_bring_its_configuration(tmp_path):
    names = ("proj_out.weight", "proj_out.bias", *(f"transformer_blocks.{i}.norm1.linear" for i in range(9)))
    save_file({name: np.zeros(4, np.float32) for name in names}, tmp_path / "other.safetensors")
    assert "has 11 tensors, of which 2 have names of a Wan2.1 transformer" in fails(tmp_path, tmp_path)


def test_a_configuration_of_more_layers_than_tensors_is_refused_at_once(tmp_path, params):
    src = save(params, tmp_path / "src", "diffusers", ["transformer"])
    where = src / "transformer" / "config.json"
    where.write_text(json.dumps(json.loads(where.read_text()) | {"num_layers": 10**12}))
    assert f"{where} has 1000000000000 layers, " in fails(src, tmp_path)


@pytest.mark.parametrize(
    ("tensors", "fields"),
    [
        (
            {"patch_embedding.weight": (48, 48, 1, 2, 2), "head.head.weight": (192, 48)},
            {"model_type": "ti2v"},
        ),
        ({}, {"model_type": "ti2v"}),
        ({"conv2.weight": (48, 48, 1, 1, 1)}, {}),  # of its VAE, which may have any file name
    ],
)
def test_wan_2_2_of_5b_is_named_whatever_its_folder_is_called(tmp_path, params, tensors, fields):
    src = save(params, tmp_path / "src", "official", ["transformer"])
    (src / "config.json").write_text(json.dumps(CONFIG_JSON["official"]["transformer"] | fields))
    odd = {name: np.zeros(shape, np.float32) for name, shape in tensors.items()}
    resave(src / "diffusion_pytorch_model.safetensors", lambda arrays: arrays | odd)
    assert "Wan2.2 is not supported (48 channels)" in fails(src, tmp_path)


@pytest.mark.parametrize("function", ["_rebuild_tensor_v3", "_rebuild_qtensor"])
def test_types_that_only_torch_has_are_named(tmp_path, function):
    write_pth(tmp_path / "Wan2.1_VAE.pth", f"ctorch._utils\n{function}\n(tR.".encode())
    message = fails(tmp_path, tmp_path)
    assert f"needs torch._utils.{function}, for weights of a type such as float8 or int8: give" in message


def test_an_image_to_video_model_is_recognised_by_its_input_channels(tmp_path, params):
    src = save(params, tmp_path / "src", "official", ["transformer"])
    (src / "config.json").unlink()
    wide = {"patch_embedding.weight": np.zeros((48, 36, 1, 2, 2), np.float32)}
    resave(src / "diffusion_pytorch_model.safetensors", lambda arrays: arrays | wide)
    assert "image-to-video model (36 input channels)" in fails(src, tmp_path)


def test_unknown_files_are_refused(tmp_path):
    nowhere = fails(tmp_path / "nowhere", tmp_path)
    assert "nowhere is not a folder" in nowhere
    assert nowhere.strip().endswith("or a name on the Hugging Face hub, such as Wan-AI/Wan2.1-T2V-1.3B")
    assert "no Wan2.1 weights" in fails(tmp_path, tmp_path)
    save_file({"layer.weight": np.zeros(3, np.float32)}, tmp_path / "diffusion_pytorch_model.safetensors")
    assert "no tensor of a Wan2.1 transformer" in fails(tmp_path, tmp_path)


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_tokenizers_that_do_not_fit_are_refused(tmp_path, params, layout):
    src = save(params, tmp_path / "src", layout, ["text_encoder"])
    folder = src / ("google/umt5-xxl" if layout == "official" else "tokenizer")
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    assert "neither tokenizer.json nor spiece.model" in fails(src, tmp_path)
    folder.rename(src / "elsewhere")
    assert f"{folder} is missing" in fails(src, tmp_path)
    save_tiny_tokenizer(folder, 100)
    assert "they are of different models" in fails(src, tmp_path)


def test_a_disk_without_enough_room_is_refused(tmp_path, params, monkeypatch):
    src = save(params, tmp_path / "src", "official")
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda _: usage)
    assert "has 0 MB free" in fails(src, tmp_path)


@pytest.mark.parametrize("existing", [True, False])
def test_a_disk_that_fills_up_during_a_run(tmp_path, params, existing):
    """A limit on the size of files replaces a full disk: Linux reports both from the same call."""
    src = save(params, tmp_path / "src", "official", ["transformer"])
    dst = tmp_path / "dst"
    if existing:
        dst.mkdir()
        (dst / "mine").write_text("")
    # The journal and every metadata file fit into this limit. The largest array does not.
    program = (
        "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); "
        "runpy.run_module('convert.wan', run_name='__main__')"
    )
    command = [sys.executable, "-c", program, f"--src={src}", f"--dst={dst}"]
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 1 and "error: the disk is full" in failed.stderr, failed.stderr
    assert "Traceback" not in failed.stderr
    assert os.listdir(dst) == ["mine"] if existing else not dst.exists()


def test_a_disk_that_is_full_from_the_start(tmp_path, params, monkeypatch):
    src = save(params, tmp_path / "src", "official", ["transformer"])

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")  # as TensorStore says it

    monkeypatch.setattr(stream.tensorstore, "open", full)
    assert "the disk is full" in fails(src, tmp_path)


def test_a_file_that_shrinks_during_a_run_is_refused(tmp_path, params):
    src = save(params, tmp_path / "src", "official", ["transformer"])
    component = convert_command.open_component(convert_wan.MODEL, src, "transformer", None)
    file = src / "diffusion_pytorch_model.safetensors"
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(UserError, match="became shorter"):
        convert_command.convert(component, tmp_path / "dst")


# .pth files. The files of torch.save itself are tested in convert_parity_test.py.


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def write_pth(path, content: bytes, **entries):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        for name, data in entries.items():
            archive.writestr(f"archive/{name}", data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"conv1.weight": Evil()}), "needs posix.system, and code of a file is never run"),
        (pickle.dumps({"conv1.weight": pytest.approx}), "needs _pytest"),
        (b"cbuiltins\neval\n(V1\ntR.", "needs builtins.eval"),
        (pickle.dumps([1, 2]), "is not a plain state dict but of type list"),
        (pickle.dumps({}), "is not a plain state dict but an empty dict"),
        (pickle.dumps({"model": {"a": 1}, "optimizer": {}, "epoch": 3}), "its entry model is a dict with"),
        (pickle.dumps({"state_dict": {"a": 1}}), "its entry a is of type int"),
        (pickle.dumps({3: "a"}), "its entry of type int is of type str"),
        (pickle.dumps({"a": 1})[:-4], "its pickle does not load"),
        (b"", "its pickle does not load"),
    ],
)
def test_pickles_that_are_not_a_state_dict_are_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    write_pth(tmp_path / "Wan2.1_VAE.pth", content)
    error = fails(tmp_path, tmp_path)
    assert message in error and str(tmp_path / "Wan2.1_VAE.pth") in error and "\n" not in error
    assert not (tmp_path / "evil").exists()


def test_files_that_are_not_an_archive_of_torch_are_refused(tmp_path):
    path = tmp_path / "Wan2.1_VAE.pth"
    path.write_bytes(pickle.dumps({"a": 1}))
    assert "is not a zip archive of torch.save" in fails(tmp_path, tmp_path)
    write_pth(path, pickle.dumps({"a": 1}))
    path.write_bytes(path.read_bytes()[:-5])
    assert "cut short or damaged" in fails(tmp_path, tmp_path)
    write_pth(path, pickle.dumps({"a": 1}), **{"code/model.py": b"pass"})
    assert "not a state dict of torch.save" in fails(tmp_path, tmp_path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "not a state dict of torch.save" in fails(tmp_path, tmp_path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}))
    assert "compressed or encrypted" in fails(tmp_path, tmp_path)
    write_pth(path, pickle.dumps({"a": 1}), byteorder=b"big")
    assert "big-endian" in fails(tmp_path, tmp_path)


# Size.


def write_large(file, table, kind: str) -> int:
    """Writes random numbers under the names of a table. Returns the bytes of the largest tensor."""
    dtype = np.dtype({"F32": np.float32, "BF16": ml_dtypes.bfloat16}[kind])
    size = dtype.itemsize
    header, end, largest = {}, 0, 0
    for name, shape in lv.tensor_shapes(table).items():
        nbytes = int(np.prod(shape)) * size
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + nbytes]}
        end, largest = end + nbytes, max(largest, nbytes)
    block = np.random.default_rng(0).standard_normal(1 << 22, np.float32).astype(dtype).tobytes()
    with open(file, "wb") as out:
        out.write(with_header(header, b""))
        for start in range(0, end, len(block)):
            out.write(block[: end - start])
    return largest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "kind", "spec"),
    [
        ("transformer", "F32", dict(module="wan", variant="1.3b", num_layers=10)),
        ("transformer", "F32", dict(module="wan", variant="14b", num_layers=1)),
        ("text_encoder", "BF16", dict(module="t5", variant="umt5-xxl", num_layers=2)),
    ],
)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_peak_memory_at_the_widths_of_the_public_models(tmp_path, part, kind, spec, dtype):
    """Peak memory at full width with some layers. Prints the throughput, which depends on the machine."""
    table = convert_wan.PARTS[part].leaves(models.build(spec).config, "official")
    src, dst = tmp_path / "src", tmp_path / "dst"
    src.mkdir()
    largest = write_large(src / f"{OFFICIAL[part]}.safetensors", table, kind)
    # The program reads its own peak: that of wait4 counts the memory of the test, which forked it.
    program = (
        "import sys; from convert import command, wan; command._tokenizer = lambda *_: [];"
        "wan.main(sys.argv[1:]);"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    (src / "google" / "umt5-xxl").mkdir(parents=True)
    command = [sys.executable, "-c", program, f"--src={src}", f"--dst={dst}", f"--component={part}"]
    start = time.monotonic()
    command += [f"--dtype={dtype}"] if dtype else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    assert status == 0
    shutil.rmtree(dst)
    start = time.monotonic()
    shutil.copytree(src, dst)
    copy = time.monotonic() - start
    shutil.rmtree(dst)
    size = sum(file.stat().st_size for file in src.iterdir() if file.is_file()) / 1e6
    shutil.rmtree(src)
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", output)[1])
    processor = usage.ru_utime + usage.ru_stime
    print(
        f"{part} {kind} to {dtype}: {size:.0f} MB, largest tensor {largest / 1e6:.0f} MB; "
        f"peak memory {peak / 1e6:.0f} MB; with imports {seconds:.1f} s = {size / seconds:.0f} MB/s, "
        f"{processor:.1f} s of processor = {size / processor:.0f} MB/s, a copy {copy:.1f} s"
    )
    assert peak <= 2.5 * largest + 500e6
