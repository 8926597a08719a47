"""The CogVideoX transformers without torch: recorded values, counts, the seam, numerics, adapters."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from prophy_jax.models import attention, cogvideox, layers
from prophy_jax.models import build as build_model
from prophy_jax.models.beside.part import Model
from prophy_jax.models.beside.prophy import ProPhy, RefinementConfig, SemanticConfig, cast_kernels
from prophy_jax.plan import flops
from prophy_jax.run import optim
from prophy_jax.run.errors import UserError
from tests.counting import attention_calls, equations


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


# --- Recorded values ---------------------------------------------------------------------------------

# ours: diffusers
TOP = {
    "embed/patch": "patch_embed.proj",
    "embed/text": "patch_embed.text_proj",
    "embed/time_in": "time_embedding.linear_1",
    "embed/time_out": "time_embedding.linear_2",
    "head/norm1": "norm_final",
    "head/norm2": "norm_out.norm",
    "head/modulation": "norm_out.linear",
    "head/out": "proj_out",
}
BLOCK = {
    "norm1/modulation": "norm1.linear",
    "norm1/norm": "norm1.norm",
    "attn/q": "attn1.to_q",
    "attn/k": "attn1.to_k",
    "attn/v": "attn1.to_v",
    "attn/o": "attn1.to_out.0",
    "attn/norm_q": "attn1.norm_q",
    "attn/norm_k": "attn1.norm_k",
    "norm2/modulation": "norm2.linear",
    "norm2/norm": "norm2.norm",
    "ffn/up": "ff.net.0.proj",
    "ffn/down": "ff.net.2",
}


def diffusers_names(config) -> dict[str, tuple[str, ...]]:
    """{path of our leaf: its diffusers names}, one per layer in blocks."""
    tree = jax.eval_shape(cogvideox.CogVideoX(config).init, jax.random.key(0))
    names = {}
    for path in traverse_util.flatten_dict(tree, sep="/"):
        module, _, last = path.rpartition("/")
        suffix = ".bias" if last == "bias" else ".weight"
        if module in TOP:
            names[path] = (TOP[module] + suffix,)
        else:
            name = BLOCK[module.removeprefix("blocks/")] + suffix
            names[path] = tuple(f"transformer_blocks.{i}.{name}" for i in range(config.num_layers))
    return names


def diffusers_shapes(config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the PyTorch tensors."""
    tree = jax.eval_shape(cogvideox.CogVideoX(config).init, jax.random.key(0))
    flat, shapes = traverse_util.flatten_dict(tree, sep="/"), {}
    for path, names in diffusers_names(config).items():
        shape = flat[path].shape[1:] if path.startswith("blocks/") else flat[path].shape
        if path == "embed/patch/kernel" and config.patch_size[0] == 1:  # a convolution over frames
            shape = (config.dim, config.in_channels, *config.patch_size[1:])
        elif path.endswith("kernel"):
            shape = shape[::-1]
        shapes |= dict.fromkeys(names, shape)
    return shapes


def from_diffusers(tensors, config):
    """Our tree of NumPy tensors under their diffusers names."""
    tree = {}
    for path, names in diffusers_names(config).items():
        pieces = [tensors[name] for name in names]
        if path.endswith("kernel"):  # features of a patch are in PyTorch's order (c, pt, ph, pw)
            pieces = [piece.reshape(len(piece), -1).T for piece in pieces]
        tree[path] = jnp.asarray(np.stack(pieces) if path.startswith("blocks/") else pieces[0])
    return traverse_util.unflatten_dict(tree, sep="/")


