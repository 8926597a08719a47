"""Export to PyTorch files: exact round trips from both stored forms, the names of the branch, bad input."""

import dataclasses
import json
import pathlib
import re
import resource
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file

from convert import export as convert_export
from convert import leaves as lv
from convert import t5 as convert_t5
from convert import wan as convert_wan
from prophy_jax import models
from prophy_jax.run import checkpoints
from prophy_jax.run.errors import UserError
from tests import state_dicts
from tests.tiny_tokenizer import save_tiny_tokenizer

ROOT = pathlib.Path(__file__).parent.parent
SPECS = {
    "transformer": dict(module="wan", dim=24, num_heads=2, num_layers=3, ffn_dim=32, freq_dim=16),
    "vae": dict(module="wan_vae", base_dim=4),
    "text_encoder": dict(
        module="t5", vocab_size=99, d_model=24, d_kv=8, d_ff=40, num_layers=3, num_heads=2, shared_bias=False
    ),
}
BRANCH = dict(
    module="prophy",
    layers=[0, 2],
    semantic=dict(basis_grid=[2, 4, 6], experts=5, hidden=12),
    refinement=dict(experts=3, top_k=2, categories=7, align_hidden=6),
)
NAMINGS = ("diffusers", "official")
BF16 = np.dtype(ml_dtypes.bfloat16)


def random(rng, shape, dtype=np.float32):
    return rng.standard_normal(shape, np.float32).astype(dtype)


def table(part: str, naming: str, spec=None):
    leaves = {
        "transformer": convert_wan.dit_leaves,
        "vae": convert_wan.vae_leaves,
        "text_encoder": convert_t5.leaves,
    }
    return leaves[part](models.build(spec or SPECS[part]).config, naming)


def random_tensors(part: str, naming: str, dtype=np.float32, spec=None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = lv.tensor_shapes(table(part, naming, spec))
    return {name: random(rng, shape, dtype) for name, shape in shapes.items()}


def save(folder, part: str, tree, spec=None, **about):
    """Writes a part as `convert.wan` and `prophy_jax.train` do."""
    checkpoints.save_params(str(folder), tree, {"part": part, "model": spec or SPECS[part], **about})


def save_in_chunks(folder, part: str, tree):
    """Writes one plain file per chunk, with several chunks along every axis."""
    save(folder, part, tree)
    shutil.rmtree(folder / "tree")
    arguments = ocp.args.PyTreeSave(
        tree, save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=4000), tree)
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(folder / "tree", args=arguments)


def save_random(folder, part: str, naming="official", dtype=np.float32):
    save(folder, part, state_dicts.read(random_tensors(part, naming, dtype), table(part, naming)))


def random_branch(spec=BRANCH):
    """Random values for every parameter, also for those that start at zero."""
    backbone, part = models.build(SPECS["transformer"]), models.build({"module": "prophy"} | spec)
    frozen = jax.eval_shape(backbone.init, jax.random.key(0))
    shapes = jax.eval_shape(
        lambda key, frozen: part.init(key, backbone, {"backbone": frozen}), jax.random.key(0), frozen
    )
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: random(rng, leaf.shape), shapes)


def save_branch(folder, spec=BRANCH, **about):
    tree = random_branch(spec)
    save(folder, "branch", tree, {"backbone": SPECS["transformer"], "branch": spec}, **about)
    return tree


def load_all(folder, stem: str) -> dict[str, np.ndarray]:
    tensors = {}
    for file in sorted(folder.glob(f"{stem}*.safetensors")):
        part = load_file(file)
        assert not tensors.keys() & part.keys()
        tensors |= part
    return tensors


def assert_same(got, want):
    """Equal names, dtypes, shapes and bits."""
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype and got[name].shape == want[name].shape, name
        assert got[name].tobytes() == want[name].tobytes(), name


