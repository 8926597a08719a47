"""Random models of the sizes of configs/wan.py:demo_data, in the files that public ones come in.

    python -m tests.tiny_models DIR

writes DIR/Wan2.1 in the layout of diffusers and DIR/Qwen2.5-VL, by the classes of diffusers and transformers.
"""

import importlib.util
import pathlib
import sys

from tests import tiny_pipeline
from tests.late import Late
from tests.tiny_tokenizer import save_tiny_tokenizer
from tests.tiny_vlm import save_tiny_vlm

diffusers = Late("diffusers")
torch = Late("torch")
transformers = Late("transformers")  # and nothing is skipped: --help works without them

SHIFT = 3.0


def randomise(module, seed: int, scale: float = 1.0) -> None:
    """Every weight random: norms around 1, matrices by their fan-in, biases and tables small."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2 and "norm" not in name:
                parameter.copy_(scale * noise / parameter[0].numel() ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(1 + 0.2 * noise)


def random_parts() -> tuple:
    """Transformer, VAE, text encoder and scheduler of a WanPipeline: 3 blocks, width 48."""
    sizes = dict(tiny_pipeline.BACKBONE)
    heads = sizes.pop("num_heads")
    width = sizes.pop("dim") // heads
    text = {key: value for key, value in tiny_pipeline.TEXT.items() if key != "shared_bias"}
    with torch.no_grad():
        transformer = diffusers.WanTransformer3DModel(
            num_attention_heads=heads, attention_head_dim=width, **sizes
        )
        vae = diffusers.AutoencoderKLWan(**tiny_pipeline.CODEC)
        encoder = transformers.UMT5EncoderModel(
            transformers.UMT5Config(feed_forward_proj="gated-gelu", **text)
        )
    # Weights of a random text encoder are scaled down: attention is not divided by sqrt(d).
    for seed, (module, scale) in enumerate(((transformer, 1.0), (vae, 0.9), (encoder, 0.5))):
        randomise(module, seed, scale)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
    )
    return transformer.eval(), vae.eval(), encoder.eval(), scheduler


def save_pipeline(parts: tuple, folder: pathlib.Path) -> None:
    """Writes the parts and a tokenizer into `folder`, as diffusers does."""
    transformer, vae, encoder, scheduler = parts
    tokens = folder.with_name(folder.name + "-tokenizer")
    save_tiny_tokenizer(tokens, vocab_size=250)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokens)
    whole = diffusers.WanPipeline(tokenizer, encoder, vae, scheduler, transformer)
    whole.save_pretrained(folder, safe_serialization=True)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__.strip())
        sys.exit(0 if {"--help", "-h"} & set(sys.argv) else 1)
    if importlib.util.find_spec("diffusers") is None:
        sys.exit("diffusers is not installed; on Python 3.11 it comes with: pip install -e '.[test]'")
    root = pathlib.Path(sys.argv[1])
    save_pipeline(random_parts(), root / "Wan2.1")
    save_tiny_vlm(root / "Qwen2.5-VL")
