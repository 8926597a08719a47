"""`convert.cogvideox`: key tables, both layouts on files, exactness, interruption, and bad input."""

import functools
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import types
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import cogvideox as convert_cogvideox
from convert import command, stream
from convert import export as convert_export
from convert import leaves as lv
from convert import t5 as convert_t5
from prophy_jax import models
from prophy_jax.models import cogvideox
from prophy_jax.models.codecs import cogvideox_vae
from prophy_jax.models.text import t5
from prophy_jax.run import checkpoints
from prophy_jax.run.errors import UserError
from tests import state_dicts
from tests.convert_files_test import assert_same, contents, load
from tests.tiny_tokenizer import save_tiny_tokenizer

NAMINGS = ("diffusers", "sat")
BF16 = np.dtype(ml_dtypes.bfloat16)
SIZES = dict(dim=48, num_heads=3, num_layers=3, ffn_dim=192, text_dim=24, text_len=226, time_dim=20)
TRANSFORMERS = {  # heads of 16
    "2b": dict(SIZES, positions="sincos"),
    "5b": dict(SIZES, positions="rope_crop"),
    "1.5": dict(SIZES, positions="rope_slice", patch_size=[2, 2, 2]),
}
SPECS = {
    "transformer": dict(module="cogvideox", **TRANSFORMERS["5b"]),
    "vae": dict(
        module="cogvideox_vae", block_out_channels=[32, 32, 64], layers_per_block=2, latent_channels=5
    ),
    "text_encoder": dict(
        module="t5", vocab_size=256, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, shared_bias=True
    ),
}
SAT_TRANSFORMER = "transformer/1000/mp_rank_00_model_states.pt"


def spec_of(part: str, variant: str = "5b"):
    if part == "transformer":
        return dict(module="cogvideox", **TRANSFORMERS[variant])
    scaling = {"scaling_factor": 1.15258426 if variant == "2b" else 0.7} if part == "vae" else {}
    return SPECS[part] | scaling


def table_of(part: str, naming: str, variant: str = "5b"):
    return convert_cogvideox.PARTS[part].leaves(models.build(spec_of(part, variant)).config, naming)


@functools.cache
def random_tensors(part: str, variant: str = "5b") -> types.MappingProxyType:
    """Under the names of diffusers: the text encoder in bfloat16, the others in float32."""
    rng = np.random.default_rng(0)
    dtype = BF16 if part == "text_encoder" else np.float32
    shapes = lv.tensor_shapes(table_of(part, "diffusers", variant))
    return types.MappingProxyType(
        {name: rng.standard_normal(shape, np.float32).astype(dtype) for name, shape in shapes.items()}
    )


def random_tree(part: str, variant: str = "5b"):
    return state_dicts.read(random_tensors(part, variant), table_of(part, "diffusers", variant))


# SAT's files. They are made of diffusers' tensors without the tables that are tested.

_SAT_BLOCK = {
    "attn1.norm_q": "mixins.adaln_layer.query_layernorm_list.{}",
    "attn1.norm_k": "mixins.adaln_layer.key_layernorm_list.{}",
    "attn1.to_out.0": "transformer.layers.{}.attention.dense",
    "norm1.norm": "transformer.layers.{}.input_layernorm",
    "norm2.norm": "transformer.layers.{}.post_attention_layernorm",
    "ff.net.0.proj": "transformer.layers.{}.mlp.dense_h_to_4h",
    "ff.net.2": "transformer.layers.{}.mlp.dense_4h_to_h",
}
_SAT_TOP = {
    "patch_embed.proj": "mixins.patch_embed.proj",
    "patch_embed.text_proj": "mixins.patch_embed.text_proj",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "norm_final": "transformer.final_layernorm",
    "norm_out.norm": "mixins.final_layer.norm_final",
    "norm_out.linear": "mixins.final_layer.adaLN_modulation.1",
    "proj_out": "mixins.final_layer.linear",
}


def to_sat(tensors) -> dict[str, np.ndarray]:
    """The tensors of a transformer as SAT has them."""
    sat, rest = {}, dict(tensors)
    for kind in ("weight", "bias"):
        for i in range(SIZES["num_layers"]):
            block = f"transformer_blocks.{i}"
            qkv = [rest.pop(f"{block}.attn1.to_{x}.{kind}") for x in "qkv"]
            sat[f"transformer.layers.{i}.attention.query_key_value.{kind}"] = np.concatenate(qkv)
            six = [np.split(rest.pop(f"{block}.{norm}.linear.{kind}"), 6) for norm in ("norm1", "norm2")]
            # Video: shift, scale, gate of attention, then of the MLP; then the same for the text.
            chunks = six[0][:3] + six[1][:3] + six[0][3:] + six[1][3:]
            sat[f"mixins.adaln_layer.adaLN_modulations.{i}.1.{kind}"] = np.concatenate(chunks)
    for name, tensor in rest.items():
        module, _, kind = name.rpartition(".")
        block = re.match(r"transformer_blocks\.(\d+)\.(.*)", module)
        ours = _SAT_BLOCK[block[2]].format(block[1]) if block else _SAT_TOP[module]
        sat[f"{ours}.{kind}"] = tensor
    return {f"model.diffusion_model.{name}": tensor for name, tensor in sat.items()}


