"""FLOPs counted from traced programs, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from prophy_jax import models
from prophy_jax.plan import flops
from prophy_jax.plan.traced import trace
from tests.conftest import get_config

# Below: n tokens of video, s rows of text, d model width, f feed-forward width, e time width.


def shaped(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_operations_that_are_executed_are_counted_with_loops_and_without_dead_code():
    def function(x):
        x @ x @ x  # unused
        return jax.lax.scan(lambda c, _: (c @ c, None), x, length=7)[0]

    assert flops.count(jax.make_jaxpr(function)(shaped(8, 8))) == 7 * 2 * 8**3
    assert flops.model_flops(function, shaped(8, 8)) == 7 * 2 * 8**3


def test_of_a_condition_the_larger_branch_counts_and_unknown_loops_as_often_as_is_said():
    def function(x, last):
        def body(i, x):
            return jax.lax.cond(i > 1, lambda x: x @ x @ x, lambda x: x @ x, x)

        return jax.lax.fori_loop(0, last, body, x)

    last = jax.ShapeDtypeStruct((), jnp.int32)
    assert flops.model_flops(function, shaped(8, 8), last, unknown_length=5) == 5 * 2 * 2 * 8**3


# --- The train steps of the paper by hand ---------------------------------------------------------------


def wan_by_hand(config, n):
    """Of a block, of the backward pass of a frozen one, and of the rest of a forward pass."""
    s, d, f = config.text_len, config.dim, config.ffn_dim
    projections = 12 * n * d * d + 4 * s * d * d  # self q k v o, cross q o; cross k v
    block = projections + 4 * n * n * d + 4 * n * s * d + 4 * n * d * f
    # Linear layers once, self-attention twice, cross-attention once (queries alone).
    frozen = 12 * n * d * d + 4 * n * d * f + 8 * n * n * d + 4 * n * s * d
    patches = 2 * n * d * config.patch_volume * (config.in_channels + config.out_channels)
    text, time = 2 * s * d * (config.text_dim + d), 2 * d * (config.freq_dim + 7 * d)
    return block, frozen, patches + text + time


def cogvideox_by_hand(config, n):
    s, d, f, e = config.text_len + n, config.dim, config.ffn_dim, config.time_dim
    block = (
        8 * s * d * d + 4 * s * d * f + 4 * s * s * d + 24 * e * d
    )  # q k v o, MLP, scores, six vectors twice
    # Linear layers once, attention twice, the time's modulation not at all.
    frozen = 8 * s * d * d + 4 * s * d * f + 8 * s * s * d
    patches = 2 * n * d * config.patch_volume * (config.in_channels + config.out_channels)
    text, time = 2 * config.text_len * config.text_dim * d, 2 * d * e + 2 * e * e + 4 * e * d
    return block, frozen, patches + text + time


BY_HAND = {"wan": wan_by_hand, "cogvideox": cogvideox_by_hand}


def cogvideox_config():
    from configs import cogvideox

    return cogvideox.get_config()


@pytest.mark.parametrize("get", [lambda: get_config(""), cogvideox_config], ids=["wan-1.3b", "cogvideox-5b"])
def test_the_papers_train_steps_by_hand(get):
    """The hand count leaves out routers, the branch's embedding, the gradient through the head and losses.

    It counts the text's keys and values among what a trained block gives its input a gradient of. Together
    they are 2e-5 of a step of Wan-1.3B and 3e-5 of one of CogVideoX-5B.
    """
    config = get()
    config.accumulation = 1
    module = config.backbone.module
    traced = trace(config, "train", "tpu", 1)
    backbone, n = models.build(config.backbone).config, traced.tokens
    block, frozen, rest = BY_HAND[module](backbone, n)
    layers, experts = config.parts.branch.layers, 8
    expected = backbone.num_layers * block + rest
    expected += (backbone.num_layers - layers[0] - 1) * frozen + 3 * len(layers) * block
    expected += 3 * (len(layers) + experts) * 2 * n * backbone.dim**2
    assert traced.model_flops == pytest.approx(expected, rel=5e-5)
    assert traced.flops > 1.2 * traced.model_flops  # remat
