"""Wan2.1-T2V-1.3B and CogVideoX-5B's transformer at their real sizes, once.

Random files in the public format are converted, loaded and compared.

    make test-full      or      python -m pytest -m slow tests/full_size_test.py -s
    python -m tests.full_size_test write DIR                the random files alone, to try the commands on
    python -m tests.full_size_test write_cogvideox DIR      those of CogVideoX

Needs 35 GB of disk under TMPDIR, 20 GB of memory and, on two cores, some 25 minutes. Prints peak memory and
speed of every conversion, and how far our outputs and PyTorch's are from PyTorch's in fp32.

In bfloat16 two right implementations differ, because they round at different places. So both are compared
with the same weights computed in fp32 (each layer widened for the time it runs, which is exact): our error
must not be greater than that of the PyTorch original.
"""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.conftest import ROOT
from tests.late import late
from tests.tiny_tokenizer import save_tiny_tokenizer

torch = late("torch")
diffusers = late("diffusers")

pytestmark = pytest.mark.slow

SHARD = 2 << 30
LATENTS = (1, 2, 30, 52, 16)  # 5 frames of 240 x 416
TOKENS = 100  # of 512
# 5 frames (an even number of latents too) of 64 x 64, beside the 226 rows of text that are always read.
COGVIDEOX_LATENTS = (1, 2, 8, 8, 16)
# Folders of converted weights.
CHECKPOINTS = {
    "transformer": "wan/transformer",
    "text_encoder": "wan/text_encoder",
    "cogvideox": "cogvideox/transformer",
}
# What the configurations of the public files say, as far as it is not the default of the class.
TEXT_CONFIG = {
    "model_type": "umt5", "architectures": ["UMT5EncoderModel"], "vocab_size": 256384, "d_model": 4096,
    "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu_new", "is_gated_act": True, "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128, "pad_token_id": 0, "eos_token_id": 1,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def random_files(folder: pathlib.Path, table, stem: str, dtype: np.dtype) -> None:
    """Random weights under the diffusers names, in shards with an index; standard deviation by fan-in."""
    rng = np.random.default_rng(0)
    shapes = {name: leaf.torch_shape for leaf in table.values() for name in leaf.names}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = SHARD
    for name, shape in shapes.items():
        size = dtype.itemsize * int(np.prod(shape))
        if size > room and shards[-1]:
            shards.append({})
            room = SHARD
        shards[-1][name] = shape
        room -= size
    index = {}
    folder.mkdir(parents=True)
    for i, shard in enumerate(shards):
        file = f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name, shape in shard.items():
            noise = rng.standard_normal(shape, np.float32)
            if ("norm" in name and ".linear." not in name) or name.endswith("gamma"):
                noise = 1 + 0.1 * noise
            else:
                # T5 draws queries smaller by sqrt(64): its attention scores are not divided by that.
                scale = 0.125 if ".q." in name else 1.0
                noise *= scale / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.1
            tensors[name] = noise.astype(dtype)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def write_public(root: pathlib.Path) -> None:
    """Wan2.1-T2V-1.3B in the diffusers layout: transformer and text encoder bfloat16, VAE fp32."""
    from convert import t5, wan
    from prophy_jax.models.codecs.wan_vae import WanVAEConfig
    from prophy_jax.models.text.t5 import UMT5_XXL
    from prophy_jax.models.wan import WAN_1_3B

    half = np.dtype(ml_dtypes.bfloat16)
    weights = "diffusion_pytorch_model"
    random_files(root / "transformer", wan.dit_leaves(WAN_1_3B, "diffusers"), weights, half)
    random_files(root / "vae", wan.vae_leaves(WanVAEConfig(), "diffusers"), weights, np.dtype(np.float32))
    random_files(root / "text_encoder", t5.leaves(UMT5_XXL, "diffusers"), "model", half)
    with torch.device("meta"):
        sizes = dict(num_attention_heads=12, num_layers=30, ffn_dim=8960)
        transformer, vae = diffusers.WanTransformer3DModel(**sizes), diffusers.AutoencoderKLWan()
    transformer.save_config(root / "transformer")
    vae.save_config(root / "vae")
    (root / "text_encoder" / "config.json").write_text(json.dumps(TEXT_CONFIG))
    save_tiny_tokenizer(root / "tokenizer")
    file = root / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    pieces = tokenizer["model"]["vocab"]
    pieces += [[f"piece{i}", -20.0] for i in range(256300 - len(pieces))]  # as many as the public one has
    file.write_text(json.dumps(tokenizer))


def write_cogvideox(root: pathlib.Path) -> None:
    """The transformer of CogVideoX-5B in the diffusers layout, bfloat16."""
    from convert import cogvideox
    from prophy_jax.models.cogvideox import COGVIDEOX_5B

    table = cogvideox.dit_leaves(COGVIDEOX_5B, "diffusers")
    random_files(root / "transformer", table, "diffusion_pytorch_model", np.dtype(ml_dtypes.bfloat16))
    with torch.device("meta"):
        transformer = diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=48,
            num_layers=COGVIDEOX_5B.num_layers,
            use_rotary_positional_embeddings=True,
        )
    transformer.save_config(root / "transformer")


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    root = tmp_path_factory.mktemp("full") / "public"
    write_public(root)
    yield root
    shutil.rmtree(root.parent)