def vae_to_sat(tensors) -> dict[str, np.ndarray]:
    sat = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if "up_blocks" in parts:
            parts[2] = str(2 - int(parts[2]))  # of three stages
        name = ".".join(parts)
        for theirs, ours in [
            ("down_blocks.", "down."),
            ("up_blocks.", "up."),
            ("mid_block.resnets.0", "mid.block_1"),
            ("mid_block.resnets.1", "mid.block_2"),
            ("resnets.", "block."),
            ("downsamplers.0.", "downsample."),
            ("upsamplers.0.", "upsample."),
            ("conv_shortcut", "nin_shortcut"),
        ]:
            name = name.replace(theirs, ours)
        sat[name] = tensor
    return sat


class _Pickled:
    """What torch.save writes for a tensor: the name of a function and a reference to the bytes."""

    def __init__(self, function: str, *arguments):
        self.function, self.arguments = function, arguments


class _Pickler(pickle._Pickler):
    """A pickler of protocol 2 that writes functions and storages by name, since torch may be absent."""

    def persistent_id(self, value):
        return value.arguments if isinstance(value, _Pickled) and value.function == "storage" else None

    def save_global(self, value, name=None):
        if isinstance(value, str):
            module, _, name = value.rpartition(".")
            self.write(f"c{module}\n{name}\n".encode())
        else:
            super().save_global(value, name)

    def save(self, value, save_persistent_id=True):
        if isinstance(value, _Global):
            return self.save_global(value.name)
        if isinstance(value, _Pickled) and value.function != "storage":
            self.save_global(value.function)
            self.save(value.arguments)
            self.write(pickle.REDUCE)
            return None
        return super().save(value, save_persistent_id)


class _Global:
    def __init__(self, name: str):
        self.name = name


def save_pt(path, content, wrap=lambda tensors: tensors) -> None:
    """Writes the file that torch.save(wrap(content)) writes, without torch. `content` is a dict of arrays."""
    kinds = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}
    kinds["int64"] = "LongStorage"
    tensors = {}
    for i, (name, array) in enumerate(content.items()):
        kind = _Global(f"torch.{kinds[array.dtype.name]}")
        storage = _Pickled("storage", "storage", kind, str(i), "cpu", array.size)
        strides = tuple(int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim))
        tensor = (storage, 0, array.shape, strides, False, {})
        tensors[name] = _Pickled("torch._utils._rebuild_tensor_v2", *tensor)
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("states/data.pkl", "w") as file:
            _Pickler(file, 2).dump(wrap(tensors))
        for i, array in enumerate(content.values()):
            archive.writestr(f"states/data/{i}", np.ascontiguousarray(array).tobytes())


def unused(variant: str) -> dict[str, np.ndarray]:
    """What SAT's file of a transformer has next to the weights."""
    zeros = functools.partial(np.zeros, dtype=np.float32)
    names = {
        "transformer.word_embeddings.weight": zeros((1, 48)),
        "transformer.position_embeddings.weight": zeros(3),
    }
    if variant == "2b":
        names["mixins.pos_embed.pos_embedding"] = zeros((1, 400, 48))
    if variant == "5b":
        names |= {"mixins.pos_embed.freqs_sin": zeros((4, 16)), "mixins.pos_embed.freqs_cos": zeros((4, 16))}
    return {f"model.diffusion_model.{name}": tensor for name, tensor in names.items()}


LOSS = {
    "loss.logvar": np.zeros((), np.float32),
    "loss.discriminator.main.1.num_batches_tracked": np.array(7, np.int64),
}


def save_sat(folder, parts=tuple(SPECS), variant: str = "5b"):
    if "transformer" in parts:
        sat = to_sat(random_tensors("transformer", variant)) | unused(variant)
        save_pt(folder / SAT_TRANSFORMER, sat, lambda tensors: {"module": tensors})
        (folder / "transformer" / "latest").write_text("1000")
    if "vae" in parts:
        sat = vae_to_sat(random_tensors("vae")) | LOSS
        save_pt(folder / "vae" / "3d-vae.pt", sat, lambda tensors: {"state_dict": tensors})
    if "text_encoder" in parts:
        save_text_encoder(folder / "t5-v1_1-xxl")
        save_tiny_tokenizer(folder / "t5-v1_1-xxl")
    return folder


