"""The paper's configuration, configs/wan.py, with components small enough for a test.

    --config=tests/tiny_pipeline.py

Its VAE and text encoder are the real ones, of small width; 9 frames of 48 x 80 pixels.
"""

import importlib.util
import pathlib

from ml_collections import ConfigDict

BACKBONE = dict(dim=48, num_heads=3, num_layers=3, ffn_dim=64, text_dim=32)
CODEC = dict(base_dim=8)
TEXT = dict(vocab_size=256, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, shared_bias=False)
LENGTH = 48


def get_config(arg: str = "") -> ConfigDict:
    path = pathlib.Path(__file__).parent.parent / "configs" / "wan.py"
    spec = importlib.util.spec_from_file_location("wan_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(arg)

    config.backbone = dict(module="wan", dtype="float32", remat="none", text_len=LENGTH, **BACKBONE)
    config.frozen_dtype = "float32"
    config.codec = dict(module="wan_vae", dtype="float32", **CODEC)
    config.text_encoder = dict(module="t5", dtype="float32", length=LENGTH, **TEXT)
    config.branch.layers = (0, 2)
    config.branch.semantic.update(basis_grid=(3, 6, 10), hidden=16)
    config.data.update(height=48, width=80, frames=9)
    config.samples.update(solver="unipc-diffusers", steps=8, shift=3.0, guidance=5.0, clips=1)

    config.steps, config.batch_size = 3, 2
    config.optimizer.warmup = 1
    config.log.every = config.checkpoint.every = config.validation.every = config.samples.every = 3
    config.validation.update(batches=1, batch_size=1)
    return config