RECORDED = dict(dim=32, num_heads=2, num_layers=2, ffn_dim=128, text_dim=24, text_len=5, time_dim=20)
RECORDED |= dict(in_channels=4, out_channels=4, base_grid=(3, 4))
# Fields, frames, [mean, standard deviation, sum of absolute values], values of (B, T, c, h, w) by index.
GOLDEN = {
    "rope_crop": (
        {},
        3,
        [-0.001860, 0.295776, 276.3565],
        {0: -0.251366, 1: -0.452057, 2: 0.196366, 384: 0.295355, 576: 0.059215, 1150: 0.321249}
        | {1151: -0.476827},
    ),
    "sincos": (
        dict(positions="sincos"),
        3,
        [-0.028059, 0.259578, 244.3167],
        {0: -0.165023, 1: 0.291677, 2: 0.031647, 384: -0.287373, 576: -0.063142, 1150: -0.120617}
        | {1151: -0.310566},
    ),
    "rope_slice": (
        dict(positions="rope_slice", patch_size=(2, 2, 2)),
        4,
        [0.007415, 0.289015, 356.4282],
        {0: -0.017985, 1: 0.290190, 2: -0.507543, 512: 0.159721, 768: 0.040622, 1534: -0.437073}
        | {1535: -0.089289},
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_output_has_the_recorded_values(case):
    fields, frames, moments, values = GOLDEN[case]
    model = cogvideox.build(**RECORDED, **fields)
    rng, tensors = np.random.RandomState(0), {}
    for name, shape in sorted(diffusers_shapes(model.config).items()):
        tensor = 0.05 * rng.standard_normal(math.prod(shape)).reshape(shape)
        is_scale = name.endswith("weight") and len(shape) == 1
        tensors[name] = (tensor + is_scale).astype(np.float32)
    rng = np.random.RandomState(1)
    latents = rng.standard_normal((2, frames, 4, 6, 8)).astype(np.float32)
    text = rng.standard_normal((2, 5, 24)).astype(np.float32)
    params = from_diffusers(tensors, model.config)
    out = jax.jit(model)(params, latents.transpose(0, 1, 3, 4, 2), jnp.array([999, 37]), text)
    out = np.asarray(out, np.float64).transpose(0, 1, 4, 2, 3)
    # Recorded in fp32 with six decimals; fp32 and fp64 differ by 3e-7, the sum by 1e-4 from its last digit.
    np.testing.assert_allclose([out.mean(), out.std()], moments[:2], rtol=0, atol=2e-6)
    np.testing.assert_allclose(np.abs(out).sum(), moments[2], rtol=0, atol=3e-4)
    got = out.ravel()[list(values)]
    np.testing.assert_allclose(got, list(values.values()), rtol=0, atol=2e-6)


def test_rope_tables_have_the_recorded_values():
    cos, sin = cogvideox.rope_tables(cogvideox.COGVIDEOX_5B, (13, 30, 45), text_len=226)
    assert cos.shape == sin.shape == (17776, 32)
    # Rows of text are not rotated.
    assert (cos[:226] == 1).all() and (sin[:226] == 0).all() and not (cos[226 + 1] == 1).all()
    expected = {
        1: (
            [1, 1, 1, 1, 1, 1, 0.540302, 0.894198, 1.0],
            [0, 0, 0, 0, 0, 0, 0.841471, 0.447671, 0.000215],
        ),
        45: (
            [1, 1, 1, 0.540302, 0.894198, 1.0, 1, 1, 1],
            [0, 0, 0, 0.841471, 0.447671, 0.000215, 0, 0, 0],
        ),
        1350: (
            [0.540302, 0.950415, 1.0, 1, 1, 1, 1, 1, 1],
            [0.841471, 0.310984, 0.000316, 0, 0, 0, 0, 0, 0],
        ),
        17549: (
            [0.843854, -0.794179, 0.999993, -0.748058, 0.626114, 0.999981, 0.999843, -0.002639, 0.999955],
            [-0.536573, -0.607683, 0.003795, -0.663634, 0.779732, 0.006248, 0.017702, 0.999997, 0.009479],
        ),
    }
    pairs = jnp.array([0, 1, 7, 8, 9, 19, 20, 21, 31])  # first, second and last of each axis
    for token, (want_cos, want_sin) in expected.items():
        # Half a unit of the sixth decimal; the recorded angles were rounded to fp32, up to 44 of them.
        np.testing.assert_allclose(cos[226 + token, pairs], want_cos, rtol=0, atol=3e-6)
        np.testing.assert_allclose(sin[226 + token, pairs], want_sin, rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    ("grid", "rows", "columns"),
    [
        ((30, 45), [0, 1, 29], [0, 1, 44]),
        ((48, 85), [2, 2.519947, 26.4375], [0, 0.529412, 44.470588]),
        ((45, 30), [0, 0.666667, 29.333333], [12, 12.652874, 30.933333]),
        ((30, 30), [0, 1, 29], [8, 8.990805, 36.733333]),
        ((1, 1), [0], [8]),
    ],
)
def test_rows_and_columns_are_scaled_to_the_base_grid(grid, rows, columns):
    got = cogvideox.crop_positions(grid, (30, 45))
    for positions, side, want in zip(got, grid, (rows, columns), strict=True):
        assert len(positions) == side
        np.testing.assert_allclose(positions[[0, 1, -1][: max(1, len(want))][: len(want)]], want, atol=1e-6)
        np.testing.assert_allclose(np.diff(positions, 2), 0, atol=1e-12)


def test_sliced_positions_count_from_zero():
    grid = (3, 48, 85)
    cos, sin = cogvideox.rope_tables(cogvideox.COGVIDEOX_1_5_5B, grid, text_len=2)
    token = 2 + (2 * 48 + 47) * 85 + 84  # the last
    np.testing.assert_allclose(cos[token, jnp.array([0, 8, 20])], np.cos([2, 47, 84]), atol=1e-7)
    np.testing.assert_allclose(sin[token, jnp.array([0, 8, 20])], np.sin([2, 47, 84]), atol=1e-7)
    cropped = dataclasses.replace(cogvideox.COGVIDEOX_1_5_5B, positions="rope_crop")
    assert np.abs(cogvideox.rope_tables(cropped, grid, 2)[0] - cos).max() > 0.1


def test_time_sinusoid_has_the_recorded_values():
    out = np.asarray(layers.time_sinusoid(jnp.array([999]), 3072))[0]
    indices = [0, 1, 2, 1535, 1536, 1537, 3071]
    expected = [0.999650, 0.959839, 0.807527, 0.994954, -0.026461, 0.280553, 0.100332]
    # A frequency rounded to fp32 (6e-8, twice) turns into a phase error of up to 1e-4 at t = 999.
    np.testing.assert_allclose(out[indices], expected, rtol=0, atol=1e-4)


def test_sincos_table_has_the_recorded_values():
    table = np.asarray(cogvideox.sincos_table((13, 30, 45), 1920))
    assert table.shape == (17550, 1920) and table.dtype == np.float32
    expected = {
        1: {0: 0, 240: 1, 480: 0.508407, 481: 0.496760, 840: 0.861117, 841: 0.867888, 1200: 0, 1560: 1},
        45: {480: 0, 840: 1, 1200: 0.508407, 1201: 0.496760, 1560: 0.861117},
        1350: {0: 0.841471, 1: 0.820537, 240: 0.540302},
        17549: {0: -0.536573, 480: -0.995465, 481: -0.772492, 840: -0.095134, 1200: 0.238962}
        | {1560: -0.971029, 1919: 0.999999},
    }
    for token, values in expected.items():
        # Half a unit of the sixth decimal, and one fp32 rounding.
        np.testing.assert_allclose(table[token, list(values)], list(values.values()), rtol=0, atol=6e-7)


@pytest.mark.parametrize(
    ("variant", "parameters", "tensors"),
    [("2b", 1_693_783_872, 736), ("5b", 5_570_283_072, 1024), ("1.5-5b", 5_570_676_352, 1024)],
)
def test_public_sizes_have_the_public_parameter_counts(variant, parameters, tensors):
    model = cogvideox.build(variant)
    tree = jax.eval_shape(lambda key: model.init(key, jnp.bfloat16), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == parameters
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(tree))
    assert len(diffusers_shapes(model.config)) == tensors
    assert sum(map(math.prod, diffusers_shapes(model.config).values())) == parameters


@pytest.mark.parametrize(
    ("variant", "latents", "tokens", "tera"),
    [
        ("2b", (13, 60, 90, 16), 17550, 119.997),
        ("5b", (13, 60, 90, 16), 17550, 332.198),
        ("1.5-5b", (22, 96, 170, 16), 44880, 1479.181),
    ],
)
def test_forward_flops_have_the_recorded_values(variant, latents, tokens, tera):
    model = cogvideox.build(variant)
    assert math.prod(model.grid(latents)) == tokens
    params = jax.eval_shape(model.init, jax.random.key(0))

    def count(batch):
        text = (226, model.config.text_dim)
        shapes = [jax.ShapeDtypeStruct((batch, *shape), "float32") for shape in (latents, (), text)]
        return flops.model_flops(model, params, *shapes)

    assert round(count(1) / 1e12, 3) == tera
    assert count(3) == 3 * count(1)


def test_attention_by_hand():
    """In float64, with queries and keys so small that the epsilon of their norms, 1e-6, decides."""
    config = cogvideox.build(**RECORDED).config
    module = cogvideox.CogVideoXAttention(config, jnp.float32, attention.attention)
    x = np.random.default_rng(0).standard_normal((1, 4, 32), np.float32)
    params = randomised(jax.eval_shape(module.init, jax.random.key(0), x, None)["params"])
    for name in "qk":
        params[name] = jax.tree.map(lambda leaf: 1e-3 * leaf, params[name])
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def heads(name):
        y = x[0] @ p[name]["kernel"] + p[name]["bias"]
        return y.reshape(4, 2, 16).transpose(1, 0, 2)  # (heads, S, head_dim)

    def norm(y, affine):
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
        return y * affine["scale"] + affine["bias"]

    q, k, v = norm(heads("q"), p["norm_q"]), norm(heads("k"), p["norm_k"]), heads("v")
    weights = np.exp(q @ k.swapaxes(1, 2) / 4)
    out = (weights / weights.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(4, 32)
    want = out @ p["o"]["kernel"] + p["o"]["bias"]
    got = module.apply({"params": params}, x, None)[0]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)  # fp32 products of width 32


# --- The seam ----------------------------------------------------------------------------------------

LATENT, TEXT = (3, 4, 6, 4), (5, 8)  # 18 tokens, 23 with those of the text
SIZES = dict(dim=32, num_heads=2, num_layers=3, ffn_dim=48, text_dim=8, text_len=5, time_dim=12)
SIZES |= dict(in_channels=4, out_channels=4, base_grid=(2, 4))


def randomised(tree, seed: int = 0):
    """Every leaf random, biases and norms included."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(1 + 0.2 * noise if path[-1].key == "scale" else 0.2 * noise)

    return jax.tree_util.tree_map_with_path(draw, tree)


@pytest.fixture(scope="module")
def tiny():
    """(model, params, latents, t, text) with three layers and a batch of two."""
    model = cogvideox.build(**SIZES)
    params = randomised(jax.eval_shape(model.init, jax.random.key(0)))
    rng = np.random.default_rng(1)
    latents, text = (jnp.asarray(rng.standard_normal((2, *s), np.float32)) for s in (LATENT, TEXT))
    return model, params, latents, jnp.array([37, 870]), text


@pytest.fixture(scope="module")
def embedded(tiny):
    """(stream, cond) of the tiny model's inputs."""
    model, params, latents, t, text = tiny
    return jax.jit(model.embed)(params, latents, t, model.embed_text(params, text))


def assert_streams_close(got, want, atol):
    for part in ("video", "text"):
        np.testing.assert_allclose(getattr(got, part), getattr(want, part), rtol=1e-6, atol=atol)


def test_scan_equals_a_loop_over_single_blocks(tiny, embedded):
    model, params = tiny[:2]
    stream, cond = embedded
    scanned = model.blocks(params["blocks"], stream, cond)
    looped = stream
    for i in range(3):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], params["blocks"])
        before, looped = looped, model.blocks(layer, looped, cond)
        for part in ("video", "text"):  # every block changes both
            assert np.abs(getattr(looped, part) - getattr(before, part)).max() > 0.1
    # The same operations; XLA may order a sum differently in a loop of three than of one.
    assert_streams_close(scanned, looped, atol=1e-5)


