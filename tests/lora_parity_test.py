"""LoRA files against diffusers and PEFT: theirs are read, ours are taken by `load_lora_weights`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import export, lora
from prophy_jax.models.beside.lora import Lora
from prophy_jax.models.beside.part import Model
from prophy_jax.run import checkpoints
from prophy_jax.run.errors import UserError
from tests import cogvideox_parity_test, wan_parity_test
from tests.backbone_test import randomised
from tests.late import late

torch = late("torch")
diffusers = late("diffusers")

# Far from what the layers add themselves, alpha unlike the rank, in all layers of a block.
RANK, ALPHA = 3, 2.0


@pytest.fixture(autouse=True)
def _full_precision(one_torch_thread):
    with jax.default_matmul_precision("highest"):
        yield


class Pair:
    """A transformer in a pipeline of diffusers, and ours with the same weights."""

    def __init__(self, name: str) -> None:
        if name == "wan":
            self.reference, self.backbone, self.params = wan_parity_test.make()
            latents, times, text = wan_parity_test.inputs((2, 3, 6, 10), 500)
            self.run_reference = wan_parity_test.run_reference
            self.pipeline = diffusers.WanPipeline(None, None, None, _scheduler(), self.reference)
        else:
            self.reference, self.backbone, self.params = cogvideox_parity_test.make("5b")
            latents, times, text = cogvideox_parity_test.inputs(cogvideox_parity_test.SHAPES["5b"][0])
            self.run_reference = cogvideox_parity_test.run_reference
            self.pipeline = diffusers.CogVideoXPipeline(None, None, None, self.reference, _scheduler())
        self.arrays, self.spec, self.form = (latents, times, text), dict(module=name), export.FORMS[name]
        config = self.backbone.config
        own = {key: getattr(config, key) for key in vars(config)}
        self.spec |= {key: value for key, value in own.items() if not key.startswith("_")}

    def theirs(self) -> np.ndarray:
        with torch.no_grad():
            return self.run_reference(self.reference, *map(torch.from_numpy, self.arrays)).numpy()

    def ours(self, part: Lora, params) -> np.ndarray:
        latents, times, text = self.arrays
        prompt = {"text": text, "text_mask": np.ones(text.shape[:2], bool)}
        model = Model(self.backbone, {"lora": part})
        own = {"backbone": self.params, "lora": params}
        return np.asarray(
            jax.jit(lambda own: model(own, latents, jnp.asarray(times), prompt).prediction)(own)
        )


def _scheduler():
    return diffusers.UniPCMultistepScheduler()


@pytest.fixture(params=["wan", "cogvideox"])
def pair(request):
    return Pair(request.param)


def random_adapters(pair):
    part = Lora(RANK, ALPHA, ("backbone/blocks/.*attn/", "backbone/blocks/ffn"))
    params = part.init(jax.random.key(0), pair.backbone, {"backbone": pair.params})
    return part, randomised(params, seed=3)


def export_adapters(tmp_path, pair, part, params, naming):
    spec = dict(module="lora", rank=part.rank, alpha=part.alpha, targets=part.targets)
    about = {"part": "lora", "model": {"backbone": pair.spec, "lora": spec}}
    checkpoints.save_params(str(tmp_path / "lora"), params, about)
    export.export(str(tmp_path / "lora"), naming, str(tmp_path / naming))
    return tmp_path / naming / "prophy_lora.safetensors"


def test_diffusers_takes_what_is_exported_and_it_is_read_back(tmp_path, pair):
    part, params = random_adapters(pair)
    plain, want = pair.theirs(), pair.ours(part, params)
    assert np.abs(want - plain).max() > 0.1
    for naming in pair.form.configs:
        file = export_adapters(tmp_path, pair, part, params, naming)
        pair.pipeline.load_lora_weights(str(file))
        np.testing.assert_allclose(pair.theirs(), want, rtol=0, atol=1e-4)
        pair.pipeline.unload_lora_weights()
        np.testing.assert_allclose(pair.ours(*lora.read(str(file), pair.backbone)), want, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(pair.theirs(), plain)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_what_diffusers_saves_is_read(tmp_path, pair, strength):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    targets = ["to_q", "to_k", "to_v", "to_out.0", "net.2"]
    config = LoraConfig(r=4, lora_alpha=10, target_modules=targets, init_lora_weights=False)
    pair.reference.add_adapter(config)
    layers = get_peft_model_state_dict(pair.reference)
    metadata = {"r": 4, "lora_alpha": 10, "target_modules": targets}
    type(pair.pipeline).save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=metadata)
    pair.reference.set_adapters(["default"], [strength])
    part, params = lora.read(str(tmp_path / "pytorch_lora_weights.safetensors"), pair.backbone, strength)
    assert part.rank == 4
    np.testing.assert_allclose(pair.ours(part, params), pair.theirs(), rtol=0, atol=1e-4)


def kohya(file):
    """The same adapters as kohya's trainers write them: other names, alpha, ranks that differ."""
    written = {}
    for name, tensor in load_file(file).items():
        layer, _, side = name.removesuffix(".weight").rpartition(".")
        layer = "lora_unet_" + layer.split(".", 1)[1].replace(".", "_")
        rank = tensor.shape[side == "lora_B"]
        if side == "lora_A":
            written[f"{layer}.lora_down.weight"] = tensor
            written[f"{layer}.alpha"] = np.array(rank / 2, np.float32)
        else:
            written[f"{layer}.lora_up.weight"] = 2 * tensor
    return written