def timed(*command: str) -> tuple[float, int, str]:
    """Wall seconds, peak resident bytes and output of a command that must succeed."""
    start = time.perf_counter()
    done = subprocess.run(["/usr/bin/time", "-v", *command], cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    peak = re.search(r"Maximum resident set size \(kbytes\): (\d+)", done.stderr)
    return seconds, 1024 * int(peak[1]), done.stdout + done.stderr


def draw_inputs(folder: pathlib.Path) -> None:
    """inputs.npz: latents, t and text of the transformer, ids and mask of the text encoder."""
    rng = np.random.default_rng(1)
    text = rng.standard_normal((1, 512, 4096), np.float32)
    text[:, TOKENS:] = 0
    ids = rng.integers(3, 256000, (1, 512)).astype(np.int32)
    ids[:, TOKENS - 1], ids[:, TOKENS:] = 1, 0
    np.savez(
        folder / "inputs.npz",
        latents=rng.standard_normal(LATENTS, np.float32), t=np.float32([500]), text=text,
        ids=ids, mask=np.arange(512)[None] < TOKENS,
    )  # fmt: skip


def draw_cogvideox_inputs(folder: pathlib.Path) -> None:
    """inputs.npz: latents, t and text, whose padding is as long as the rest."""
    rng = np.random.default_rng(1)
    np.savez(
        folder / "inputs.npz",
        latents=rng.standard_normal(COGVIDEOX_LATENTS, np.float32),
        t=np.float32([499]),
        text=rng.standard_normal((1, 226, 4096), np.float32),
    )


def widened(block) -> None:
    """Computes in fp32 inside of a bfloat16 module; its weights are wide only while it runs."""
    block.register_forward_pre_hook(lambda module, _: module.float() and None)
    block.register_forward_hook(lambda module, _, out: module.bfloat16() and None)


def pytorch(what: str, folder: pathlib.Path, out: pathlib.Path) -> None:
    """The PyTorch originals: OUT holds their output in bfloat16 and in fp32."""
    inputs = {name: torch.from_numpy(value) for name, value in np.load(folder / "inputs.npz").items()}
    results = {}
    with torch.no_grad():
        if what == "transformer":
            latents = inputs["latents"].permute(0, 4, 1, 2, 3)
            for name, dtype in (("half", torch.bfloat16), ("fp32", torch.float32)):
                model = diffusers.WanTransformer3DModel.from_pretrained(
                    folder / "public" / "transformer", torch_dtype=dtype
                )
                velocity = model(latents.to(dtype), inputs["t"], inputs["text"].to(dtype), return_dict=False)[
                    0
                ]
                results[name] = velocity.float().permute(0, 2, 3, 4, 1)
        elif what == "cogvideox":
            from diffusers.models.embeddings import get_3d_rotary_pos_embed
            from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

            model = diffusers.CogVideoXTransformer3DModel.from_pretrained(
                folder / "public" / "transformer", torch_dtype=torch.bfloat16
            )
            latents, t, text = inputs["latents"].permute(0, 1, 4, 2, 3), inputs["t"], inputs["text"]
            times, grid = latents.shape[1], (latents.shape[3] // 2, latents.shape[4] // 2)
            crop = get_resize_crop_region_for_grid(grid, 45, 30)
            rope = get_3d_rotary_pos_embed(64, crop, grid, times)
            for name, dtype in (("half", torch.bfloat16), ("fp32", torch.float32)):
                if name == "fp32":  # One module at a time: all of them would take 22 GB.
                    top = model.patch_embed, model.time_embedding, model.norm_final, model.norm_out
                    for module in (*top, *model.transformer_blocks, model.proj_out):
                        widened(module)
                (velocity,) = model(
                    latents.to(dtype), text.to(dtype), t, image_rotary_emb=rope, return_dict=False
                )
                assert velocity.dtype == dtype
                results[name] = velocity.float().permute(0, 1, 3, 4, 2)
        else:
            import transformers

            model = transformers.UMT5EncoderModel.from_pretrained(
                folder / "public" / "text_encoder", torch_dtype=torch.bfloat16, attn_implementation="eager"
            )
            arguments = inputs["ids"].long(), inputs["mask"].long()
            results["half"] = model(*arguments).last_hidden_state.float()[:, :TOKENS]
            stack = model.encoder
            for block in (*stack.block, stack.final_layer_norm):
                widened(block)
            # The mask is -inf in the dtype of the embedded text, which decides that of the stream.
            embedded = stack.embed_tokens(inputs["ids"].long()).float()
            results["fp32"] = stack(inputs_embeds=embedded, attention_mask=arguments[1]).last_hidden_state[
                :, :TOKENS
            ]
            assert results["fp32"].dtype == torch.float32
    np.savez(out, **{name: value.numpy() for name, value in results.items()})


def ours(what: str, folder: pathlib.Path, out: pathlib.Path) -> None:
    """The same by the converted checkpoint, in bfloat16."""
    import jax

    from prophy_jax import models
    from prophy_jax.run import checkpoints

    spec = {
        "transformer": dict(module="wan", variant="1.3b", dtype="bfloat16"),
        "text_encoder": dict(module="t5", variant="umt5-xxl", dtype="bfloat16"),
        "cogvideox": dict(module="cogvideox", variant="5b", dtype="bfloat16"),
    }[what]
    model = models.build(spec)
    layout = jax.eval_shape(lambda key: model.init(key, "bfloat16"), jax.random.key(0))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    layout = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), layout)
    params = checkpoints.load_params(str(folder / CHECKPOINTS[what]), layout, "")
    inputs = np.load(folder / "inputs.npz")
    names = ("ids", "mask") if what == "text_encoder" else ("latents", "t", "text")
    # See `encoders.TextEncoder`: a CPU would hold all weights in fp32 as well.
    hoisting = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
    result = jax.jit(model, compiler_options=hoisting)(params, *(inputs[name] for name in names))
    result = result[:, :TOKENS] if what == "text_encoder" else result
    np.savez(out, half=np.asarray(result, np.float32))


