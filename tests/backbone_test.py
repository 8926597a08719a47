"""`run` and its visits, and what a model makes of its parts, by the backbone's own functions.

B batch, T h w latent grid, N video tokens, C model width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prophy_jax import models
from prophy_jax.models.backbone import Visit, run
from prophy_jax.models.beside.part import Model, Part
from prophy_jax.models.beside.prophy import ProPhy, RefinementConfig, SemanticConfig

DEPTH, LATENT = 5, (2, 4, 4, 16)  # 8 tokens
WAN = dict(module="wan", dim=24, num_heads=2, ffn_dim=32, text_dim=8, text_len=6, freq_dim=8)
COGVIDEOX = dict(module="cogvideox", dim=32, num_heads=2, ffn_dim=48, text_dim=8, text_len=6, time_dim=12)


def randomised(shapes, seed: int = 0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), shapes)


def inputs():
    rng = np.random.default_rng(1)
    latents = rng.standard_normal((2, *LATENT), np.float32)
    prompt = {"text": rng.standard_normal((2, 6, 8), np.float32), "text_mask": np.ones((2, 6), bool)}
    return latents, np.float32([37, 800]), prompt


@pytest.fixture(scope="module", params=[WAN, COGVIDEOX], ids=lambda spec: spec["module"])
def opened(request):
    """(backbone, its parameters, stream, cond, the streams after 0, 1, ... blocks)."""
    backbone = models.build(request.param | dict(num_layers=DEPTH))
    params = randomised(jax.eval_shape(backbone.init, jax.random.key(0)))
    latents, t, prompt = inputs()
    stream, cond = jax.jit(backbone.embed)(params, latents, t, backbone.embed_text(params, prompt["text"]))
    one = jax.jit(lambda stream, start: backbone.blocks(params["blocks"], stream, cond, start, 1))
    streams = [stream]
    for block in range(DEPTH):
        streams.append(one(streams[-1], block))
    return backbone, params, stream, cond, streams, one


@pytest.mark.parametrize("after", [(), (0,), (4,), (1, 3), (0, 1, 2, 3, 4), (0, 2, 3)])
def test_taps_are_the_streams_after_their_blocks(opened, after):
    backbone, params, stream, cond, streams, _ = opened

    @jax.jit
    def tapped(stream):
        tap = Visit(after, lambda carry, stream, x: (carry + 1, stream, (stream.video, x)), jnp.array(after))
        return run(backbone, params["blocks"], stream, cond, (tap,), jnp.int32(0))

    end, count, (out,) = tapped(stream)
    assert count == len(after)
    # The same blocks in other loops: rounding of streams of about 10.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, end, streams[-1])
    if after:
        videos, places = out
        close(videos, jnp.stack([streams[block + 1].video for block in after]))
        np.testing.assert_array_equal(places, after)
    else:
        assert out is None


def test_visits_after_the_same_block_keep_their_order(opened):
    """One adds, one doubles; the carry writes down who came."""
    backbone, params, stream, cond, _, one = opened
    added = np.float32([0.5, 0.25, 0.125])

    def add(carry, stream, x):
        return 10 * carry + 1, stream.replace(video=stream.video + x), carry

    def double(carry, stream, x):
        return 10 * carry + 2, stream.replace(video=2 * stream.video), carry

    def by_hand(order):
        own = stream
        for block in range(DEPTH):
            own = one(own, block)
            for kind in order:
                if kind == "add" and block in (0, 2, 3):
                    own = own.replace(video=own.video + added[(0, 2, 3).index(block)])
                if kind == "double" and block in (2, 4):
                    own = own.replace(video=2 * own.video)
        return own

    ends = []
    for order, written, came in (
        (("add", "double"), 11212, ([0, 1, 112], [11, 1121])),
        (("double", "add"), 12112, ([0, 12, 121], [1, 1211])),
    ):
        visits = {"add": Visit((0, 2, 3), add, added), "double": Visit((2, 4), double)}
        own = tuple(visits[kind] for kind in order)
        end, carry, outs = jax.jit(
            lambda stream, own=own: run(backbone, params["blocks"], stream, cond, own, jnp.int32(0))
        )(stream)
        assert carry == written
        for out, expected in zip(outs, came if order[0] == "add" else came[::-1], strict=True):
            np.testing.assert_array_equal(out, expected)
        want = by_hand(order)
        np.testing.assert_allclose(end.video, want.video, rtol=1e-5, atol=1e-4)  # streams of about 50
        ends.append(want.video)
    assert np.abs(ends[0] - ends[1]).max() > 0.1


@pytest.mark.parametrize("after", [(5,), (-1,), (2, 1), (1, 1)])
def test_visits_after_blocks_that_are_not_there(opened, after):
    backbone, params, stream, cond, _, _ = opened
    visit = Visit(after, lambda carry, stream, x: (carry, stream, ()))
    with pytest.raises(ValueError, match="name them once, ascending"):
        run(backbone, params["blocks"], stream, cond, (visit,), ())


# --- Parts -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Token(Part):
    """A token of its own ahead of those of the video, at no position; its end is what losses would read."""

    def init(self, key, backbone, params):
        return {"token": jax.random.normal(key, (backbone.config.dim,))}

    def enter(self, params, flow):
        video, (cos, sin) = flow.stream.video, flow.cond.rope
        token = jnp.broadcast_to(params["token"], (len(video), 1, video.shape[-1]))
        place = cos.shape[0] - video.shape[1]  # rows of text go first, where the model rotates them
        cos, sin = (jnp.insert(table, place, angle, axis=0) for table, angle in ((cos, 1.0), (sin, 0.0)))
        stream = flow.stream.replace(video=jnp.concatenate([token, video], axis=1))
        return flow._replace(stream=stream, cond=flow.cond.replace(rope=(cos, sin)))

    def leave(self, params, flow, outs):
        video = flow.stream.video
        return flow.stream.replace(video=video[:, 1:]), video[:, 0]


@dataclasses.dataclass(frozen=True)
class Bias(Part):
    """A trained vector that is added after the last block."""

    fields: tuple[str, ...] = ("category",)

    def init(self, key, backbone, params):
        return {"bias": jnp.zeros(backbone.config.dim)}

    def read(self, params, prompt):
        return prompt["category"].sum(-1)

    def leave(self, params, flow, outs):
        return flow.stream.replace(video=flow.stream.video + params["bias"]), flow.read

    def statistics(self, seen):
        return {"bias/categories": seen.mean()}


def test_a_token_of_a_part_is_attended_to(opened):
    backbone, frozen, _, _, _, _ = opened
    model = Model(backbone, {"token": Token()})
    params = {"backbone": frozen, "token": model.init_part("token", jax.random.key(1), {"backbone": frozen})}
    latents, t, prompt = inputs()
    output = jax.jit(model)(params, latents, t, prompt)

    @jax.jit
    def by_hand(latents, t, text):
        stream, cond = backbone.embed(frozen, latents, t, backbone.embed_text(frozen, text))
        rows, first = (
            len(cond.rope[0]),
            jnp.broadcast_to(params["token"]["token"], (2, 1, backbone.config.dim)),
        )
        still = jnp.array([1.0, 0.0])[:, None, None] * jnp.ones((1, 1, cond.rope[0].shape[1]))
        rope = jax.tree.map(
            lambda table, own: jnp.concatenate([table[: rows - 8], own, table[rows - 8 :]]),
            cond.rope,
            tuple(still),
        )
        stream = stream.replace(video=jnp.concatenate([first, stream.video], axis=1))
        stream = backbone.blocks(frozen["blocks"], stream, cond.replace(rope=rope))
        own = stream.video[:, 0]
        return backbone.head(frozen, stream.replace(video=stream.video[:, 1:]), cond), own

    want, token = by_hand(latents, t, prompt["text"])
    np.testing.assert_allclose(output.prediction, want, rtol=0, atol=1e-4)  # outputs of about 5
    np.testing.assert_allclose(output.seen["token"], token, rtol=1e-4, atol=1e-4)
    alone = jax.jit(backbone)(frozen, latents, t, prompt["text"])
    assert output.prediction.shape == alone.shape and np.abs(output.prediction - alone).max() > 1e-3


def two_parts(spec=WAN):
    branch = ProPhy((0, 2), SemanticConfig(LATENT[:3], hidden=8), RefinementConfig())
    model = Model(models.build(spec | dict(num_layers=3)), {"branch": branch, "bias": Bias()})
    params = {"backbone": randomised(jax.eval_shape(model.backbone.init, jax.random.key(0)))}
    for name in model.parts:
        shapes = jax.eval_shape(functools.partial(model.init_part, name), jax.random.key(0), params)
        params[name] = randomised(shapes, seed=len(params))
    return model, params


def test_a_model_without_a_part_is_the_model_built_without_it():
    model, params = two_parts()
    latents, t, prompt = inputs()
    prompt["category"] = np.eye(17, dtype=np.float32)[[3, 4]]
    assert model.fields == ("text", "text_mask", "category")
    outputs = {"both": jax.jit(model)(params, latents, t, prompt)}
    for name, kept in (("bias", ("branch",)), ("branch", ("bias",))):
        built = Model(model.backbone, {part: model.parts[part] for part in kept})
        without = model.without(name)
        assert without == built and hash(without) == hash(built) and without != model
        own = {key: params[key] for key in ("backbone", *kept)}
        outputs[name] = jax.jit(without)(params, latents, t, prompt)
        expected = jax.jit(lambda *inputs, built=built: built(*inputs))(own, latents, t, prompt)
        jax.tree.map(np.testing.assert_array_equal, outputs[name], expected)
        assert outputs[name].seen.keys() == set(kept)
        assert np.abs(outputs[name].prediction - outputs["both"].prediction).max() > 1e-2
    assert outputs["both"].seen.keys() == {"branch", "bias"}
    np.testing.assert_array_equal(outputs["both"].seen["bias"], [1, 1])
    # What the branch sees is ahead of the bias.
    jax.tree.map(
        np.testing.assert_array_equal, outputs["both"].seen["branch"], outputs["bias"].seen["branch"]
    )

    alone = model.without()
    assert (
        alone == model.without("branch", "bias") == Model(model.backbone) and alone.fields == model.fields[:2]
    )
    expected = jax.jit(model.backbone)(params["backbone"], latents, t, prompt["text"])
    np.testing.assert_array_equal(jax.jit(alone)(params, latents, t, prompt).prediction, expected)


def test_a_prompt_read_ahead_is_the_same_prompt_to_every_part():
    model, params = two_parts()
    latents, t, prompt = inputs()
    prompt["category"] = np.eye(17, dtype=np.float32)[[3, 4]]
    ahead = jax.jit(model.read_ahead)(params, prompt)
    got = jax.jit(model.predict)(params, latents, t, ahead)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5),  # sums in another order
        got,
        jax.jit(model)(params, latents, t, prompt),
    )


def test_parts_of_one_kind_start_apart():
    branch = ProPhy((0,), SemanticConfig(LATENT[:3], hidden=8))
    model = Model(models.build(WAN | dict(num_layers=2)), {"first": branch, "second": branch})
    frozen = {"backbone": randomised(jax.eval_shape(model.backbone.init, jax.random.key(0)))}
    kernels = [
        jax.jit(functools.partial(model.init_part, name))(jax.random.key(0), frozen)["semantic"]["router"]
        for name in model.parts
    ]
    assert np.abs(kernels[0]["hidden"]["kernel"] - kernels[1]["hidden"]["kernel"]).max() > 0.01