def test_kohya_names_with_alpha_are_read(tmp_path, pair):
    part, params = random_adapters(pair)
    want = pair.ours(part, params)
    file = export_adapters(tmp_path, pair, part, params, list(pair.form.configs)[-1])
    written = kohya(file)
    # A layer of a lower rank: its last row is zero, and left out.
    name = next(name for name in written if name.endswith("ffn_0.lora_down.weight") or "net_0" in name)
    layer = name.partition(".")[0]
    save_file(written, tmp_path / "kohya.safetensors")
    read = lora.read(str(tmp_path / "kohya.safetensors"), pair.backbone)
    np.testing.assert_allclose(pair.ours(*read), want, rtol=0, atol=1e-5)
    down, up = written[f"{layer}.lora_down.weight"], written[f"{layer}.lora_up.weight"]
    less = {f"{layer}.lora_down.weight": down[:2], f"{layer}.lora_up.weight": np.ascontiguousarray(up[:, :2])}
    zero = {f"{layer}.lora_up.weight": up * np.float32([1, 1, 0])}
    outputs, other = [], tmp_path / "other.safetensors"
    for change, alpha in ((less, 1.0), (zero, 1.5)):  # alpha / r is 1/2 in both
        save_file(written | change | {f"{layer}.alpha": np.array(alpha, np.float32)}, other)
        outputs.append(pair.ours(*lora.read(str(other), pair.backbone)))
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=0, atol=1e-6)
    assert np.abs(outputs[0] - want).max() > 1e-3


def renamed(written, old, new):
    return {name.replace(old, new): tensor for name, tensor in written.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: renamed(files, "blocks.0.", "layers.0."), "fits no layer .*nearest layer is blocks.0"),
        (lambda files: renamed(files, "blocks.2.", "blocks.7."), "fits no layer .*another model"),
        (lambda files: {name: np.ones((5, 7), np.float32) for name in files}, "another size"),
        (lambda files: dict(list(files.items())[:-1]), "lacks a matrix of .* cut short"),
        (lambda files: files | {"x.dora_scale": np.ones(1, np.float32)}, r"has DoRA \(x.dora_scale\)"),
        (lambda files: files | {"x.lokr_w1": np.ones(1, np.float32)}, "has LoKr"),
        (lambda files: files | {"x.hada_w1_a": np.ones(1, np.float32)}, "has LoHa"),
        (lambda files: {name: tensor * np.nan for name, tensor in files.items()}, "NaN or infinity"),
        (lambda files: {}, "no tensor of an adapter"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path, change, message):
    pair = Pair("wan")
    file = export_adapters(tmp_path, pair, *random_adapters(pair), "diffusers")
    save_file(change(load_file(file)), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=message):
        lora.read(str(tmp_path / "other.safetensors"), pair.backbone)


def test_damaged_files_and_notes_are_refused(tmp_path):
    pair = Pair("wan")
    file = export_adapters(tmp_path, pair, *random_adapters(pair), "diffusers")
    once = lora.read(str(file), pair.backbone)[1]
    beside = file.with_name("adapter_config.json")
    beside.write_text(json.dumps({"lora_alpha": 6}))
    again = lora.read(str(file), pair.backbone)[1]  # PEFT's notes, on a file that is none of PEFT's
    jax.tree.map(np.testing.assert_array_equal, again, once)
    save_file(renamed(load_file(file), "transformer.", "base_model.model."), file)
    part, params = lora.read(str(file), pair.backbone)
    np.testing.assert_allclose(params["backbone"]["ffn"]["up"]["up"], 2 * once["backbone"]["ffn"]["up"]["up"])
    for content in ("{", '{"lora_alpha": "x"}', '{"use_rslora": true}'):
        beside.write_text(content)
        with pytest.raises(UserError, match="alpha"):
            lora.read(str(file), pair.backbone)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        lora.read(str(file), pair.backbone)
    with pytest.raises(UserError, match="no file"):
        lora.read(str(tmp_path / "nothing"), pair.backbone)