def convert(module: str, folder: pathlib.Path, part: str, largest: int) -> None:
    """FOLDER/public/<part> -> FOLDER/<model>; cost of converting and copying printed, memory checked.

    `largest` is the size of the largest tensor in bytes.
    """
    public = folder / "public"
    size = sum(file.stat().st_size for file in (public / part).iterdir())
    dst = folder / module.rpartition(".")[2]
    arguments = ["--src", str(public), "--dst", str(dst), "--component", part]
    seconds, peak, output = timed(sys.executable, "-m", module, *arguments)
    copy, _, _ = timed("cp", "-r", str(public / part), str(folder / "copy"))
    shutil.rmtree(folder / "copy")
    cpu = sum(float(value) for value in re.findall(r"(?:User|System) time \(seconds\): ([\d.]+)", output))
    print(
        f"\n{part}: {size / 1e9:.2f} GB in {seconds:.1f} s, {size / 1e6 / seconds:.0f} MB/s; "
        f"{size / 1e6 / cpu:.0f} MB per second of processor time; cp took {copy:.1f} s "
        f"({seconds / copy:.2f} times); peak {peak / 1e6:.0f} MB"
    )
    assert peak <= 2.5 * largest + 500e6


def compare(what: str, folder: pathlib.Path) -> None:
    """Outputs in bfloat16, PyTorch's and ours from the converted weights, with PyTorch's in fp32."""
    results = {}
    for who in ("pytorch", "ours"):
        file = folder / f"{who}_{what}.npz"
        seconds, peak, _ = timed(
            sys.executable, "-m", "tests.full_size_test", who, what, str(folder), str(file)
        )
        results |= {f"{who} {name}": value for name, value in np.load(file).items()}
        print(f"\n{what}, {who}: {seconds:.0f} s, peak {peak / 1e9:.1f} GB")
    truth = results["pytorch fp32"]
    errors = {name: np.sqrt(np.mean((value - truth) ** 2)) for name, value in results.items()}
    print({name: f"{error / truth.std():.2e}" for name, error in errors.items()}, "of", truth.std())
    assert truth.std() > 0.1 and np.isfinite(truth).all()
    assert errors["ours half"] <= errors["pytorch half"]
    # Roundings of 8 bits through 30 blocks or more; another tensor in its place is as far off as it is large.
    assert errors["ours half"] < 0.05 * truth.std()


