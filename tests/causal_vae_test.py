"""What the causal VAEs share: pieces of a clip and tiles of a picture, put together again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prophy_jax.models.codecs import causal_vae


@pytest.mark.parametrize(
    ("frames", "first", "piece"), [(1, 1, 4), (9, 1, 4), (9, 3, 2), (8, 2, 2), (17, 9, 8)]
)
def test_pieces_of_a_running_sum_are_the_whole(frames, first, piece):
    """Each frame twice and the sum with the frame before, which the history carries into the next piece."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, frames, 3)), jnp.float32)

    def network(params, x, history):
        x = history.prepend(x, jnp.zeros_like(x[:, :1]))
        return (params * (x[:, 1:] + x[:, :-1])).repeat(2, axis=1)

    out = causal_vae.in_pieces(network, 3.0, x, first, piece, 2 * piece)
    before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    np.testing.assert_allclose(out, (3 * (x + before)).repeat(2, axis=1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "tile"),
    [
        ((9, 14), (6, 4)),
        ((4, 16), (4, 4)),
        ((17, 3), (8, 3)),
        ((10, 5), (8, 6)),
        ((10, 13), ((6, 5), (8, 4))),  # rows and columns
    ],
)
def test_tiles_of_the_identity_are_the_whole(size, tile):
    """Wherever tiles agree blending changes nothing: seams and ends fall in the right places."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 1, *size, 2)), jnp.float32)

    def double(x):
        return x.repeat(2, axis=2).repeat(2, axis=3)

    @jax.jit
    def run(x):
        twice = 2 * np.array(tile)
        same = causal_vae.tiled(lambda tile: tile, x, tile, tile)
        doubled = causal_vae.tiled(double, x, tile, twice)
        halved = causal_vae.tiled(lambda tile: tile[:, :, ::2, ::2], double(x), twice, tile)
        return same, doubled, halved

    for out, expected in zip(run(x), (x, double(x), x), strict=True):
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6)


def test_tiles_fade_linearly():
    """Tiles of a constant each, its first column's number: 0, 4 and 8."""
    x = jnp.broadcast_to(jnp.arange(12.0)[:, None], (1, 1, 6, 12, 1))

    @jax.jit
    def run(x):
        return causal_vae.tiled(
            lambda tile: jnp.broadcast_to(tile[:, :, :, :1], tile.shape), x, (6, 4), (6, 4)
        )

    # The overlap of 2 starts with the tile before and is half and half after one column.
    expected = [0, 0, 0, 0, 0, 2, 4, 4, 4, 6, 8, 8]
    np.testing.assert_allclose(run(x)[0, 0, 3, :, 0], expected, rtol=0, atol=1e-6)
