"""LoRA files that are odd or damaged, and `convert.merge`: one line that says so, or the right numbers."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import lora
from prophy_jax import models
from prophy_jax.run import checkpoints
from prophy_jax.run.errors import UserError
from tests import tiny_pipeline
from tests.backbone_test import randomised
from tests.commands import run_here

SPEC = {"module": "wan", **tiny_pipeline.BACKBONE}
NAME = "transformer.blocks.0.attn1.to_q.lora_{}.weight"  # one of those that `save_lora` writes


@pytest.fixture(scope="module")
def backbone():
    return models.build(SPEC)


@pytest.fixture(scope="module")
def place(tmp_path_factory, backbone):
    """PLACE/wan/transformer, PLACE/wan/vae and a LoRA, PLACE/a.safetensors."""
    place = tmp_path_factory.mktemp("lora_files")
    params = randomised(jax.eval_shape(backbone.init, jax.random.key(0)))
    folder = place / "wan" / "transformer"
    checkpoints.save_params(str(folder), params, {"part": "transformer", "model": SPEC})
    vae = {"part": "vae", "model": {"module": "wan_vae", **tiny_pipeline.CODEC}}
    checkpoints.save_params(str(place / "wan" / "vae"), {"conv": np.ones((2, 2), np.float32)}, vae)
    tiny_pipeline.save_lora(place / "a.safetensors")
    return place


@pytest.fixture(scope="module")
def tensors(place):
    return load_file(place / "a.safetensors")


def with_alpha(tensors, alpha):
    """Every layer, with a tensor of its alpha."""
    layers = {name.partition(".lora_")[0] for name in tensors}
    return tensors | {f"{layer}.alpha": np.asarray(alpha) for layer in layers}


def changed(side, change):
    """The first matrix (A) or the second (B) of all layers, changed."""

    def make(tensors):
        return {
            name: np.ascontiguousarray(change(tensor)) if f"lora_{side}" in name else tensor
            for name, tensor in tensors.items()
        }

    return make


def without_rank(tensors):
    return changed("A", lambda array: array[:0])(changed("B", lambda array: array[:, :0])(tensors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda own: with_alpha(own, np.ones(3, np.float32)),
            r"states 3 numbers as alpha of \w+/[a-z] in",
        ),
        (lambda own: with_alpha(own, np.ones(0, np.float32)), "states 0 numbers as alpha"),
        (
            lambda own: own | {NAME.format("A").replace("lora_A.weight", "alpha"): np.float32([1])},
            "states alpha of some layers, and not of [a-z_]+/[a-z] in block [0-9]: it is cut short",
        ),
        (
            lambda own: {
                name: tensor
                for name, tensor in with_alpha(own, np.float32([1])).items()
                if name not in (NAME.format("A"), NAME.format("B"))
            },
            "lacks a matrix of self_attn/q in block 0: it is cut short",
        ),
        (without_rank, r"of \(0, 48\) and \(48, 0\), this model takes \(rank, 48\)"),
        (changed("B", np.transpose), r"of \(2, 48\) and \(2, 48\), .*another size"),
        (changed("A", np.ravel), "another size"),
        (changed("A", lambda array: np.float32([1]).reshape(())), "another size"),
        (changed("A", lambda array: array.astype(np.int8)), "lora_A.weight in int8: quantised"),
        (
            lambda own: own | {name.replace("transformer", "diffusion_model"): own[name] for name in own},
            r"more than one adapter of \S+attn1.to_k",
        ),
        (
            lambda own: own | {name.replace(".weight", ".default.weight"): own[name] for name in own},
            "more than one adapter",
        ),
        (
            lambda own: own | {"lora_te_layers_0_q.lora_down.weight": np.ones((2, 8), np.float32)},
            "has adapters of a text encoder .*lora_te_layers_0_q",
        ),
        (
            lambda own: {"blocks.0.attn1.to_q.weight": np.ones((48, 48), np.float32)},
            "holds no tensor of an adapter, but such as blocks.0.attn1.to_q.weight: name a LoRA file",
        ),
        (
            lambda own: own | {"transformer.proj_out.lora_A.weight": np.ones((2, 48), np.float32)},
            "with 1 of its 49 tensors.* or adapts more than the layers of the blocks",
        ),
    ],
)
def test_what_is_wrong_in_a_file_is_said(tmp_path, backbone, tensors, change, message):
    path = tmp_path / "wrong.safetensors"
    save_file(change(tensors), path)
    with pytest.raises(UserError, match=f"wrong.safetensors .*{message}"):
        lora.read(str(path), backbone)


def added(path, backbone):
    """scale A B of every layer, by path."""
    part, own = lora.read(str(path), backbone)
    layers = jax.tree.map(lambda leaf: leaf, own["backbone"])
    return {
        f"{attention}/{name}": part.scale * np.matmul(layer["down"], layer["up"])
        for attention, one in layers.items()
        for name, layer in one.items()
    }


@pytest.mark.parametrize(
    ("change", "metadata", "factor"),
    [
        (lambda own: {name.replace(".weight", ".my style.weight"): own[name] for name in own}, None, 1),
        (lambda own: with_alpha(own, np.float32([1])), None, 0.5),
        (lambda own: with_alpha(own, np.array(2, np.int64)), None, 1),
        (
            lambda own: own,
            {"lora_adapter_metadata": '{"transformer.lora_alpha": 4, "text_encoder.lora_alpha": 100}'},
            2,
        ),
    ],
    ids=["named adapter", "alpha in a list", "alpha a whole number", "alpha of a text encoder too"],
)
def test_forms_of_other_trainers_are_read(tmp_path, place, backbone, tensors, change, metadata, factor):
    path = tmp_path / "other.safetensors"
    save_file(change(tensors), path, metadata=metadata)
    want, found = added(place / "a.safetensors", backbone), added(path, backbone)
    for name in want:
        np.testing.assert_allclose(found[name], factor * want[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{}=0,8", "'0,8' is no number: give a strength, such as --lora={}=0.8"),
        ("{}=", "'' is no number"),
        ("{}=inf", "give a finite strength"),
        ("{}:0.8", "there is no file {}:0.8; name a LoRA in safetensors, as FILE or FILE=0.8"),
        ("nowhere=2", "there is no file nowhere;"),
        ("nowhere=a", "there is no file nowhere=a;"),
        (".", ". is a folder; name the safetensors file in it"),
    ],
)
def test_strengths_and_files_that_are_none(place, entry, message):
    file = str(place / "a.safetensors")
    with pytest.raises(UserError) as error:
        lora.parse([entry.format(file)])
    assert message.format(file) in str(error.value)


def test_equals_signs_in_the_name_of_a_file(tmp_path):
    for name in ("a=b.safetensors", "lora=0.5"):
        (tmp_path / name).touch()
        assert lora.parse([f"{tmp_path}/{name}", f"{tmp_path}/{name}=-2"]) == [
            (f"{tmp_path}/{name}", 1.0),
            (f"{tmp_path}/{name}", -2.0),
        ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lora": "{}=0"}, "adds nothing"),
        ({"lora": "{}=1e40"}, "=1e+40 leaves NaN or infinity: give a lower strength"),
        ({"checkpoint": "wan/vae"}, "is of no transformer alone"),
        ({"checkpoint": "nowhere"}, "name a folder of converted weights or WORKDIR/backbone"),
        ({"dst": "wan/merged"}, "would be inside of"),
        ({"dst": "wan/transformer/merged"}, "would be inside of"),
        ({"dst": "/proc/merged"}, "cannot write /proc/merged"),
    ],
)
def test_nothing_is_merged_on_bad_input(tmp_path, place, arguments, message):
    given = {"checkpoint": "wan", "lora": "{}", "dst": str(tmp_path / "merged"), **arguments}
    own = given["lora"].format(place / "a.safetensors")
    flags = (f"--checkpoint={place / given['checkpoint']}", f"--lora={own}", f"--dst={place / given['dst']}")
    done = run_here("convert.merge", *flags)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert not [*place.rglob("merged*"), *tmp_path.rglob("merged*")]


def test_a_merge_that_is_done_is_not_done_again(tmp_path, place):
    dst = tmp_path / "merged"
    words = ("convert.merge", f"--checkpoint={place}/wan", f"--dst={dst}")
    first = run_here(*words, f"--lora={place}/a.safetensors=0.5")
    written = {path: path.stat().st_mtime_ns for path in dst.rglob("*")}
    again = run_here(*words, f"--lora={place}/a.safetensors=0.5")
    assert first.returncode == again.returncode == 0 and "nothing is left to do" not in first.stdout
    assert again.stdout == f"{dst} was made of the same before: nothing is left to do\n{first.stdout}"
    assert {path: path.stat().st_mtime_ns for path in dst.rglob("*")} == written

    other = run_here(*words, f"--lora={place}/a.safetensors=0.25")
    assert other.returncode == 1 and "exists: name another --dst" in other.stderr
    largest = max((dst / "transformer" / "tree").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(b"x" + largest.read_bytes()[1:])
    damaged = run_here(*words, f"--lora={place}/a.safetensors=0.5")
    assert damaged.returncode == 1 and f"{largest} is damaged" in damaged.stderr