@pytest.fixture
def folder(tmp_path):
    yield tmp_path
    shutil.rmtree(tmp_path)


# Before the others, whose files stay until the last of them is done.
def test_cogvideox(folder):
    write_cogvideox(folder / "public")
    convert("convert.cogvideox", folder, "transformer", 12288 * 3072 * 2)
    draw_cogvideox_inputs(folder)
    compare("cogvideox", folder)


@pytest.fixture(scope="module")
def converted(public):
    """The folder that `public` is in, with the converted weights."""
    largest = {"transformer": 8960 * 1536 * 2, "vae": 384 * 384 * 27 * 4, "text_encoder": 256384 * 4096 * 2}
    for part, tensor in largest.items():
        convert("convert.wan", public.parent, part, tensor)
    draw_inputs(public.parent)
    return public.parent


@pytest.mark.parametrize("what", ["transformer", "text_encoder"])
def test_outputs(converted, what):
    compare(what, converted)


def test_every_tensor_comes_back(converted):
    """Exported again, every tensor of the transformer has its bytes."""
    from safetensors import safe_open

    back = converted / "back"
    _, peak, _ = timed(
        sys.executable, "-m", "convert.export", "--checkpoint", str(converted / "wan" / "transformer"),
        "--format", "diffusers", "--dst", str(back),
    )  # fmt: skip
    print(f"\nexport of the transformer: peak {peak / 1e6:.0f} MB")
    tensors = []
    for folder in (converted / "public" / "transformer", back / "transformer"):
        handles = [safe_open(file, "numpy") for file in sorted(folder.glob("*.safetensors"))]
        tensors.append({name: handle for handle in handles for name in list(handle.keys())})
    assert tensors[0].keys() == tensors[1].keys() and len(tensors[0]) == 825
    for name in tensors[0]:
        want, got = (handles[name].get_tensor(name) for handles in tensors)
        assert want.dtype == got.dtype and want.tobytes() == got.tobytes(), name


if __name__ == "__main__":
    role, *places = sys.argv[1:]
    if role.startswith("write"):
        {"write": write_public, "write_cogvideox": write_cogvideox}[role](pathlib.Path(*places))
    else:
        {"pytorch": pytorch, "ours": ours}[role](places[0], *map(pathlib.Path, places[1:]))