# --- Round trips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16], ids=str)
@pytest.mark.parametrize("write", [save, save_in_chunks])
@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_round_trips_of_tensors_are_exact(tmp_path, part, naming, write, dtype):
    tensors = random_tensors(part, naming, dtype)
    write(tmp_path / "ours", part, state_dicts.read(tensors, table(part, naming)))
    convert_export.export(str(tmp_path / "ours"), naming, str(tmp_path / "out"))
    stem = convert_export.STEMS[naming][part]
    assert_same(load_all(tmp_path / "out", stem), tensors)
    assert (tmp_path / "out" / f"{stem}.safetensors").exists()


@pytest.mark.parametrize("naming", NAMINGS)
def test_round_trips_of_the_vae_are_exact(tmp_path, naming):
    tensors = random_tensors("vae", naming)
    save(tmp_path / "vae", "vae", state_dicts.read(tensors, table("vae", naming)))
    convert_export.export(str(tmp_path / "vae"), naming, str(tmp_path / "out"))
    assert_same(load_all(tmp_path / "out", convert_export.STEMS[naming]["vae"]), tensors)


@pytest.mark.parametrize(
    ("part", "naming"),
    [("transformer", "official"), ("transformer", "diffusers"), ("text_encoder", "diffusers")],
)
def test_shards_and_their_index(tmp_path, part, naming):
    tensors = random_tensors(part, naming, BF16)
    save(tmp_path / part, part, state_dicts.read(tensors, table(part, naming)))
    limit = 6000
    convert_export.export(str(tmp_path / part), naming, str(tmp_path / "out"), shard_bytes=limit)
    stem = convert_export.STEMS[naming][part]
    assert_same(load_all(tmp_path / "out", stem), tensors)
    index = json.loads((tmp_path / "out" / f"{stem}.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    files = sorted((tmp_path / "out").glob(f"{stem}-*.safetensors"))
    assert len(files) > 2 and files[1].name.endswith(f"-00002-of-{len(files):05d}.safetensors")
    for file in files:
        shard = load_file(file)
        assert sum(tensor.nbytes for tensor in shard.values()) <= limit or len(shard) == 1
        assert {name for name, place in index["weight_map"].items() if place == file.name} == shard.keys()


def test_trees_of_two_dtypes_are_written_aligned(tmp_path):
    tensors = random_tensors("transformer", "diffusers")
    for name in tensors:
        if "norm" in name:
            tensors[name] = tensors[name].astype(BF16)
    # A width of 24 leaves every offset even: seven numbers of two bytes would shift all that follow.
    shapes = {"a": ((7,), BF16), "b": ((3, 2), np.dtype(np.float32))}
    values = {name: random(np.random.default_rng(2), *spec) for name, spec in shapes.items()}
    file = tmp_path / "two.safetensors"
    convert_export._write_safetensors(file, shapes, iter(values.items()), {"format": "pt"})
    assert_same(load_file(file), values)
    header = json.loads(file.read_bytes()[8:].split(b"}}")[0] + b"}}")
    assert header["b"]["data_offsets"][0] % 4 == 0

    save(tmp_path / "ours", "transformer", state_dicts.read(tensors, table("transformer", "diffusers")))
    convert_export.export(str(tmp_path / "ours"), "diffusers", str(tmp_path / "out"))
    assert_same(load_all(tmp_path / "out", "transformer/diffusion_pytorch_model"), tensors)


def test_a_complete_folder_makes_a_complete_pipeline(tmp_path, capsys):
    for part in SPECS:
        save_random(tmp_path / "ours" / part, part)
    tokenizer = tmp_path / "ours" / "text_encoder" / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "spiece.model").write_bytes(b"pieces")
    convert_export.main(
        [f"--checkpoint={tmp_path / 'ours'}", "--format=diffusers", f"--dst={tmp_path / 'd'}"]
    )
    files = sorted(str(path.relative_to(tmp_path / "d")) for path in (tmp_path / "d").rglob("*.*"))
    assert files == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/spiece.model",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    printed = capsys.readouterr().out
    for part in SPECS:
        assert f"{part}: " in printed
    with safe_open(tmp_path / "d" / "vae" / "diffusion_pytorch_model.safetensors", "numpy") as file:
        manifest = json.loads((tmp_path / "ours" / "vae" / "manifest.json").read_text())
        assert file.metadata() == {"format": "pt", "tree_sha256": manifest["sha256"]}

    written = convert_export.export(str(tmp_path / "ours"), "official", str(tmp_path / "o"))
    assert sorted(str(path.relative_to(tmp_path / "o")) for path in written) == [
        "Wan2.1_VAE.safetensors",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "google/umt5-xxl/spiece.model",
        "models_t5_umt5-xxl-enc-bf16.safetensors",
    ]
    assert json.loads((tmp_path / "o" / "config.json").read_text()) == {
        "_class_name": "WanModel",
        "_diffusers_version": "0.33.0",
        "dim": 24,
        "eps": 1e-6,
        "ffn_dim": 32,
        "freq_dim": 16,
        "in_dim": 16,
        "model_type": "t2v",
        "num_heads": 2,
        "num_layers": 3,
        "out_dim": 16,
        "text_len": 512,
    }


def test_round_trips_of_the_commands_are_exact(tmp_path):
    """Ours -> diffusers -> ours -> official -> ours -> diffusers: the same bits and the same files."""
    specs = {**SPECS, "text_encoder": {**SPECS["text_encoder"], "vocab_size": 250}}  # as the tokenizer
    for part, spec in specs.items():
        dtype = BF16 if part == "text_encoder" else np.float32
        tensors = random_tensors(part, "official", dtype, spec)
        save(tmp_path / "ours" / part, part, state_dicts.read(tensors, table(part, "official", spec)), spec)
    save_tiny_tokenizer(tmp_path / "ours" / "text_encoder" / "tokenizer")

    def export_and_convert(source, naming: str):
        files, ours = tmp_path / naming, tmp_path / f"{naming}_ours"
        convert_export.main([f"--checkpoint={source}", f"--format={naming}", f"--dst={files}"])
        convert_wan.main([f"--src={files}", f"--dst={ours}"])
        for part in specs:
            hashes = [json.loads((f / part / "manifest.json").read_text())["sha256"] for f in (ours, source)]
            assert hashes[0] == hashes[1], (naming, part)
        return ours

    ours = export_and_convert(tmp_path / "ours", "diffusers")
    ours = export_and_convert(ours, "official")
    first, last = tmp_path / "diffusers", tmp_path / "last"
    convert_export.export(str(ours), "diffusers", str(last))
    files = sorted(path.relative_to(first) for path in first.rglob("*.*"))
    assert files == sorted(path.relative_to(last) for path in last.rglob("*.*"))
    for file in files:
        assert (first / file).read_bytes() == (last / file).read_bytes(), file


def test_some_components_make_no_pipeline(tmp_path):
    save_random(tmp_path / "ours" / "vae", "vae")
    convert_export.export(str(tmp_path / "ours"), "diffusers", str(tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["vae"]


# --- The branch ------------------------------------------------------------------------------------


def branch_pattern(name: str) -> str:
    return re.sub(r"^(blocks|exits)\.\d+\.", r"\1.<i>.", name)


def test_branch_layouts_and_metadata(tmp_path):
    tree = save_branch(tmp_path / "branch", backbone_sha256="of the frozen backbone")
    convert_export.export(str(tmp_path / "branch"), "diffusers", str(tmp_path / "out"))
    file = tmp_path / "out" / "prophy_branch.safetensors"
    tensors = load_file(file)
    assert sum(tensor.size for tensor in tensors.values()) == sum(leaf.size for leaf in jax.tree.leaves(tree))
    expected = {
        "blocks.1.attn1.to_q.weight": tree["blocks"]["self_attn"]["q"]["kernel"][1].T,
        "blocks.0.norm2.weight": tree["blocks"]["cross_norm"]["scale"][0],
        "blocks.1.scale_shift_table": tree["blocks"]["modulation"][1][None],
        "exits.1.weight": tree["exits"]["kernel"][1].T,
        "exits.0.bias": tree["exits"]["bias"][0],
        "semantic.router.hidden.weight": tree["semantic"]["router"]["hidden"]["kernel"].T,
        "semantic.router.logits.bias": tree["semantic"]["router"]["logits"]["bias"],
        "semantic.basis": np.moveaxis(tree["semantic"]["basis"], -1, 1),
        "refinement.router.weight": tree["refinement"]["router"]["kernel"].T,
        "refinement.experts.weight": tree["refinement"]["kernel"].swapaxes(1, 2),
        "refinement.experts.bias": tree["refinement"]["bias"],
        "refinement.align_hidden.weight": tree["refinement"]["align_hidden"]["kernel"].T,
        "refinement.align.bias": tree["refinement"]["align"]["bias"],
    }
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)

    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    manifest = json.loads((tmp_path / "branch" / "manifest.json").read_text())
    assert metadata.pop("tree_sha256") == manifest["sha256"]
    config = json.loads(metadata.pop("branch"))
    assert config == json.loads(json.dumps(dataclasses.asdict(models.build(BRANCH))))
    assert config["semantic"]["basis_space"] == "latent"  # a default of ours, written out
    assert metadata == {"format": "pt", "names": "diffusers", "backbone_sha256": "of the frozen backbone"}


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("space", ["latent", "token"])
def test_the_documented_keys_are_those_of_the_file(tmp_path, naming, space):
    semantic = {**BRANCH["semantic"], "basis_space": space}
    save_branch(tmp_path / "branch", {**BRANCH, "semantic": semantic})
    convert_export.export(str(tmp_path / "branch"), naming, str(tmp_path / "out"))
    tensors = load_file(tmp_path / "out" / "prophy_branch.safetensors")
    layers = lv.tensor_shapes(table("transformer", naming))
    for i in range(2):  # blocks are copies: the names of a transformer's own
        own = {name.split(".", 2)[2] for name in layers if name.startswith("blocks.0.")}
        assert {n.split(".", 2)[2] for n in tensors if n.startswith(f"blocks.{i}.")} == own
    others = {branch_pattern(name) for name in tensors if not name.startswith("blocks.")}
    listed = set(
        re.findall(r"^\| `([\w<>]+\.[\w.<>]+)` \|", (ROOT / "docs" / "pytorch.md").read_text(), re.MULTILINE)
    )
    assert listed - {"blocks.<i>.<name>"} == others
    assert tensors["semantic.basis"].shape == ((5, 16, 2, 4, 6) if space == "latent" else (5, 48, 24))


@pytest.mark.parametrize("absent", [["semantic"], ["refinement"], ["semantic", "refinement"]])
def test_parts_that_a_branch_lacks_have_no_keys(tmp_path, absent):
    spec = {**BRANCH, **dict.fromkeys(absent)}
    del spec["module"]  # as older versions wrote it
    save_branch(tmp_path / "branch", spec)
    convert_export.export(str(tmp_path / "branch"), "official", str(tmp_path / "out"))
    tops = {name.split(".")[0] for name in load_file(tmp_path / "out" / "prophy_branch.safetensors")}
    assert tops == {"blocks", "exits", "semantic", "refinement"} - set(absent)


def test_the_workdir_of_a_run_that_trained_the_backbone_too(tmp_path):
    save_branch(tmp_path / "run" / "branch", backbone_sha256="of the first backbone")
    tensors = random_tensors("transformer", "diffusers")
    tree = state_dicts.read(tensors, table("transformer", "diffusers"))
    save(tmp_path / "run" / "backbone", "backbone", tree, SPECS["transformer"])
    (tmp_path / "run" / "checkpoints").mkdir()
    for source in ("run", "run/branch"):
        out = tmp_path / source.replace("/", "_").replace("run", "out")
        convert_export.export(str(tmp_path / source), "diffusers", str(out))
        with safe_open(out / "prophy_branch.safetensors", "numpy") as file:
            assert file.metadata()["backbone_sha256"] == checkpoints.tree_hash(tree)
    assert_same(load_all(tmp_path / "out", "transformer/diffusion_pytorch_model"), tensors)
    assert not (tmp_path / "out_branch" / "transformer").exists()


# --- Bad input -------------------------------------------------------------------------------------


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("checksum", None)  # or it would be refused for that
    for key, value in changes.items():
        manifest[key] = value
        if value is None:
            del manifest[key]
    path.write_text(json.dumps(manifest))


def missing(root):
    return root / "nowhere"


def empty(root):
    (root / "empty").mkdir()
    return root / "empty"


def unfinished_run(root):
    (root / "run" / "checkpoints" / "3").mkdir(parents=True)
    (root / "run" / "config.json").write_text("{}")
    return root / "run"


def half_written(root):
    save_random(root / "vae", "vae")
    (root / "vae" / "manifest.json").unlink()
    return root


def cut_off_conversion(root):
    save_random(root / "vae", "vae")
    (root / "transformer.partial").mkdir()
    return root


def without_tree(root):
    save_random(root / "vae", "vae")
    shutil.rmtree(root / "vae" / "tree")
    return root


def without_an_array(root):
    tree = state_dicts.read(random_tensors("transformer", "official"), table("transformer", "official"))
    save_in_chunks(root / "transformer", "transformer", tree)
    shutil.rmtree(root / "transformer" / "tree" / "head.out.bias")
    return root


def torn_manifest(root):
    save_random(root / "vae", "vae")
    (root / "vae" / "manifest.json").write_text('{"part": "vae",')
    return root


def manifest_of_other_sizes(root):
    save_random(root / "transformer", "transformer")
    edit_manifest(root / "transformer", model={**SPECS["transformer"], "ffn_dim": 48})
    return root


def tree_of_another_manifest(root):
    save_random(root / "transformer", "transformer")
    save_random(root / "vae", "vae")
    shutil.copy(root / "transformer" / "manifest.json", root / "vae" / "manifest.json")
    return root / "vae"


def flipped_bit(root):
    tree = state_dicts.read(random_tensors("vae", "official"), table("vae", "official"))
    save(root / "vae", "vae", tree)
    wanted = checkpoints.read_manifest(str(root / "vae"), "")["sha256"]
    flatten_dict(tree, sep="/")["quant_conv/bias"].view(np.uint32)[3] ^= 1
    save(root / "vae", "vae", tree)
    edit_manifest(root / "vae", sha256=wanted)
    return root


def damaged_chunk(root):
    tree = state_dicts.read(random_tensors("transformer", "official"), table("transformer", "official"))
    save_in_chunks(root / "transformer", "transformer", tree)
    (root / "transformer" / "tree" / "embed.text_out.kernel" / "0.0").write_bytes(b"no zstd frame")
    return root


def older_branch(root):
    save_branch(root / "branch")
    edit_manifest(root / "branch", model=None)
    return root


def a_weight_of_nan(root):
    tensors = random_tensors("transformer", "official")
    tensors["blocks.1.ffn.0.bias"][3] = np.nan
    save(root / "transformer", "transformer", state_dicts.read(tensors, table("transformer", "official")))
    return root


def metadata_of_nothing(root):
    save_random(root / "vae", "vae")
    (root / "vae" / "tree" / "_METADATA").write_text("{}")
    return root


def list_for_a_manifest(root):
    save_random(root / "vae", "vae")
    (root / "vae" / "manifest.json").write_text("[]")
    return root


def another_part(root):
    save_random(root / "vae", "vae")
    edit_manifest(root / "vae", part="optimizer")
    return root


def another_backbone(root):
    save_branch(root / "branch")
    edit_manifest(root / "branch", model={"backbone": {"module": "cogvideox"}, "branch": BRANCH})
    return root


def integers(root):
    tree = state_dicts.read(random_tensors("text_encoder", "official"), table("text_encoder", "official"))
    save(root / "text_encoder", "text_encoder", jax.tree.map(lambda x: x.astype(np.int32), tree))
    return root


def transformer_and_backbone(root):
    save_random(root / "transformer", "transformer")
    shutil.copytree(root / "transformer", root / "backbone")
    return root


def t5_v1_1(root):
    spec = {**SPECS["text_encoder"], "shared_bias": True}
    tensors = random_tensors("text_encoder", "diffusers", spec=spec)
    save(
        root / "text_encoder",
        "text_encoder",
        state_dicts.read(tensors, table("text_encoder", "diffusers", spec)),
        spec,
    )
    return root


def narrow_text(root):
    spec = {**SPECS["transformer"], "text_dim": 8}
    tensors = random_tensors("transformer", "official", spec=spec)
    tree = state_dicts.read(tensors, table("transformer", "official", spec))
    save(root / "transformer", "transformer", tree, spec)
    return root


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (missing, "no folder .*nowhere"),
        (empty, "nothing to export in .*empty"),
        (unfinished_run, "no checkpoint at .*run/checkpoints/3: name another folder"),
        (half_written, "vae is not complete"),
        (cut_off_conversion, "transformer.partial is not finished"),
        (without_tree, "no .*_METADATA.*convert or train again"),
        (without_an_array, "tree is not readable .*head.out.bias.*not complete"),
        (torn_manifest, "manifest.json is not a readable"),
        (manifest_of_other_sizes, r"\(3, 24, 32\).*\(3, 24, 48\)"),
        (tree_of_another_manifest, "does not fit its manifest: blocks/cross_attn/k/bias is missing"),
        (flipped_bit, "values are not those of its manifest"),
        (damaged_chunk, "embed/text_out/kernel is damaged"),
        (older_branch, 'branch/manifest.json has no "model"'),
        (a_weight_of_nan, "transformer/tree: blocks/ffn/up/bias holds NaN or infinity"),
        (metadata_of_nothing, "_METADATA is damaged"),
        (list_for_a_manifest, "vae/manifest.json is not a JSON object"),
        (another_part, "holds 'optimizer'"),
        (another_backbone, "model 'cogvideox'"),
        (integers, r"values of \['int32'\]"),
        (transformer_and_backbone, "a transformer and a backbone"),
        (narrow_text, "text_dim 8, .*4096: use --format=diffusers"),
        (t5_v1_1, "T5 v1.1.*--format=diffusers"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, make, words):
    checkpoint = make(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        convert_export.main([f"--checkpoint={checkpoint}", "--format=official", f"--dst={tmp_path / 'out'}"])
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--checkpoint=a", "--format=onnx", "--dst=b"], "invalid choice: 'onnx'"),
        (["--checkpoint=a", "--format=official"], "required: --dst"),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    with pytest.raises(UserError, match=words):
        convert_export.main(arguments)


def test_the_command_fails_in_one_line(tmp_path):
    command = [sys.executable, "-m", "convert.export", "--checkpoint=nowhere", "--format=official"]
    done = subprocess.run([*command, f"--dst={tmp_path / 'out'}"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: no folder nowhere: name one with --checkpoint=DIR\n"


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_an_existing_destination_is_not_changed(tmp_path, kind):
    save_random(tmp_path / "vae", "vae")
    out = tmp_path / "out"
    make = {"file": out.touch, "folder": out.mkdir, "dangling link": lambda: out.symlink_to("nowhere")}
    make[kind]()

    def state():  # without the time of the last reading, which listing a folder changes
        found = out.lstat()
        return found.st_ino, found.st_size, found.st_mtime_ns

    before = state()
    with pytest.raises(UserError, match="out exists"):
        convert_export.export(str(tmp_path / "vae"), "official", str(out))
    assert state() == before


def test_a_disk_that_fills_up_during_an_export(tmp_path):
    save_random(tmp_path / "vae", "vae")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the system then refuses to write more
    try:
        with pytest.raises(UserError, match="cannot write .*too large"):
            convert_export.export(str(tmp_path / "vae"), "official", str(tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("out*"))


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    save_random(tmp_path / "vae", "vae")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="the disk has 0.0 GB left"):
        convert_export.export(str(tmp_path / "vae"), "official", str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_the_files_of_a_killed_export_are_replaced(tmp_path):
    save_random(tmp_path / "vae", "vae")
    (tmp_path / "out.writing").mkdir()
    (tmp_path / "out.writing" / "transformer").touch()
    convert_export.export(str(tmp_path / "vae"), "official", str(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["Wan2.1_VAE.safetensors"]
    assert not (tmp_path / "out.writing").exists()