def test_blocks_compose(tiny, embedded):
    model, params = tiny[:2]
    stream, cond = embedded
    whole = model.blocks(params["blocks"], stream, cond)
    parts = model.blocks(params["blocks"], stream, cond, 0, 2)
    parts = jax.jit(lambda start: model.blocks(params["blocks"], parts, cond, start, 1))(2)
    assert_streams_close(whole, parts, atol=1e-5)  # as above, in another program
    nothing = model.blocks(params["blocks"], stream, cond, 1, 0)
    jax.tree.map(np.testing.assert_array_equal, nothing, stream)
    for start, count in ((0, 4), (2, -1), (-1, 3)):
        with pytest.raises(ValueError, match="stack of 3"):
            model.blocks(params["blocks"], stream, cond, start, count)


def test_samples_of_a_batch_do_not_mix(tiny):
    model, params, latents, t, text = tiny
    both = jax.jit(model)(params, latents, t, text)
    alone = jax.jit(model)(params, latents[1:], t[1:], text[1:])
    # A batch of another size sums in another order; outputs are about 1.
    np.testing.assert_allclose(both[1:], alone, rtol=0, atol=1e-5)
    assert np.abs(jax.jit(model)(params, latents, t[::-1], text) - both).max() > 1e-3


def test_text_is_a_set_and_all_of_it_is_read(tiny):
    """Text tokens have no position, and there is no mask: rows of zeros count."""
    model, params, latents, t, text = tiny
    run = jax.jit(model)
    out = run(params, latents, t, text)
    # Sums over the keys in another order.
    np.testing.assert_allclose(run(params, latents, t, text[:, ::-1]), out, rtol=0, atol=1e-5)
    longer = jnp.pad(text, ((0, 0), (0, 2), (0, 0)))
    assert np.abs(run(params, latents, t, longer) - out).max() > 1e-3