def save_text_encoder(folder) -> None:
    folder.mkdir(parents=True)
    save_file(dict(random_tensors("text_encoder")), folder / "model.safetensors")
    config = models.build(SPECS["text_encoder"]).config
    (folder / "config.json").write_text(json.dumps(convert_t5.transformers_config(config)))


def save_diffusers(folder, parts=tuple(SPECS), variant: str = "5b"):
    makers = {
        "transformer": convert_cogvideox.diffusers_config,
        "vae": convert_cogvideox.diffusers_vae_config,
    }
    for part in makers.keys() & set(parts):
        (folder / part).mkdir(parents=True)
        fields = makers[part](models.build(spec_of(part, variant)).config)
        (folder / part / "config.json").write_text(json.dumps(fields))
        tensors = dict(random_tensors(part, variant))
        save_file(tensors, folder / part / "diffusion_pytorch_model.safetensors")
    if "text_encoder" in parts:
        save_text_encoder(folder / "text_encoder")
        save_tiny_tokenizer(folder / "tokenizer")
    return folder


SAVE = {"diffusers": save_diffusers, "sat": save_sat}


def convert(src, dst, *flags: str):
    convert_cogvideox.main([f"--src={src}", f"--dst={dst}", *flags])
    return dst


# Tables.


@pytest.mark.parametrize("naming", NAMINGS)
def test_public_sizes_have_the_public_tensors(naming):
    counts = {"diffusers": (736, 1024), "sat": (736 - 30 * 6, 1024 - 42 * 6)}[
        naming
    ]  # q k v: 1 of 3, norms: 1 of 2
    tables = [
        (counts[0], 1_693_783_872, convert_cogvideox.dit_leaves(cogvideox.COGVIDEOX_2B, naming)),
        (counts[1], 5_570_283_072, convert_cogvideox.dit_leaves(cogvideox.COGVIDEOX_5B, naming)),
        (counts[1], 5_570_676_352, convert_cogvideox.dit_leaves(cogvideox.COGVIDEOX_1_5_5B, naming)),
        (436, 215_583_907, convert_cogvideox.vae_leaves(cogvideox_vae.CogVideoXVAEConfig(), naming)),
        (219, 4_762_310_656, convert_t5.leaves(t5.T5_V1_1_XXL, "diffusers")),
    ]
    for count, parameters, table in tables:
        shapes = lv.tensor_shapes(table)
        assert len(shapes) == count
        assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameters


