"""What reading the prompt once, ahead of the sampler's steps, saves in each step.

    python benchmarks/text_ahead.py [--shape=2x60x104] [--valid=127] [--layers=2] [--repeat=5]

Times one forward pass of the Wan2.1-1.3B transformer at its real width, some layers deep, three ways, in
turns:

    each step   text embedding, keys and values of the text computed in the pass
    ahead       keys and values of all 512 rows given
    shortened   keys and values of the valid rows and one row for all padding given

Prints the smallest time of each and the ratios of the smallest times, with the largest difference of outputs.
`valid` is the length of the prompt in tokens.
"""

import argparse
import time

import jax
import jax.numpy as jnp

from prophy_jax.models import wan


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="2x60x104", help="latents, T x h x w")
    parser.add_argument("--valid", type=int, default=127, help="valid rows of text")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    shape = tuple(int(side) for side in options.shape.split("x"))

    model = wan.build(variant="1.3b", num_layers=options.layers)
    params = jax.jit(model.init)(jax.random.key(0))
    params["head"]["out"]["kernel"] += 0.01  # zero at the start, which would hide any difference
    mask = jnp.arange(model.config.text_len)[None] < options.valid
    text = jax.random.normal(jax.random.key(1), (1, model.config.text_len, model.config.text_dim))
    text = jnp.where(mask[..., None], text, 0)
    latents, t = jax.random.normal(jax.random.key(2), (1, *shape, 16)), jnp.array([500.0])

    tokens = model.embed_text(params, text)

    @jax.jit
    def given(params, latents, t, ahead):
        stream, cond = model.embed(params, latents, t, tokens)  # whose text the blocks do not read
        return model.head(params, model.blocks(params["blocks"], stream, cond, ahead=ahead), cond)

    read = jax.jit(model.text_ahead, static_argnums=3)
    rows = 32 * (options.valid // 32 + 1)
    every, whole, short = jax.jit(model), *(read(params["blocks"], tokens, mask, n) for n in (None, rows))
    ways = {
        "each step": lambda: every(params, latents, t, text),
        "ahead": lambda: given(params, latents, t, whole),
        "shortened": lambda: given(params, latents, t, short),
    }
    outputs = {name: jax.block_until_ready(run()) for name, run in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeat):
        for name, run in ways.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    first = min(seconds["each step"])
    device = jax.devices()[0].device_kind
    print(f"{device}: {options.layers} layers, latents {shape}, {options.valid} valid rows of text")
    for name in ways:
        best, apart = min(seconds[name]), jnp.abs(outputs[name] - outputs["each step"]).max()
        print(f"{name:10} {best:8.3f} s   {first / best:5.2f} times as fast   differs by {apart:.1e}")


if __name__ == "__main__":
    main()