def test_nothing_of_the_text_is_known_ahead(tiny):
    model, params, *_, text = tiny
    tokens = model.embed_text(params, text)
    assert model.text_ahead(params["blocks"], tokens, jnp.ones(text.shape[:2], bool), rows=3) is None


def products(jaxpr) -> list[tuple[int, int]]:
    """(FLOPs, times) of the matrix products of a jaxpr."""
    found = []
    for eqn, times in equations(jaxpr):
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            length = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            found.append((2 * length * math.prod(eqn.outvars[0].aval.shape), times))
    return found


def test_flops_are_those_of_the_program(tiny, embedded):
    """Counted by `plan.flops`, by the products that this file finds, and by hand."""
    model, params, *inputs = tiny
    stream, cond = embedded
    c, grid = model.config, stream.video.shape[1]
    length, width, hidden, time = inputs[2].shape[1], c.dim, c.ffn_dim, c.time_dim
    rows = length + grid  # of text and video
    block = 8 * rows * width**2 + 4 * rows * width * hidden + 4 * rows**2 * width + 24 * time * width
    frozen = 8 * rows * width**2 + 4 * rows * width * hidden + 8 * rows**2 * width
    patch = c.patch_volume * c.in_channels * width
    ends = 4 * grid * patch + 2 * length * c.text_dim * width + 2 * time * (3 * width + time)

    def counted(function, *arguments):
        found = sum(size * times for size, times in products(jax.make_jaxpr(function)(*arguments)))
        assert flops.model_flops(function, *arguments) == found
        return found

    assert counted(model, params, *inputs) == 2 * (3 * block + ends)

    def blocks(stream):
        return model.blocks(params["blocks"], stream, cond)

    def pull(stream, cotangent):
        return jax.vjp(blocks, stream)[1](cotangent)

    forward = counted(blocks, stream)
    assert forward == 2 * 3 * block
    assert counted(pull, stream, stream) - forward == 2 * 3 * frozen