def test_names_and_shapes_of_the_published_files():
    tables = {
        "5b": convert_cogvideox.dit_leaves(cogvideox.COGVIDEOX_5B, "diffusers"),
        "1.5": convert_cogvideox.dit_leaves(cogvideox.COGVIDEOX_1_5_5B, "diffusers"),
        "sat": convert_cogvideox.dit_leaves(cogvideox.COGVIDEOX_2B, "sat"),
        "sat 1.5": convert_cogvideox.dit_leaves(cogvideox.COGVIDEOX_1_5_5B, "sat"),
        "vae": convert_cogvideox.vae_leaves(cogvideox_vae.CogVideoXVAEConfig(), "diffusers"),
        "sat vae": convert_cogvideox.vae_leaves(cogvideox_vae.CogVideoXVAEConfig(), "sat"),
    }
    expected = {
        "5b": {
            "patch_embed.proj.weight": (3072, 16, 2, 2),
            "patch_embed.text_proj.weight": (3072, 4096),
            "time_embedding.linear_1.weight": (512, 3072),
            "transformer_blocks.41.norm1.linear.weight": (18432, 512),
            "transformer_blocks.0.attn1.norm_q.bias": (64,),
            "transformer_blocks.0.attn1.to_out.0.weight": (3072, 3072),
            "transformer_blocks.0.ff.net.0.proj.weight": (12288, 3072),
            "norm_out.linear.bias": (6144,),
            "proj_out.weight": (64, 3072),
        },
        "1.5": {"patch_embed.proj.weight": (3072, 128), "proj_out.weight": (128, 3072)},
        "sat": {
            "model.diffusion_model.mixins.patch_embed.proj.weight": (1920, 16, 2, 2),
            "model.diffusion_model.transformer.layers.29.attention.query_key_value.weight": (5760, 1920),
            "model.diffusion_model.mixins.adaln_layer.adaLN_modulations.0.1.bias": (23040,),
            "model.diffusion_model.time_embed.2.weight": (512, 512),
            "model.diffusion_model.mixins.final_layer.linear.weight": (64, 1920),
        },
        "sat 1.5": {"model.diffusion_model.mixins.patch_embed.proj.weight": (3072, 128)},
        "vae": {
            "encoder.down_blocks.1.resnets.0.conv_shortcut.weight": (256, 128, 1, 1, 1),
            "encoder.down_blocks.2.downsamplers.0.conv.weight": (256, 256, 3, 3),
            "decoder.up_blocks.3.resnets.3.norm2.conv_y.conv.weight": (128, 16, 1, 1, 1),
            "decoder.norm_out.norm_layer.weight": (128,),
            "decoder.conv_out.conv.weight": (3, 128, 3, 3, 3),
        },
        "sat vae": {
            "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1, 1),
            "encoder.mid.block_2.conv1.conv.bias": (512,),
            # The last stage to be run is the first of diffusers'.
            "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1, 1),
            "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        },
    }
    for name, shapes in expected.items():
        assert shapes.items() <= lv.tensor_shapes(tables[name]).items(), name


@pytest.mark.parametrize("variant", TRANSFORMERS)
def test_each_row_of_a_shared_tensor_is_used_once(variant):
    rows = {}
    for leaf in table_of("transformer", "sat", variant).values():
        for name in leaf.names:
            whole = ((0, leaf.torch_shape[0]),)
            rows.setdefault(name, []).extend(leaf.rows or whole)
    for name, shape in lv.tensor_shapes(table_of("transformer", "sat", variant)).items():
        taken = sorted(rows[name])
        assert [start for start, _ in taken] == [0, *(stop for _, stop in taken[:-1])], name
        assert taken[-1][1] == shape[0]


def test_layouts_of_kernels():
    tensors, tree = random_tensors("transformer"), random_tree("transformer")
    # A patch is flattened (c, ph, pw): channel 5, row 1, column 0.
    kernel = tree["embed"]["patch"]["kernel"]
    np.testing.assert_array_equal(kernel[5 * 4 + 2], tensors["patch_embed.proj.weight"][:, 5, 1, 0])
    # Six vectors of modulation, gate of the text last: of layer 2, input 7.
    kernel = tree["blocks"]["norm2"]["modulation"]["kernel"]
    linear = tensors["transformer_blocks.2.norm2.linear.weight"]
    np.testing.assert_array_equal(kernel[2, 7, -48:], linear[-48:, 7])
    assert (tree["head"]["norm1"]["scale"] == tensors["norm_final.weight"]).all()
    assert (tree["head"]["norm2"]["scale"] == tensors["norm_out.norm.weight"]).all()
    tensors, tree = random_tensors("vae"), random_tree("vae")
    kernel = tree["encoder"]["down_blocks"]["0"]["downsamplers"]["0"]["conv"]["kernel"]  # (H, W, I, O)
    weight = tensors["encoder.down_blocks.0.downsamplers.0.conv.weight"]
    np.testing.assert_array_equal(kernel[2, 1, 5], weight[:, 5, 2, 1])


def test_a_table_of_rows_is_for_reading_only():
    with pytest.raises(ValueError, match="for reading only"):
        state_dicts.write(random_tree("transformer"), table_of("transformer", "sat"))


# Files.


@pytest.mark.parametrize(("layout", "variant"), [("diffusers", "5b"), ("diffusers", "1.5"), ("sat", "2b")])
def test_every_part_is_bit_equal(tmp_path, layout, variant):
    src = SAVE[layout](tmp_path / "src", variant=variant)
    dst = convert(src, tmp_path / "dst")
    for part in SPECS:
        manifest = checkpoints.read_manifest(str(dst / part), "")
        tree = random_tree(part, variant)
        assert_same(load(dst / part), tree)
        assert manifest["sha256"] == checkpoints.tree_hash(tree)
        assert models.build(manifest["model"]) == models.build(spec_of(part, variant))
        assert manifest["source"]["format"] == ("diffusers" if part == "text_encoder" else layout)
    # The folder of the text encoder's weights also has the tokenizer's files: only these are copied.
    assert sorted(os.listdir(dst / "text_encoder" / "tokenizer")) == [
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize("variant", ["5b", "1.5"])
@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BF16], ids=str)
def test_sat_files_in_half_precision(tmp_path, monkeypatch, variant, dtype):
    """With thresholds of a tiny model: single layers, chunks with a remainder, reads of one row."""
    for name, value in {"_GATHERED": 256, "_CHUNK": 900, "_READ": 100}.items():
        monkeypatch.setattr(stream, name, value)
    monkeypatch.setattr(lv, "_ROWS", 5)
    tensors = {name: tensor.astype(dtype) for name, tensor in random_tensors("transformer", variant).items()}
    save_pt(tmp_path / SAT_TRANSFORMER, to_sat(tensors) | unused(variant), lambda t: {"module": t, "step": 7})
    table = table_of("transformer", "diffusers", variant)
    assert_same(load(convert(tmp_path, tmp_path / "dst") / "transformer"), state_dicts.read(tensors, table))
    for place in ("transformer_t2v/1000", ".", "1000"):
        other = tmp_path / "other" / place / "mp_rank_00_model_states.pt"
        other.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / SAT_TRANSFORMER).rename(other)
        convert(tmp_path / "other", tmp_path / place / "again", "--dry-run")
        other.rename(tmp_path / SAT_TRANSFORMER)


