"""Conversion of files that torch, diffusers and transformers wrote themselves."""

import collections
import os

import jax
import numpy as np
import pytest

from convert import leaves as lv
from convert import wan as convert_wan
from prophy_jax import models
from prophy_jax.run import checkpoints
from prophy_jax.run.errors import UserError
from tests import state_dicts
from tests.late import late
from tests.tiny_tokenizer import save_tiny_tokenizer

torch = late("torch")
diffusers = late("diffusers")
transformers = late("transformers")
safetensors_torch = late("safetensors.torch")

STATISTICS = dict(latents_mean=[0.1 * i for i in range(16)], latents_std=[1 + 0.1 * i for i in range(16)])
T5_SIZES = dict(
    vocab_size=256, d_model=24, d_kv=6, d_ff=40, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu"
)


def randomize(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


@pytest.fixture(scope="module")
def modules():
    """The text encoder in bfloat16, as its public file; the others in float32."""
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=12, num_layers=3, ffn_dim=70, text_dim=24
    )
    vae = diffusers.AutoencoderKLWan(base_dim=4, **STATISTICS)
    encoder = transformers.UMT5EncoderModel(transformers.UMT5Config(**T5_SIZES))
    return {
        "transformer": randomize(transformer),
        "vae": randomize(vae),
        "text_encoder": randomize(encoder).to(torch.bfloat16),
    }


def numpy_state(module) -> dict[str, np.ndarray]:
    """The state dict under the public names, without the second name of the embedding."""
    state = {name: tensor for name, tensor in module.state_dict().items() if "embed_tokens" not in name}
    return {name: to_numpy(tensor) for name, tensor in state.items()}


def to_numpy(tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(jax.numpy.bfloat16)
    return tensor.numpy()


def save_diffusers(modules, folder, **options):
    for part, module in modules.items():
        module.save_pretrained(folder / part, **options)
    save_tiny_tokenizer(folder / "tokenizer")
    return folder


def official_state(part, module) -> dict:
    """The same torch tensors under the official names."""
    config = models.build(MODEL_SPECS[part]).config
    table = {naming: convert_wan.PARTS[part].leaves(config, naming) for naming in convert_wan.NAMINGS}
    state = module.state_dict()
    return {
        official: state[ours]
        for path, leaf in table["diffusers"].items()
        for ours, official in zip(leaf.names, table["official"][path].names, strict=True)
    }


MODEL_SPECS = {
    "transformer": dict(module="wan", dim=48, num_heads=4, num_layers=3, ffn_dim=70, text_dim=24),
    "vae": dict(module="wan_vae", base_dim=4, **STATISTICS),
    "text_encoder": dict(
        module="t5",
        **{k: v for k, v in T5_SIZES.items() if k != "feed_forward_proj"},
        shared_bias=False,
    ),
}


def convert(src, dst, *flags: str):
    convert_wan.main(["--src", str(src), "--dst", str(dst), *flags])
    return dst


def load_state(folder) -> dict[str, np.ndarray]:
    """A converted part under the public names of diffusers and transformers."""
    manifest = checkpoints.read_manifest(str(folder), "")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    want = {
        path: jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=device)
        for path, (shape, dtype) in manifest["shapes"].items()
    }
    want = lv.traverse_util.unflatten_dict(want, sep="/")
    params = checkpoints.load_params(str(folder), want, "")
    config = models.build(manifest["model"]).config
    return state_dicts.write(params, convert_wan.PARTS[manifest["part"]].leaves(config, "diffusers"))


def assert_same_state(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        assert got[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}])
def test_what_diffusers_and_transformers_save(tmp_path, modules, options):
    src = save_diffusers(modules, tmp_path / "src", **options)
    shards = list((src / "transformer").glob("*.safetensors"))
    assert (len(shards) > 2) == bool(options)
    dst = convert(src, tmp_path / "dst")
    for part, module in modules.items():
        assert_same_state(load_state(dst / part), numpy_state(module))
        manifest = checkpoints.read_manifest(str(dst / part), "")
        assert models.build(manifest["model"]) == models.build(MODEL_SPECS[part])


def test_official_files_of_torch_have_the_same_hashes(tmp_path, modules):
    src = tmp_path / "official"
    src.mkdir()
    states = {part: official_state(part, module) for part, module in modules.items()}
    safetensors_torch.save_file(states["transformer"], src / "diffusion_pytorch_model.safetensors")
    (src / "config.json").write_text(
        '{"model_type": "t2v", "dim": 48, "num_heads": 4, "num_layers": 3, "ffn_dim": 70, "text_dim": 24}'
    )
    torch.save(states["vae"], src / "Wan2.1_VAE.pth")
    torch.save(states["text_encoder"], src / "models_t5_umt5-xxl-enc-bf16.pth")
    save_tiny_tokenizer(src / "google" / "umt5-xxl")
    official = convert(src, tmp_path / "dst")
    other = convert(save_diffusers(modules, tmp_path / "src"), tmp_path / "other")
    for part, module in modules.items():
        assert_same_state(load_state(official / part), numpy_state(module))
        manifests = [checkpoints.read_manifest(str(dst / part), "") for dst in (official, other)]
        assert manifests[0]["source"]["format"] == "official"
        assert manifests[0]["sha256"] == manifests[1]["sha256"]


def test_t5_v1_1_shares_one_table_of_position_biases(tmp_path):
    encoder = randomize(transformers.T5EncoderModel(transformers.T5Config(**T5_SIZES)))
    src = save_diffusers({"text_encoder": encoder}, tmp_path / "src")
    dst = convert(src, tmp_path / "dst")
    manifest = checkpoints.read_manifest(str(dst / "text_encoder"), "")
    assert manifest["model"]["shared_bias"] and manifest["shapes"]["position_bias/embedding"][0] == [32, 4]
    assert_same_state(load_state(dst / "text_encoder"), numpy_state(encoder))