def test_remat_policies_change_the_work_and_not_the_gradient(tiny, embedded):
    model, params = tiny[:2]
    stream, cond = embedded
    gradients, work = {}, {}
    for policy in ("none", "full", "self_attention", "qkv", "products"):
        policed = dataclasses.replace(model, remat=policy)

        def loss(stream, model=policed):
            out = model.blocks(params["blocks"], stream, cond)
            return jnp.square(out.video).sum() + jnp.square(out.text).sum()

        if policy in ("none", "products"):
            gradients[policy] = jax.jit(jax.grad(loss))(stream)
        # Of three layers.
        work[policy] = sum(n for _, n in products(jax.make_jaxpr(jax.grad(loss))(stream))) // 3
    # Recomputed in other fusions, so fp32 sums may be ordered otherwise: relative to the largest entry.
    peak = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients["none"]))
    assert_streams_close(gradients["products"], gradients["none"], atol=1e-5 * peak)
    # Saved: the product of scores and values.
    assert work["full"] == work["self_attention"] + 1
    # Three projections.
    assert work["self_attention"] == work["qkv"] + 3
    # "products" computes the scores again, in their plain form, and nothing else.
    assert work["qkv"] > work["products"] == work["none"] + 1


def test_bf16_compute_keeps_the_sensitive_parts_in_fp32(tiny):
    model, params, latents, t, text = tiny
    half = dataclasses.replace(model, dtype=jnp.dtype("bfloat16"))
    out = jax.jit(half)(params, latents, t, text)
    assert out.dtype == jnp.float32
    full = jax.jit(model)(params, latents, t, text)
    # bf16 keeps 8 bits: each of some 30 roundings on the way is off by up to 0.4 %.
    assert jnp.linalg.norm(out - full) < 0.03 * jnp.linalg.norm(full)