@pytest.mark.parametrize(("variant", "rows"), [("2b", 226), ("5b", 226), ("1.5", 224)])
def test_rows_of_text_of_sat_files(tmp_path, variant, rows):
    dst = convert(save_sat(tmp_path / "src", ["transformer"], variant), tmp_path / "dst")
    assert checkpoints.read_manifest(str(dst / "transformer"), "")["model"]["text_len"] == rows


def test_values_of_sat_files_are_cast(tmp_path):
    src = save_sat(tmp_path / "src", ["transformer"])
    tree = load(convert(src, tmp_path / "dst", "--dtype=bfloat16") / "transformer")
    assert_same(tree, jax.tree.map(lambda x: x.astype(BF16), random_tree("transformer")))


KILLED = """
import os, signal, sys
from convert import cogvideox, stream
add, count = stream._Journal.add, 0
def add_then_die(self, name, digests):
    global count
    add(self, name, digests)
    count += 1
    if count == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
stream._Journal.add = add_then_die
stream._GATHERED = 256
cogvideox.main(["--src", sys.argv[1], "--dst", sys.argv[2]])
"""


@pytest.mark.parametrize(
    ("kill_at", "done", "missing"), [(14, "attn/k", "attn/q"), (36, "norm1/modulation", "norm2/modulation")]
)
def test_a_killed_run_resumes_and_writes_the_same_files(tmp_path, monkeypatch, kill_at, done, missing):
    """The run is killed when it has written some of the leaves that share a tensor of the third layer."""
    src, dst = save_sat(tmp_path / "src", ["transformer"]), tmp_path / "dst"
    arguments = [sys.executable, "-c", KILLED, str(src), str(dst), str(kill_at)]
    killed = subprocess.run(arguments, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert os.listdir(dst) == ["transformer.partial"]
    journal = (dst / "transformer.partial" / stream.JOURNAL).read_text()
    written = []
    write = stream._write
    monkeypatch.setattr(stream, "_GATHERED", 256)
    monkeypatch.setattr(stream, "_write", lambda *arguments: (written.append(0), write(*arguments)))
    convert(src, dst)
    resumed = len(written)
    assert f"blocks/{done}/kernel 2" in journal and f"blocks/{missing}/kernel 2" not in journal
    written.clear()
    convert(src, tmp_path / "straight")
    assert resumed == len(written) - kill_at
    assert contents(dst) == contents(tmp_path / "straight")


def test_round_trips_of_the_commands_are_exact(tmp_path):
    """SAT -> ours -> diffusers -> ours -> diffusers: the same bits and the same files."""
    ours = convert(save_sat(tmp_path / "src", variant="2b"), tmp_path / "ours")
    for source, files, again in [("ours", "first", "ours2"), ("ours2", "second", "ours3")]:
        convert_export.main(
            [f"--checkpoint={tmp_path / source}", "--format=diffusers", f"--dst={tmp_path / files}"]
        )
        convert(tmp_path / files, tmp_path / again)
    for part in SPECS:
        hashes = [
            json.loads((tmp_path / o / part / "manifest.json").read_text())["sha256"]
            for o in ("ours", "ours2", "ours3")
        ]
        assert len(set(hashes)) == 1, part
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    scheduler = json.loads((tmp_path / "first" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["snr_shift_scale"] == 3.0 and scheduler["_class_name"] == "CogVideoXDDIMScheduler"
    vae = json.loads((tmp_path / "first" / "vae" / "config.json").read_text())
    assert vae["scaling_factor"] == 1.15258426  # which SAT's file of the VAE does not have

    with pytest.raises(UserError, match="model 'cogvideox': use --format=diffusers"):
        convert_export.export(str(ours), "official", str(tmp_path / "official"))


def test_a_branch_next_to_cogvideox_has_the_documented_keys(tmp_path):
    branch = dict(
        module="prophy",
        layers=[0, 2],
        semantic=dict(basis_grid=[2, 4, 6], experts=5, hidden=12),
        refinement=dict(experts=3, top_k=2, categories=7, align_hidden=6),
    )
    backbone, part = models.build(SPECS["transformer"]), models.build(branch)
    frozen = jax.eval_shape(backbone.init, jax.random.key(0))
    tree = jax.eval_shape(
        lambda key, frozen: part.init(key, backbone, {"backbone": frozen}), jax.random.key(0), frozen
    )
    form = convert_export.FORMS["cogvideox"]
    table = convert_export.branch_leaves(backbone, part, form, "diffusers")
    shapes = lv.tensor_shapes(table)
    assert sum(int(np.prod(s)) for s in shapes.values()) == sum(x.size for x in jax.tree.leaves(tree))
    assert shapes["blocks.1.attn1.to_q.weight"] == (48, 48) and shapes["exits.1.weight"] == (48, 48)
    assert {name.split(".")[0] for name in shapes} == {"blocks", "exits", "semantic", "refinement"}


# Bad input.


def fails(src, tmp_path, *flags) -> str:
    """The error of the command, which writes nothing."""
    with pytest.raises(UserError) as caught:
        convert(src, tmp_path / "dst", *flags)
    assert not (tmp_path / "dst").exists() and "\n" not in str(caught.value)
    return str(caught.value)


def test_all_keys_of_sat_that_do_not_fit_are_named_at_once(tmp_path):
    sat = to_sat(random_tensors("transformer"))
    prefix = "model.diffusion_model"
    del sat[f"{prefix}.transformer.layers.1.attention.query_key_value.weight"]
    sat[f"{prefix}.mixins.adaln_layer.adaLN_modulations.0.1.bias"] = np.zeros(575, np.float32)
    sat[f"{prefix}.mixins.pos_embed.other"] = np.zeros(3, np.float32)
    sat["conditioner.weight"] = np.zeros(3, np.float32)
    save_pt(tmp_path / SAT_TRANSFORMER, sat, lambda tensors: {"module": tensors})
    message = fails(tmp_path, tmp_path)
    for part in (
        f"missing {prefix}.transformer.layers.1.attention.query_key_value.weight",
        f"{prefix}.mixins.adaln_layer.adaLN_modulations.0.1.bias is (575,), not (576,)",
        f"unknown {prefix}.mixins.pos_embed.other",
        "unknown conditioner.weight",
        "sat naming",
    ):
        assert part in message
    assert message.count(";") == 3


def test_all_keys_of_diffusers_that_do_not_fit_are_named_at_once(tmp_path):
    src = save_diffusers(tmp_path / "src", ["transformer"])
    tensors = dict(random_tensors("transformer"))
    del tensors["norm_final.bias"]
    tensors |= {"extra": np.zeros(3, np.float32), "proj_out.bias": np.zeros(63, np.float32)}
    stem = src / "transformer" / "diffusion_pytorch_model"
    stem.with_suffix(".safetensors").unlink()
    save_file(tensors, f"{stem}-1.safetensors")
    save_file({"norm_final.weight": tensors["norm_final.weight"]}, f"{stem}-2.safetensors")
    message = fails(src, tmp_path)
    for part in (
        "missing norm_final.bias",
        "unknown extra",
        "duplicate norm_final.weight",
        "proj_out.bias is (63,), not (64,)",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (
            lambda t: {"module": t, "optimizer": {"state": {}}, "lr_scheduler": {}},
            "next to it are optimizer, lr_",
        ),
        (lambda t: {"module": t, "optimizer": t}, "next to it are optimizer"),
        (lambda t: {"optimizer_state_dict": t}, "its entry optimizer_state_dict is a dict with the keys"),
        (lambda t: {"module": t, "ds_config": pytest.approx}, "needs _pytest"),
    ],
)
def test_training_states_are_refused(tmp_path, wrap, message):
    save_pt(tmp_path / SAT_TRANSFORMER, to_sat(random_tensors("transformer")), wrap)
    error = fails(tmp_path, tmp_path)
    assert message in error and SAT_TRANSFORMER in error


@pytest.mark.parametrize(
    "name",
    ["zero_pp_rank_0_mp_rank_00_model_states.pt", "mp_rank_00_optim_states.pt", "mp_rank_01_model_states.pt"],
)
def test_pieces_of_training_states_are_refused(tmp_path, name):
    (tmp_path / "transformer" / "1000").mkdir(parents=True)
    (tmp_path / "transformer" / "1000" / name).touch()
    error = fails(tmp_path, tmp_path)
    assert name in error and "piece of a training state" in error


def test_weights_of_several_steps_are_refused(tmp_path):
    save_sat(tmp_path, ["transformer"])
    save_pt(tmp_path / "transformer/500/mp_rank_00_model_states.pt", {})
    assert "of several steps: leave only one" in fails(tmp_path, tmp_path)


def test_a_truncated_file_is_refused(tmp_path):
    save_sat(tmp_path, ["transformer"])
    file = tmp_path / SAT_TRANSFORMER
    os.truncate(file, file.stat().st_size - 100)
    error = fails(tmp_path, tmp_path)
    assert str(file) in error and "cut short or damaged" in error


def test_a_file_that_shrinks_during_a_run_is_refused(tmp_path):
    save_sat(tmp_path, ["transformer"])
    component = command.open_component(convert_cogvideox.MODEL, tmp_path, "transformer", None)
    os.truncate(tmp_path / SAT_TRANSFORMER, 5000)
    with pytest.raises(UserError, match="became shorter"):
        command.convert(component, tmp_path / "dst")


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({"patch_embed.proj.weight": (48, 32, 2, 2)}, "patch_embed.proj.weight (48, 32, 2, 2)"),
        ({"patch_embed.proj.weight": (48, 256)}, "patch_embed.proj.weight (48, 256)"),
        ({"patch_embed.pos_embedding": (1, 300, 48)}, "patch_embed.pos_embedding"),
        ({"ofs_embedding.linear_1.weight": (20, 20)}, "ofs_embedding.linear_1.weight"),
    ],
)
def test_image_to_video_models_are_refused(tmp_path, tensors, found):
    odd = {name: np.zeros(shape, np.float32) for name, shape in tensors.items()}
    save_file(odd, tmp_path / "downloaded.safetensors")
    assert f"is an image-to-video model (it has {found}" in fails(tmp_path, tmp_path)
    src = save_diffusers(tmp_path / "src", ["transformer"])
    save_file(
        dict(random_tensors("transformer")) | odd, src / "transformer" / "diffusion_pytorch_model.safetensors"
    )
    assert f"is an image-to-video model (it has {found}" in fails(src, tmp_path)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("mixins.patch_embed.proj.weight", (48, 32, 2, 2)), ("ofs_embed.0.weight", (20, 20))],
)
def test_image_to_video_models_of_sat_are_refused(tmp_path, name, shape):
    odd = {f"model.diffusion_model.{name}": np.zeros(shape, np.float32)}
    save_pt(tmp_path / SAT_TRANSFORMER, to_sat(random_tensors("transformer")) | odd, lambda t: {"module": t})
    assert f"is an image-to-video model (it has model.diffusion_model.{name}" in fails(tmp_path, tmp_path)