def test_values_are_rounded_as_torch_rounds_them(tmp_path, modules):
    transformer = modules["transformer"]
    original = transformer.proj_out.weight.detach().clone()
    odd = [0.0, -0.0, 1e-40, -1e-40, 3.38e38, -3.38e38, 1 + 2**-8, 1 + 3 * 2**-8]
    try:
        with torch.no_grad():
            transformer.proj_out.weight[0, : len(odd)] = torch.tensor(odd)
        src = save_diffusers({"transformer": transformer}, tmp_path / "src")
        dst = convert(src, tmp_path / "dst", "--dtype=bfloat16")
        want = {name: to_numpy(t.to(torch.bfloat16)) for name, t in transformer.state_dict().items()}
        assert_same_state(load_state(dst / "transformer"), want)
    finally:
        with torch.no_grad():
            transformer.proj_out.weight.copy_(original)


# .pth files.


@pytest.fixture(scope="module")
def vae_state(modules):
    """Tensors of their own storages: those of the module may be shared by other tests."""
    return {name: tensor.clone() for name, tensor in official_state("vae", modules["vae"]).items()}


def wrapped(state):
    return {"state_dict": state}


def with_metadata(state):
    ordered = collections.OrderedDict(state)
    ordered._metadata = collections.OrderedDict({"": {"version": 1}})
    return ordered


def in_one_storage(state):
    """Neighbours in one storage, of which none begins at its start."""
    flat = torch.cat([torch.zeros(3), *(tensor.flatten() for tensor in state.values())])
    views, start = {}, 3
    for name, tensor in state.items():
        views[name] = flat[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    return views


def with_gradients(state):
    return {name: tensor.clone().requires_grad_() for name, tensor in state.items()}


@pytest.mark.parametrize("form", [dict, wrapped, with_metadata, in_one_storage, with_gradients])
def test_forms_of_a_plain_state_dict(tmp_path, modules, vae_state, form):
    torch.save(form(vae_state), tmp_path / "Wan2.1_VAE.pth")
    dst = convert(tmp_path, tmp_path / "dst")
    assert_same_state(load_state(dst / "vae"), numpy_state(modules["vae"]))


def whole(state):
    """A model in place of its state dict."""
    global Whole  # pickle looks for the class in the file

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = torch.nn.Linear(3, 3)

    return Whole()


def training(state):
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([parameter])
    return {"model": state, "optimizer": optimizer.state_dict(), "step": 7}


def bias(make):
    """Another tensor in place of a bias."""
    return lambda state: {**state, "conv1.bias": make()}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (whole, "needs tests.convert_parity_test.Whole, and code of a file is never run"),
        (training, "its entry model is a dict with the keys"),
        (lambda state: list(state.values()), "but of type list"),
        (lambda state: state["conv1.weight"], "but a tensor"),
        (bias(lambda: torch.nn.Parameter(torch.zeros(32))), "needs torch._utils._rebuild_parameter"),
        (bias(lambda: torch.zeros(64)[::2]), "conv1.bias is not contiguous"),
        (bias(lambda: torch.zeros(32, dtype=torch.float64)), "conv1.bias is of type DoubleStorage"),
        (bias(lambda: torch.zeros(32, dtype=torch.int64)), "conv1.bias is of type LongStorage"),
        (
            bias(lambda: torch.zeros(32).to(torch.float8_e4m3fn)),
            "needs torch._utils._rebuild_tensor_v3, for weights of a type such as float8",
        ),
        (bias(lambda: torch.zeros(33)), "conv1.bias is (33,), not (32,)"),
        (lambda state: {**state, "encoder.conv1.bias": state["decoder.conv1.bias"]}, "share memory"),
        (lambda state: {**state, "extra": torch.zeros(2)}, "unknown extra"),
    ],
)
def test_what_is_no_plain_state_dict(tmp_path, vae_state, content, message):
    torch.save(content(vae_state), tmp_path / "Wan2.1_VAE.pth")
    assert_fails(tmp_path, message)


def assert_fails(src, message):
    with pytest.raises(UserError) as caught:
        convert(src, src / "dst")
    assert message in str(caught.value) and "Wan2.1_VAE.pth" in str(caught.value)
    assert not (src / "dst").exists()


def test_other_files_of_torch(tmp_path, vae_state):
    path = tmp_path / "Wan2.1_VAE.pth"
    torch.save(vae_state, path, _use_new_zipfile_serialization=False)
    assert_fails(tmp_path, "is not a zip archive of torch.save")
    torch.jit.save(torch.jit.script(torch.nn.Linear(3, 3)), path)
    assert_fails(tmp_path, "not a state dict of torch.save")
    torch.save(vae_state, path)
    os.truncate(path, path.stat().st_size - 100)
    assert_fails(tmp_path, "cut short or damaged")
    torch.save(vae_state, path)
    data = path.read_bytes()
    start = data.index(b"PK\x03\x04", data.index(b"/data/0"))
    path.write_bytes(data[:start] + b"XX" + data[start + 2 :])
    assert_fails(tmp_path, "cut short or damaged")


def test_flipped_bits_of_a_pth_are_found(tmp_path, vae_state):
    path = tmp_path / "Wan2.1_VAE.pth"
    torch.save(vae_state, path)
    whole = path.read_bytes()
    for place in np.linspace(len(whole) // 4, len(whole) * 3 // 4, 5).astype(int):  # of the tensors
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert_fails(tmp_path, "Wan2.1_VAE.pth is damaged")
