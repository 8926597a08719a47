"""Public configurations small enough for a test; VAEs and text encoders are the real ones, of small width.

--config=tests/tiny_pipeline.py     configs/wan.py:demo_data with 9 frames of 48 x 80 pixels, three steps
    ...:demo_data,lora              an arm of it
cogvideox(VARIANT)                  configs/cogvideox.py:VARIANT with 9 or 17 frames of 24 x 40 pixels
"""

import importlib.util
import json
import pathlib
from types import ModuleType

import numpy as np
from ml_collections import ConfigDict

LENGTH = 48


def _load(file: str) -> ModuleType:
    path = pathlib.Path(__file__).parent.parent / "configs" / file
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def get_config(arg: str = "demo_data") -> ConfigDict:
    config = _load("wan.py").get_config(arg)

    config.backbone.text_len = config.text_encoder.length = LENGTH
    if "branch" in config.parts:
        config.parts.branch.semantic.basis_grid = (3, 6, 10)
    config.data.update(dir="", height=48, width=80, frames=9, buckets=())
    config.data.side.alignment = ""
    config.samples.update(solver="unipc-diffusers", steps=8, shift=3.0, guidance=5.0, clips=1)
    config.steps, config.batch_size = 3, 2
    config.optimizer.warmup = 1
    config.log.every = config.checkpoint.every = config.validation.every = config.samples.every = 3
    return config


def cogvideox(variant: str = "") -> ConfigDict:
    """To sample with: what tells the variants apart is as in the file, sizes and dtypes are not.

    3 x 5 tokens a frame, on positions counted on 3 x 4: neither scale nor shape are those of training.
    """
    config = _load("cogvideox.py").get_config(variant)
    config.frozen_dtype = "float32"
    sizes = dict(dim=48, num_heads=3, num_layers=3, ffn_dim=192, text_dim=24, time_dim=20, base_grid=(3, 4))
    config.backbone.update(**sizes, text_len=LENGTH, dtype="float32", remat="none")
    config.codec.update(block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, tile=None)
    text = dict(vocab_size=256, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4)
    config.text_encoder.update(**text, length=LENGTH, dtype="float32")
    config.parts, config.losses, config.batch_size = {}, {}, 0
    config.optimizer.groups = (("backbone/", None),)
    config.data.update(height=24, width=40, frames=17 if "lead" in config.codec else 9)
    config.samples.steps = 8
    return config


def _sizes(part: str, *settings: str) -> dict:
    return {key: value for key, value in get_config()[part].items() if key not in settings}


BACKBONE = _sizes("backbone", "module", "dtype", "remat", "text_len")
CODEC = _sizes("codec", "module", "dtype")
TEXT = _sizes("text_encoder", "module", "dtype", "length")


# --- Public files and clips of that size -----------------------------------------------------------


def save_public(folder: pathlib.Path) -> None:
    """Writes random weights under the official names, with their config.json and tokenizer."""
    from safetensors.numpy import save_file

    from convert import t5, wan
    from prophy_jax import models
    from tests.tiny_tokenizer import save_tiny_tokenizer

    save_tiny_tokenizer(folder / "google" / "umt5-xxl")
    for seed, (module, leaves, sizes, name) in enumerate(
        (
            ("wan", wan.dit_leaves, BACKBONE, "diffusion_pytorch_model"),
            ("wan_vae", wan.vae_leaves, CODEC, "Wan2.1_VAE"),
            ("t5", t5.leaves, TEXT, "models_t5_umt5-xxl-enc-bf16"),
        )
    ):
        table = leaves(models.build({"module": module, **sizes}).config, "official")
        shapes = {name: leaf.torch_shape for leaf in table.values() for name in leaf.names}
        save_file(_random_tensors(shapes, seed), folder / f"{name}.safetensors")
    fields = {"model_type": "t2v", "in_dim": 16, "out_dim": 16, **BACKBONE}
    (folder / "config.json").write_text(json.dumps(fields))


def save_lora(path: pathlib.Path) -> None:
    """Writes random adapters of the attention of `save_public`'s backbone, as diffusers does."""
    from safetensors.numpy import save_file

    from convert import export, lora
    from prophy_jax import models
    from prophy_jax.models.beside.lora import Lora

    backbone = models.build({"module": "wan", **BACKBONE})
    part = Lora(2, 4.0, ("backbone/blocks/.*attn.*",))
    table = lora.adapter_leaves(backbone, part, export.FORMS["wan"], "diffusers")
    shapes = {name: leaf.torch_shape for leaf in table.values() for name in leaf.names}
    save_file(_random_tensors(shapes, 3), path)


def _random_tensors(shapes, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.standard_normal(shape, np.float32)
        if "norm" in name or name.endswith("gamma"):
            return 1 + 0.2 * noise
        return noise * (0.5 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.1)

    return {name: np.asarray(draw(name, shape), np.float32) for name, shape in shapes.items()}


def save_clips(folder: pathlib.Path) -> None:
    """Writes three captioned clips in WISA-80K's layout."""
    from prophy_jax.data.sources import video

    (folder / "videos").mkdir(parents=True)
    listed = []
    for i in range(3):
        frames = np.full((12, 48, 80, 3), 40, np.uint8)
        for t in range(12):
            frames[t, 3 * t : 3 * t + 8, 20 * i + 5 : 20 * i + 15] = (255, 60 * i, 0)
        video.write_mp4(folder / "videos" / f"{i}.mp4", frames, 16)
        annotation = {"q0": "collision", "q1": "none", "q2": "none"}
        record = {"video_name": f"{i}.mp4", "captions": f"A ball {i} falls.", "label": "Collision"}
        listed.append({**record, "physical_annotation": annotation})
    (folder / "wisa-80k.json").write_text(json.dumps(listed))