@pytest.mark.parametrize("inputs", [33, 48])
@pytest.mark.parametrize("variant", ["5b", "1.5"])
@pytest.mark.parametrize("layout", ["diffusers", "sat"])
def test_models_that_are_given_an_image_or_a_control_are_refused(tmp_path, layout, variant, inputs):
    """Whatever their number of channels is: nothing would feed them."""
    wide = {"patch_embed.proj.weight": np.zeros((48, inputs, 2, 2) if variant == "5b" else (48, 8 * inputs))}
    tensors = dict(random_tensors("transformer", variant)) | {k: v.astype("f4") for k, v in wide.items()}
    if layout == "sat":
        src = tmp_path / "src"
        save_pt(src / SAT_TRANSFORMER, to_sat(tensors), lambda tensors: {"module": tensors})
    else:
        src = save_diffusers(tmp_path / "src", ["transformer"], variant)
        where = src / "transformer" / "config.json"
        where.write_text(json.dumps(json.loads(where.read_text()) | {"in_channels": inputs}))
        save_file(tensors, src / "transformer" / "diffusion_pytorch_model.safetensors")
    assert f"has {inputs} input channels for 16 of the video" in fails(src, tmp_path)


def test_tensors_without_an_axis_are_one_line(tmp_path):
    src = save_diffusers(tmp_path / "src", ["transformer"])
    odd = {name: np.zeros((), np.float32) for name in ("patch_embed.proj.weight", "proj_out.weight")}
    tensors = dict(random_tensors("transformer")) | odd
    save_file(tensors, src / "transformer" / "diffusion_pytorch_model.safetensors")
    assert "patch_embed.proj.weight is (), not (48, 16, 2, 2)" in fails(src, tmp_path)