@pytest.mark.parametrize("positions", cogvideox.POSITIONS)
def test_dtypes_on_the_way(tiny, positions):
    model, params, latents, t, text = tiny
    config = dataclasses.replace(model.config, positions=positions)
    half = cogvideox.CogVideoX(config, jnp.dtype("bfloat16"))
    seen, streams = {}, []

    def record(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        if isinstance(context.module, nn.Dense | nn.LayerNorm):
            seen["/".join(context.module.path)] = out.dtype
        return out

    def steps(params):
        stream, cond = half.embed(params, latents, t, half.embed_text(params, text))
        hinted = stream.replace(video=stream.video.astype(jnp.float32))
        streams.extend([stream, half.blocks(params["blocks"], hinted, cond)])
        return cond

    with nn.intercept_methods(record):
        cond = jax.eval_shape(steps, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(streams)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(cond)} == {jnp.dtype("float32")}
    assert (cond.rope is None) == (positions == "sincos")
    full = {"time_in", "time_out", "attn/norm_q", "attn/norm_k"}
    full |= {f"norm{i}/{part}" for i in (1, 2) for part in ("norm", "modulation")}
    large = {"text", "patch", *(f"attn/{name}" for name in "qkvo"), "ffn/up", "ffn/down"}
    assert seen == dict.fromkeys(full, jnp.float32) | dict.fromkeys(large, jnp.bfloat16)


def test_initialisation(tiny):
    config = dataclasses.replace(tiny[0].config, dim=96, ffn_dim=64)
    init = jax.jit(cogvideox.CogVideoX(config).init)
    params = init(jax.random.key(3))
    flat = traverse_util.flatten_dict(jax.tree.map(np.asarray, params), sep="/")
    for path, leaf in flat.items():
        if path.endswith("bias"):
            assert not leaf.any(), path
        elif path.endswith("scale"):
            assert (leaf == 1).all(), path
        else:
            assert path.endswith("kernel") and leaf.any(), path
    # Standard deviations of 1.5k values or more: 2 % off at one sigma.
    xavier = lambda n, m: math.sqrt(2 / (n + m))  # noqa: E731
    expected = {
        "blocks/attn/q/kernel": xavier(96, 96),
        "blocks/ffn/up/kernel": xavier(96, 64),
        "blocks/norm1/modulation/kernel": xavier(12, 576),
        "embed/patch/kernel": xavier(16, 96),
        "head/out/kernel": xavier(96, 16),
    }
    for path, std in expected.items():
        np.testing.assert_allclose(flat[path].std(), std, rtol=0.06, err_msg=path)
    query = flat["blocks/attn/q/kernel"]
    assert not np.array_equal(query[0], query[1])
    jax.tree.map(np.testing.assert_array_equal, params, init(jax.random.key(3)))


def lora(next_fun, args, kwargs, context):
    """Adds (x A) B to every Dense that finds lora_a and lora_b beside its kernel."""
    out = next_fun(*args, **kwargs)
    module = context.module
    if not isinstance(module, nn.Dense) or not module.has_variable("params", "lora_a"):
        return out
    down, up = (module.get_variable("params", name) for name in ("lora_a", "lora_b"))
    return out + args[0] @ down @ up


def test_interceptors_add_adapters_without_touching_the_model(tiny):
    model, params, latents, t, text = tiny
    flat = traverse_util.flatten_dict(params, sep="/")
    rank, (depth, width, _) = 4, flat["blocks/attn/q/kernel"].shape
    adapters = {}
    for target in "qkvo":
        a = jax.random.normal(jax.random.key(ord(target)), (depth, width, rank))
        adapters[f"blocks/attn/{target}/lora_a"] = a
        adapters[f"blocks/attn/{target}/lora_b"] = jnp.zeros((depth, rank, width))

    @jax.jit
    @jax.value_and_grad
    def adapted_loss(adapters):
        with nn.intercept_methods(lora):
            tree = traverse_util.unflatten_dict(flat | adapters, sep="/")
            return jnp.square(model(tree, latents, t, text)).mean()

    plain = jnp.square(jax.jit(model)(params, latents, t, text)).mean()
    loss, gradient = adapted_loss(adapters)
    # B = 0 adds exact zeros, but XLA fuses the two programs differently.
    np.testing.assert_allclose(loss, plain, rtol=1e-5)
    # The gradient of A is a product with B = 0: only B moves at first.
    for path, leaf in gradient.items():
        assert jnp.any(leaf != 0) == path.endswith("lora_b"), path


@pytest.mark.parametrize(
    ("latents", "t", "text", "message"),
    [
        ((1, 3, 5, 6, 4), (1,), (1, 5, 8), "multiples of"),
        ((1, 3, 4, 7, 4), (1,), (1, 5, 8), "multiples of"),
        ((1, 3, 4, 6, 16), (1,), (1, 5, 8), "latents must be"),
        ((3, 4, 6, 4), (1,), (1, 5, 8), "latents must be"),
        ((2, 3, 4, 6, 4), (1,), (2, 5, 8), "one time per sample"),
        ((1, 3, 4, 6, 4), (1,), (1, 5, 9), "text must be"),
        ((2, 3, 4, 6, 4), (2,), (1, 5, 8), "text must be of 2 samples"),
    ],
)
def test_wrong_shapes_are_named(tiny, latents, t, text, message):
    model, params = tiny[:2]
    with pytest.raises(ValueError, match=message):
        model(params, jnp.zeros(latents), jnp.zeros(t), jnp.zeros(text))


def test_an_odd_number_of_frames_does_not_fit_pairs_of_them():
    with pytest.raises(ValueError, match="multiples of"):
        cogvideox.build("1.5-5b").grid((21, 96, 170, 16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(variant="7b"), "unknown CogVideoX variant"),
        (dict(variant="2b", dtype="float64"), "compute dtype"),
        (dict(variant="2b", remat="some"), "remat"),
        (dict(variant="2b", depth=3), "depth"),
        (dict(dim=64), "do not fit"),
        (dict(variant="5b", positions="learned"), "positions"),
        (dict(variant="5b", num_heads=47), "47 heads"),
        (dict(variant="5b", num_heads=128), "multiple of 16"),
        (dict(variant="2b", dim=1928, num_heads=1), "multiple of 16"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        cogvideox.build(**arguments)


def test_configurations_name_the_model():
    spec = dict(module="cogvideox", variant="1.5-5b", dtype="bfloat16", remat="full", num_layers=2)
    model = build_model(spec | dict(patch_size=[1, 2, 2], base_grid=[3, 4]))
    config = dataclasses.replace(cogvideox.COGVIDEOX_1_5_5B, num_layers=2, patch_size=(1, 2, 2))
    config = dataclasses.replace(config, base_grid=(3, 4))
    assert model == cogvideox.CogVideoX(config, jnp.dtype("bfloat16"), "full")
    assert hash(model.config) is not None


# --- The physical branch beside it -------------------------------------------------------------------


def branched(layers=(0, 2), **sizes):
    """(model, parameters, inputs) of a backbone of four blocks beside a branch at its beginning."""
    backbone = cogvideox.build(**SIZES | dict(num_layers=4) | sizes)
    latent = (2, *LATENT[1:]) if backbone.config.patch_size[0] == 2 else LATENT
    branch = ProPhy(layers, SemanticConfig(latent[:3], hidden=8), RefinementConfig())
    model = Model(backbone, {"branch": branch})
    params = {"backbone": randomised(jax.eval_shape(backbone.init, jax.random.key(0)))}
    init = functools.partial(model.init_part, "branch")
    params["branch"] = jax.jit(init)(jax.random.key(1), params)
    rng = np.random.default_rng(2)
    x, text = (rng.standard_normal((2, *shape), np.float32) for shape in (latent, TEXT))
    mask = np.arange(TEXT[0]) < np.array([[3], [5]])
    return model, params, (x, jnp.array([37, 800]), {"text": text * mask[..., None], "text_mask": mask})


def moved(tree, seed=3):
    """Every parameter moved, so that no zero initialisation hides a path."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(x) + 0.05 * rng.standard_normal(x.shape, np.float32), tree)


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(positions="sincos", dtype="bfloat16"),
        dict(positions="rope_slice", patch_size=(2, 2, 2)),
    ],
)
def test_beside_a_branch_step_zero_is_the_backbone_bit_for_bit(fields):
    model, params, (x, t, prompt) = branched(**fields)
    run = jax.jit(lambda p: model(p, x, t, prompt).prediction)
    with_branch = run(params)
    alone = jax.jit(lambda p: model.backbone(p, x, t, prompt["text"]))(params["backbone"])
    assert np.asarray(with_branch).tobytes() == np.asarray(alone).tobytes()
    # The same comparison must be able to fail: a hint that is not zero changes the output.
    params["branch"]["exits"]["bias"] += 1e-1
    assert np.asarray(run(params)).tobytes() != np.asarray(alone).tobytes()


def test_copies_carry_their_own_text_and_hints_reach_the_video_alone():
    """Against the blocks one by one; and a prompt read ahead is the same prompt."""
    layers = (1, 2)
    model, params, (x, t, prompt) = branched(layers, num_layers=3)
    params["branch"] = moved(params["branch"])
    backbone, branch, frozen = model.backbone, params["branch"], params["backbone"]

    @jax.jit
    def one_by_one(x, t, prompt):
        tokens = backbone.embed_text(frozen, prompt["text"])
        stream, cond = backbone.embed(frozen, x, t, tokens)
        rho = jax.nn.softmax(model.parts["branch"].read(branch, prompt))
        prior = jnp.tensordot(rho, branch["semantic"]["basis"], axes=1)
        hidden = backbone.embed(frozen, x + prior, t, tokens)[0]

        def block(stack, i, stream):
            return backbone.blocks(jax.tree.map(lambda leaf: leaf[i : i + 1], stack), stream, cond)

        hints = {}
        for i, layer in enumerate(layers):
            hidden = block(branch["blocks"], i, hidden)
            tokens = hidden.video
            if i == len(layers) - 1:
                w = branch["refinement"]
                mean, var = tokens.mean(-1, keepdims=True), tokens.var(-1, keepdims=True)
                logits = (tokens - mean) / jnp.sqrt(var + 1e-6) @ w["router"]["kernel"]
                rho = jax.nn.softmax(logits + w["router"]["bias"])  # (B, N, E)
                chosen = jnp.where(rho >= jnp.sort(rho)[..., -2:-1], rho, 0)
                experts = jnp.einsum("bnc,ecd->bned", tokens, w["kernel"]) + w["bias"]
                tokens = (chosen[..., None] * experts).sum(2)
            hints[layer] = tokens @ branch["exits"]["kernel"][i] + branch["exits"]["bias"][i]
        for layer in range(3):
            stream = block(frozen["blocks"], layer, stream)
            stream = stream.replace(video=stream.video + hints.get(layer, 0.0))
        return backbone.head(frozen, stream, cond)

    want = one_by_one(x, t, prompt)
    got = jax.jit(model)(params, x, t, prompt).prediction
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)  # outputs of about 3, sums in another order
    alone = jax.jit(backbone)(frozen, x, t, prompt["text"])
    assert np.abs(want - alone).max() > 1e-2
    ahead = jax.jit(model.predict)(params, x, t, model.read_ahead(params, prompt, rows=4)).prediction
    np.testing.assert_allclose(ahead, got, rtol=0, atol=1e-6)  # the same program but for the text's Dense


def test_every_branch_parameter_and_every_expert_gets_gradient():
    model, params, inputs = branched()
    params["branch"] = moved(params["branch"])

    @jax.jit
    @jax.grad
    def gradient(branch):
        output = model({**params, "branch": branch}, *inputs)
        return (output.prediction**2).mean() + (output.seen["branch"].alignment ** 2).mean()

    tree = gradient(params["branch"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)
    for name in ("kernel", "bias"):
        assert (np.abs(tree["refinement"][name]).reshape(8, -1).max(1) > 0).all()
    assert (np.abs(tree["semantic"]["basis"]).reshape(17, -1).max(1) > 0).all()
    # Of the copies' text, all but the last one's, which nobody reads: its MLP's three pieces.
    columns = np.abs(tree["blocks"]["norm2"]["modulation"]["bias"]).reshape(2, 6, -1).max(-1) > 0
    np.testing.assert_array_equal(columns, [[True] * 6, [True] * 3 + [False] * 3])


@pytest.mark.parametrize(
    ("layers", "remat"),
    [((2, 4), "none"), ((0, 3, 6), "full"), ((1, 3, 5, 6), "self_attention")],
)
def test_attention_runs_as_often_as_it_must(layers, remat):
    """L + K times forwards and L - l_1 - 1 + K times backwards, and never twice unless remat says so."""
    depth, tokens, words = 9, 72, 16  # more scores than the blockwise form leaves to one softmax
    backbone = cogvideox.build(**SIZES | dict(num_layers=depth, text_len=words), remat=remat)
    kernel = functools.partial(attention.attention, backend="blockwise")
    backbone = dataclasses.replace(backbone, attention=kernel)
    latent = (3, 8, 12, 4)
    model = Model(
        backbone, {"branch": ProPhy(layers, SemanticConfig(latent[:3], hidden=8), RefinementConfig())}
    )
    params = {"backbone": jax.eval_shape(backbone.init, jax.random.key(0))}
    init = functools.partial(model.init_part, "branch")
    params["branch"] = jax.eval_shape(init, jax.random.key(0), params)

    def loss(branch, frozen, x, t, text, mask):
        output = model({"branch": branch, "backbone": frozen}, x, t, {"text": text, "text_mask": mask})
        return (output.prediction**2).mean() + output.seen["branch"].alignment.mean()

    shapes = [(1, *latent), (1,), (1, words, 8), (1, words)]
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    calls = attention_calls(jax.make_jaxpr(jax.grad(loss))(params["branch"], params["backbone"], *args))
    backward = depth - layers[0] - 1 + len(layers)
    forward = depth + len(layers) + (backward if remat == "full" else 0)
    keys = tokens + words
    assert calls == {("forward", keys): forward, ("backward", keys): backward}


def test_frozen_parameters_get_no_gradient_and_are_not_copied():
    """By the jaxpr: no loop returns a stack shaped as some layers' frozen weights."""
    model, params, inputs = branched((2, 4), num_layers=7)
    trainable, frozen = optim.split(params, (("branch/", 1.0), ("backbone/", None)))

    def loss(trainable):
        output = model(optim.merge(trainable, frozen), *inputs)
        return (output.prediction**2).mean() + output.seen["branch"].alignment.mean()

    weights = {leaf.shape[1:] for leaf in jax.tree.leaves(frozen["backbone"]["blocks"]) if leaf.ndim > 2}
    stacks = {True: set(), False: set()}
    for eqn, _ in equations(jax.make_jaxpr(jax.grad(loss))(trainable)):
        if eqn.primitive.name == "scan":
            shapes = (variable.aval.shape for variable in eqn.outvars)
            stacks[eqn.params["reverse"]] |= {shape for shape in shapes if shape[-2:] in weights}
    # The copies, each a stack of its own, have weight gradients. The frozen segments have 3, 2 and 2 blocks.
    assert stacks[True] and all(shape[0] == 1 for shape in stacks[True])
    assert not stacks[False]


def test_only_matrices_of_large_products_are_cast():
    model, params, _ = branched()
    cast = traverse_util.flatten_dict(cast_kernels(params["branch"]["blocks"], jnp.bfloat16), sep="/")
    half = {path.removesuffix("/kernel") for path, leaf in cast.items() if leaf.dtype == jnp.bfloat16}
    assert half == {"attn/q", "attn/k", "attn/v", "attn/o", "ffn/up", "ffn/down"}


def test_train_flops_by_hand():
    """Trained products count three times, but for those whose input needs no gradient."""
    model, params, inputs = branched()  # layers 0, 2 of 4; 8 experts and 2 exits
    frozen_params = {"backbone": params.pop("backbone")}
    one = jax.tree.map(lambda leaf: leaf[:1], inputs)
    n, s, d, f, e = 18, 23, 32, 48, 12
    block = 8 * s * d * d + 4 * s * d * f + 4 * s * s * d + 24 * e * d
    frozen = 8 * s * d * d + 4 * s * d * f + 8 * s * s * d
    patch = 2 * n * 4 * 4 * d  # of the embedding, and of the head
    forward = 4 * block + 2 * patch + 2 * 5 * 8 * d + 2 * d * e + 2 * e * e + 4 * e * d
    assert flops.model_flops(model.backbone, frozen_params["backbone"], *one[:2], one[2]["text"]) == forward

    def loss(trained):
        output = model({**frozen_params, **trained}, *one)
        return (output.prediction**2).mean() + (output.seen["branch"].alignment ** 2).mean()

    blocks = forward + 3 * frozen + patch + 3 * 2 * block - 2 * 24 * e * d + 3 * 2 * 2 * n * d * d
    experts = 3 * 8 * 2 * n * d * d + 3 * 2 * n * 8 * d  # kernels, biases
    routing = 3 * 2 * n * (d * 8 + 8 * 64 + 64 * 17)  # router, then P'_r
    semantic = 2 * (2 * 8 * 8 + 3 * 8 * 17) + 3 * 2 * 17 * 3 * 4 * 6 * 4 + 2 * patch
    assert flops.model_flops(jax.grad(loss), params) == blocks + experts + routing + semantic
