"""Public configurations small enough for a test; VAEs and text encoders are the real ones, of small width.

--config=tests/tiny_pipeline.py     configs/wan.py:demo_data with 9 frames of 48 x 80 pixels, three steps
cogvideox(VARIANT)                  configs/cogvideox.py:VARIANT with 9 or 17 frames of 24 x 40 pixels
"""

import importlib.util
import pathlib
from types import ModuleType

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