@pytest.mark.parametrize("part", SPECS)
def test_a_part_that_is_there_in_both_layouts_is_refused(tmp_path, part):
    src = save_sat(save_diffusers(tmp_path / "src", [part]), [part])
    assert f"the {part} is there twice, {src}" in fails(src, tmp_path)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("transformer", {"_class_name": "WanTransformer3DModel"}, "is a WanTransformer3DModel"),
        ("transformer", {"flip_sin_to_cos": False}, "config.json: it has flip_sin_to_cos False"),
        ("transformer", {"attention_head_dim": None}, "config.json lacks 'attention_head_dim'"),
        ("transformer", {"num_layers": {"x": 1}}, '{"x": 1} is no number of layers'),
        ("transformer", {"num_layers": 4}, "missing transformer_blocks.3.attn1.norm_k.bias"),
        ("transformer", {"patch_size_t": 2}, "patch_embed.proj.weight is (48, 16, 2, 2), not (48, 128)"),
        ("vae", {"use_quant_conv": True}, "config.json: it has use_quant_conv True"),
        ("vae", {"norm_num_groups": 5}, "config.json: CogVideoX VAE: block_out_channels"),
        ("vae", {"scaling_factor": None}, "config.json lacks 'scaling_factor'"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(tmp_path, part, change, message):
    src = save_diffusers(tmp_path / "src", [part])
    where = src / part / "config.json"
    fields = json.loads(where.read_text()) | change
    where.write_text(
        json.dumps({name: value for name, value in fields.items() if name not in change or value is not None})
    )
    assert message in fails(src, tmp_path)


def test_a_vae_of_sat_needs_its_transformer(tmp_path):
    save_sat(tmp_path, ["vae"])
    assert "put the transformer into" in fails(tmp_path, tmp_path)


def test_missing_parts_are_named(tmp_path, capsys):
    assert "no CogVideoX weights: " in fails(tmp_path, tmp_path)
    save_sat(tmp_path / "src", ["transformer"])
    convert(tmp_path / "src", tmp_path / "dst", "--dry-run")
    assert f"no vae: {tmp_path / 'src'} has neither vae/" in capsys.readouterr().out
    assert "nor vae/3d-vae.pt" in fails(tmp_path / "src", tmp_path, "--component=vae")


def test_a_checkpoint_of_another_size_is_refused_in_one_line(tmp_path):
    dst = convert(save_diffusers(tmp_path / "src", ["transformer"], "1.5"), tmp_path / "dst")
    wanted = jax.eval_shape(models.build(SPECS["transformer"]).init, jax.random.key(0))
    with pytest.raises(UserError, match="does not fit the configuration: .*embed/patch/kernel is") as caught:
        checkpoints.check_params(str(dst / "transformer"), wanted, "")
    assert "\n" not in str(caught.value)


def test_models_without_fields_in_diffusers_are_refused():
    for change in (dict(ffn_dim=70), dict(positions="rope_slice"), dict(patch_size=[2, 2, 2])):
        config = models.build(SPECS["transformer"] | change).config
        with pytest.raises(UserError, match="diffusers has fields for"):
            convert_cogvideox.diffusers_config(config)


# Size.


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_peak_memory_at_the_width_of_5b(tmp_path, dtype):
    """Peak memory while SAT's file is converted, two layers of 42: no tensor is in memory twice."""
    table = convert_cogvideox.dit_leaves(cogvideox.build("5b", num_layers=2).config, "sat")
    rng = np.random.default_rng(0)
    block = rng.standard_normal(1 << 22, np.float32).astype(BF16)
    shapes = lv.tensor_shapes(table)
    tensors = {name: np.resize(block, shape) for name, shape in shapes.items()}
    save_pt(tmp_path / "src" / SAT_TRANSFORMER, tensors, lambda tensors: {"module": tensors})
    largest = max(tensor.nbytes for tensor in tensors.values()) * (1 if dtype is None else 2)
    del tensors
    # The program reads its own peak: that of wait4 counts the memory of the test, which forked it.
    program = (
        "import sys; from convert import cogvideox; cogvideox.main(sys.argv[1:]);"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    arguments = [f"--src={tmp_path / 'src'}", f"--dst={tmp_path / 'dst'}"]
    arguments += [f"--dtype={dtype}"] if dtype else []
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1])
    print(f"{done.stdout}largest tensor {largest / 1e6:.0f} MB, peak memory {peak / 1e6:.0f} MB")
    assert peak <= 2.5 * largest + 500e6
