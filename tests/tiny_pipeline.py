"""configs/wan.py:demo_data, small enough for a test: 9 frames of 48 x 80 pixels, three steps.

    --config=tests/tiny_pipeline.py

Its VAE and text encoder are the real ones, of small width.
"""

import importlib.util
import pathlib

from ml_collections import ConfigDict

LENGTH = 48


def get_config(arg: str = "demo_data") -> ConfigDict:
    path = pathlib.Path(__file__).parent.parent / "configs" / "wan.py"
    spec = importlib.util.spec_from_file_location("wan_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(arg)

    config.backbone.text_len = config.text_encoder.length = LENGTH
    config.branch.semantic.basis_grid = (3, 6, 10)
    config.data.update(dir="", labels="", height=48, width=80, frames=9, buckets=())
    config.samples.update(solver="unipc-diffusers", steps=8, shift=3.0, guidance=5.0, clips=1)
    config.steps, config.batch_size = 3, 2
    config.optimizer.warmup = 1
    config.log.every = config.checkpoint.every = config.validation.every = config.samples.every = 3
    return config


def _sizes(part: str, *settings: str) -> dict:
    return {key: value for key, value in get_config()[part].items() if key not in settings}


BACKBONE = _sizes("backbone", "module", "dtype", "remat", "text_len")
CODEC = _sizes("codec", "module", "dtype")
TEXT = _sizes("text_encoder", "module", "dtype", "length")
