"""The Wan transformer without torch: recorded values, counts, the seam, numerics, adapters."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from convert import leaves as lv
from convert import wan as convert_wan
from prophy_jax.models import layers, wan
from prophy_jax.plan import flops
from prophy_jax.run.errors import UserError
from tests import state_dicts

# Values recorded from the public PyTorch model have six decimals and its own fp32 rounding.
GOLDEN = 3e-5

FINAL_500 = [0.620899, -0.174528, 0.166930, -1.859091, 0.566780, -0.240825, -1.620604, 0.097306]
FINAL_999 = [0.429168, -0.505562, 0.341199, -1.707447, -0.286425, -0.176416, -2.103921, 0.203959]
# Name, first four values, mean, standard deviation at t = 500.
INTERMEDIATE_500 = [
    ("patch", [0.649282, 0.402187, 0.119160, -0.686101], -0.004009, 1.011924),
    ("temb", [0.179911, -0.008560, 0.558709, -0.270697], -0.000271, 0.443593),
    ("modulation", [0.235971, -0.357290, 0.207578, -0.059834], 0.006534, 0.241652),
    ("text", [0.375461, -0.946612, -0.408108, 0.151814], 0.000253, 0.173790),
    ("block 0", [1.061640, 0.124061, 0.419073, -0.408690], -0.039283, 1.056009),
    ("block 1", [0.883671, 0.210874, 0.427677, -0.856835], -0.026012, 1.099939),
]


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def golden_tensor(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The i-th tensor, in the order of the sorted diffusers names, of the recorded model."""
    noise = np.random.RandomState(seed).standard_normal(shape)
    parts = name.split(".")
    if parts[-1] == "weight" and "norm" in parts[-2]:
        noise = 1 + 0.1 * noise
    elif len(shape) >= 2 and parts[-1] != "scale_shift_table":
        noise = noise / math.sqrt(math.prod(shape[1:]))
    else:
        noise = 0.1 * noise
    return noise.astype(np.float32)


@pytest.fixture(scope="module")
def golden():
    """(model, params, latents, text) of the recorded run."""
    model = wan.build(dim=256, num_heads=2, num_layers=2, ffn_dim=320, text_dim=64)
    shapes = lv.tensor_shapes(convert_wan.dit_leaves(model.config, "diffusers"))
    tensors = {n: golden_tensor(i, n, shapes[n]) for i, n in enumerate(sorted(shapes))}
    latents = np.random.RandomState(10001).standard_normal((1, 16, 3, 8, 12))
    text = np.random.RandomState(10002).standard_normal((1, 512, 64))
    text[:, 20:] = 0
    latents = jnp.asarray(latents.transpose(0, 2, 3, 4, 1), jnp.float32)
    params = state_dicts.read(tensors, convert_wan.dit_leaves(model.config, "diffusers"))
    return model, jax.tree.map(jnp.asarray, params), latents, jnp.asarray(text, jnp.float32)


@pytest.mark.parametrize(
    ("t", "first", "mean", "std", "peak"),
    [
        (500, FINAL_500, 0.0032708, 1.1601427, None),
        (999, FINAL_999, 0.0491820, 1.2136762, 4.342379),
    ],
)
def test_output_has_the_recorded_values(golden, t, first, mean, std, peak):
    model, params, latents, text = golden
    out = jax.jit(model)(params, latents, jnp.array([t]), text)
    out = np.asarray(out).transpose(0, 4, 1, 2, 3)  # Recorded channel-first.
    np.testing.assert_allclose(out.ravel()[:8], first, rtol=0, atol=GOLDEN)
    np.testing.assert_allclose([out.mean(), out.std()], [mean, std], rtol=0, atol=GOLDEN)
    if t == 500:
        last = [-0.360713, -0.090434, 0.792844, 1.129063]
        np.testing.assert_allclose(out.ravel()[-4:], last, rtol=0, atol=GOLDEN)
    else:
        np.testing.assert_allclose(np.abs(out).max(), peak, rtol=0, atol=GOLDEN)


def test_intermediate_tensors_have_the_recorded_values(golden):
    model, params, latents, text = golden
    stream, cond = model.embed(params, latents, jnp.array([500]), model.embed_text(params, text))
    first = model.blocks(params["blocks"], stream, cond, 0, 1)
    second = model.blocks(params["blocks"], first, cond, 1, 1)
    tensors = {
        "patch": stream.video,
        "temb": cond.time,
        "modulation": cond.modulation,
        "text": stream.text,
        "block 0": first.video,
        "block 1": second.video,
    }
    for name, start, mean, std in INTERMEDIATE_500:
        got = np.asarray(tensors[name])
        expected = [*start, mean, std]
        np.testing.assert_allclose(
            [*got.ravel()[:4], got.mean(), got.std()], expected, rtol=0, atol=GOLDEN, err_msg=name
        )


def test_rope_tables_have_the_recorded_values():
    cos, sin = layers.rope_tables((3, 4, 6), 128)
    pairs = [0, 1, 21, 22, 23, 42, 43, 44, 63]
    token = 41  # (frame 1, row 2, column 5)
    expected_cos = [0.540302, 0.791258, 1, -0.416147, 0.277223, 1, 0.283662, -0.996546, 1]
    expected_sin = [
        0.841471, 0.611483, 0.000152, 0.909297, 0.960805, 0.000310, -0.958924, -0.083045, 0.000775,
    ]  # fmt: skip
    # Half a unit of the sixth decimal, and one fp32 rounding.
    np.testing.assert_allclose(cos[token, jnp.array(pairs)], expected_cos, rtol=0, atol=6e-7)
    np.testing.assert_allclose(sin[token, jnp.array(pairs)], expected_sin, rtol=0, atol=6e-7)


def test_rope_makes_scores_depend_on_relative_position_alone():
    cos, sin = layers.rope_tables((3, 4, 5), 24)
    q, k = jax.random.normal(jax.random.key(0), (2, 24))

    def score(i, j):
        spread = lambda x: jnp.broadcast_to(x, (1, 60, 1, 24))  # noqa: E731
        rotated_q = layers.apply_rope(spread(q), cos, sin)[0, i, 0]
        return rotated_q @ layers.apply_rope(spread(k), cos, sin)[0, j, 0]

    # Tokens (0,0,0)-(1,2,1) and (1,1,3)-(2,3,4) are apart by the same step. fp32 sum of 24 terms.
    np.testing.assert_allclose(score(0, 31), score(28, 59), rtol=0, atol=1e-5)
    assert abs(score(0, 31) - score(0, 32)) > 1e-2


def test_time_sinusoid_has_the_recorded_values():
    out = np.asarray(layers.time_sinusoid(jnp.array([999.0]), 256))[0]
    cos, sin = [0.9996499, 0.9637825, -0.3989918, 0.7048205], [-0.0264608, -0.2666896, -0.9169545]
    # A frequency rounded to fp32 (6e-8, twice) turns into a phase error of up to 1e-4 at t = 999.
    np.testing.assert_allclose(out[:4], cos, rtol=0, atol=1e-4)
    np.testing.assert_allclose(out[128:131], sin, rtol=0, atol=1e-4)
    np.testing.assert_allclose(out[255], 0.1071472, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "parameters"), [(wan.WAN_1_3B, 1_418_996_800), (wan.WAN_14B, 14_288_491_584)]
)
def test_public_sizes_have_the_public_parameter_counts(config, parameters):
    tree = jax.eval_shape(wan.Wan(config).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == parameters


@pytest.mark.parametrize(
    ("variant", "latents", "expected"),
    [
        ("1.3b", (21, 60, 104, 16), "2.830e+14"),
        ("1.3b", (13, 60, 104, 16), "1.286e+14"),
        ("1.3b", (9, 60, 104, 16), "7.293e+13"),
        ("1.3b", (5, 60, 104, 16), "3.161e+13"),
        ("1.3b", (1, 60, 104, 16), "4.652e+12"),
        ("14b", (21, 60, 104, 16), "1.678e+15"),
        ("14b", (13, 60, 104, 16), "8.325e+14"),
        ("14b", (21, 90, 160, 16), "6.523e+15"),
    ],
)
def test_forward_flops_have_the_recorded_values(variant, latents, expected):
    model = wan.build(variant)
    params = jax.eval_shape(model.init, jax.random.key(0))

    def count(batch):
        text = (512, model.config.text_dim)
        shapes = [jax.ShapeDtypeStruct((batch, *shape), "float32") for shape in (latents, (), text)]
        return flops.model_flops(model, params, *shapes)

    assert f"{count(1):.3e}" == expected
    assert count(3) == 3 * count(1)


def random_tree(shapes, seed: int = 0):
    """Every leaf random, biases, norms and zero-initialised projections included."""
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    values = [0.2 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves]
    return jax.tree.unflatten(structure, [jnp.asarray(value) for value in values])


@pytest.fixture(scope="module")
def tiny():
    """(model, params, latents, t, text) with three layers and a batch of two."""
    model = wan.build(dim=24, num_heads=2, num_layers=3, ffn_dim=32, text_dim=8)
    params = random_tree(jax.eval_shape(model.init, jax.random.key(0)))
    rng = np.random.default_rng(1)
    latents = jnp.asarray(rng.standard_normal((2, 3, 4, 6, 16), np.float32))
    text = jnp.asarray(rng.standard_normal((2, 5, 8), np.float32))
    return model, params, latents, jnp.array([37.0, 870.5]), text


@pytest.fixture(scope="module")
def embedded(tiny):
    """(stream, cond) of the tiny model's inputs."""
    model, params, latents, t, text = tiny
    return jax.jit(model.embed)(params, latents, t, model.embed_text(params, text))


def test_scan_equals_a_loop_over_single_blocks(tiny, embedded):
    model, params = tiny[:2]
    stream, cond = embedded
    scanned = model.blocks(params["blocks"], stream, cond)
    looped = stream
    for i in range(3):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], params["blocks"])
        looped = model.blocks(layer, looped, cond)
    # The same operations; XLA may order a sum differently in a loop of three than of one.
    np.testing.assert_allclose(scanned.video, looped.video, rtol=1e-6, atol=1e-6)


def test_blocks_compose(tiny, embedded):
    model, params = tiny[:2]
    stream, cond = embedded
    whole = model.blocks(params["blocks"], stream, cond)
    parts = model.blocks(params["blocks"], stream, cond, 0, 2)
    parts = jax.jit(lambda start: model.blocks(params["blocks"], parts, cond, start, 1))(2)
    # As above, in another program: rounding of a stream that reaches 25.
    np.testing.assert_allclose(whole.video, parts.video, rtol=1e-6, atol=1e-5)
    nothing = model.blocks(params["blocks"], stream, cond, 1, 0)
    np.testing.assert_array_equal(nothing.video, stream.video)
    for start, count in ((0, 4), (2, -1), (-1, 3)):
        with pytest.raises(ValueError, match="stack of 3"):
            model.blocks(params["blocks"], stream, cond, start, count)


@pytest.mark.parametrize("rows", [None, 6, 9])
def test_keys_and_values_of_the_text_ahead_of_the_steps(tiny, rows):
    model, params, latents, t, text = tiny
    valid = np.array([5, 2])
    text = jnp.pad(text, ((0, 0), (0, 8), (0, 0)))  # (2, 13, 8)
    mask = np.arange(text.shape[1]) < valid[:, None]
    text = jnp.where(mask[..., None], text, 0)
    expected = jax.jit(model)(params, latents, t, text)
    tokens = model.embed_text(params, text)
    ahead = jax.jit(model.text_ahead, static_argnums=3)(params["blocks"], tokens, mask, rows)
    assert ahead.key.shape[2] == (rows or text.shape[1])

    @jax.jit
    def predict(params, latents, t, ahead):
        stream, cond = model.embed(params, latents, t, jnp.full_like(tokens, jnp.nan))
        stream = model.blocks(params["blocks"], stream, cond, 0, 1, ahead)  # also a part of the stack
        return model.head(params, model.blocks(params["blocks"], stream, cond, 1, 2, ahead), cond)

    out = predict(params, latents, t, ahead)
    # The same sums in another order; padding counted once, with its weight, instead of L - n times.
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
    if rows:
        ahead = ahead.replace(bias=ahead.bias.at[..., valid.min()].add(0.5))
        assert np.abs(predict(params, latents, t, ahead) - expected).max() > 1e-4  # it is read


def test_samples_of_a_batch_do_not_mix(tiny):
    model, params, latents, t, text = tiny
    both = jax.jit(model)(params, latents, t, text)
    alone = jax.jit(model)(params, latents[1:], t[1:], text[1:])
    # A batch of another size sums in another order; outputs are about 1.
    np.testing.assert_allclose(both[1:], alone, rtol=0, atol=1e-5)


def count_products(jaxpr) -> int:
    """Matrix products of a jaxpr; those inside a scan count once."""
    total = 0
    for eqn in jaxpr.eqns:
        total += eqn.primitive.name == "dot_general"
        for sub in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns")):
            sub = getattr(sub, "jaxpr", sub)
            total += count_products(sub) if hasattr(sub, "eqns") else 0
    return total


def test_remat_policies_change_the_work_and_not_the_gradient(tiny, embedded):
    model, params = tiny[:2]
    stream, cond = embedded
    gradients, products = {}, {}
    for policy in ("none", "full", "attention", "qkv", "products"):
        policed = dataclasses.replace(model, remat=policy)

        def loss(stream, model=policed):
            return jnp.square(model.blocks(params["blocks"], stream, cond).video).sum()

        gradients[policy] = jax.jit(jax.grad(loss))(stream)
        products[policy] = count_products(jax.make_jaxpr(jax.grad(loss))(stream).jaxpr)
    for policy in ("full", "attention", "qkv", "products"):
        # Recomputed in other fusions, so fp32 sums may be ordered otherwise: relative to the
        # largest entry.
        for got, want in (
            (gradients[policy].video, gradients["none"].video),
            (gradients[policy].text, gradients["none"].text),
        ):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))
    # "attention" spares the product of scores and values, in self- and in cross-attention.
    assert products["full"] == products["attention"] + 2
    # "qkv" spares three projections in each, too.
    assert products["attention"] == products["qkv"] + 6
    # "products" computes the scores of both attentions again, in their plain form, and nothing else.
    assert products["qkv"] > products["products"] == products["none"] + 2


def test_bf16_compute_keeps_the_sensitive_parts_in_fp32(tiny):
    model, params, latents, t, text = tiny
    half = dataclasses.replace(model, dtype=jnp.dtype("bfloat16"))
    stream, cond = half.embed(params, latents, t, half.embed_text(params, text))
    assert stream.video.dtype == stream.text.dtype == jnp.bfloat16
    assert cond.modulation.dtype == cond.time.dtype == cond.rope[0].dtype == jnp.float32
    hinted = stream.replace(video=stream.video.astype(jnp.float32))
    assert half.blocks(params["blocks"], hinted, cond).video.dtype == jnp.bfloat16
    out = jax.jit(half)(params, latents, t, text)
    assert out.dtype == jnp.float32
    full = jax.jit(model)(params, latents, t, text)
    # bf16 keeps 8 bits: each of some 30 roundings on the way is off by up to 0.4 %.
    assert jnp.linalg.norm(out - full) < 0.03 * jnp.linalg.norm(full)
    gradient = jax.eval_shape(jax.grad(lambda p: half(p, latents, t, text).mean()), params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))


def test_initialisation_follows_the_reference(tiny):
    model = tiny[0]
    config = dataclasses.replace(model.config, dim=96, ffn_dim=64)
    init = jax.jit(wan.Wan(config).init)
    params = init(jax.random.key(3))
    flat = traverse_util.flatten_dict(params, sep="/")
    for path, leaf in flat.items():
        if path.endswith("bias") or path == "head/out/kernel":
            assert not leaf.any(), path
        elif path.endswith("scale"):
            assert (leaf == 1).all(), path
    # Standard deviations of 2k values or more: 2 % off at one sigma.
    xavier = lambda n, m: math.sqrt(2 / (n + m))  # noqa: E731
    expected = {
        "blocks/self_attn/q/kernel": xavier(96, 96),
        "blocks/ffn/up/kernel": xavier(96, 64),
        "embed/patch/kernel": xavier(64, 96),
        "embed/time_modulation/kernel": xavier(96, 576),
        # The reference code has 0.02 for these at any width; at Wan's widths that is about the same.
        "embed/time_in/kernel": model.config.freq_dim**-0.5,
        "embed/text_out/kernel": 96**-0.5,
        "blocks/modulation": 96**-0.5,
    }
    for path, std in expected.items():
        np.testing.assert_allclose(flat[path].std(), std, rtol=0.06, err_msg=path)
    query = flat["blocks/self_attn/q/kernel"]
    assert not jnp.array_equal(query[0], query[1])
    jax.tree.map(np.testing.assert_array_equal, params, init(jax.random.key(3)))
    low = jax.eval_shape(lambda key: model.init(key, jnp.bfloat16), jax.random.key(0))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(low))


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
    rank, (depth, width, _) = 4, flat["blocks/self_attn/q/kernel"].shape
    adapters = {}
    for target in "qkvo":
        prefix = f"blocks/self_attn/{target}"
        a = jax.random.normal(jax.random.key(ord(target)), (depth, width, rank))
        adapters |= {f"{prefix}/lora_a": a, f"{prefix}/lora_b": jnp.zeros((depth, rank, width))}

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
    moved = {path: leaf - 0.01 * gradient[path] for path, leaf in adapters.items()}
    assert adapted_loss(moved)[0] < 0.99 * loss


def test_interceptors_see_every_dense_of_a_block(tiny, embedded):
    model, params = tiny[:2]
    stream, cond = embedded
    seen = []

    def record(next_fun, args, kwargs, context):
        if isinstance(context.module, nn.Dense):
            seen.append("/".join(context.module.path))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        model.blocks(params["blocks"], stream, cond)
    attention = [f"{kind}_attn/{name}" for kind in ("self", "cross") for name in "qkvo"]
    assert set(seen) == {*attention, "ffn/up", "ffn/down"}


@pytest.mark.parametrize(
    ("latents", "t", "text", "message"),
    [
        ((1, 3, 5, 6, 16), (1,), (1, 5, 8), "multiples of"),
        ((1, 3, 4, 7, 16), (1,), (1, 5, 8), "multiples of"),
        ((1, 3, 4, 6, 4), (1,), (1, 5, 8), "latents must be"),
        ((3, 4, 6, 16), (1,), (1, 5, 8), "latents must be"),
        ((2, 3, 4, 6, 16), (1,), (2, 5, 8), "one time per sample"),
        ((1, 3, 4, 6, 16), (1,), (1, 5, 9), "text must be"),
        ((2, 3, 4, 6, 16), (2,), (1, 5, 8), "text must be of 2 samples"),
    ],
)
def test_wrong_shapes_are_named(tiny, latents, t, text, message):
    model, params = tiny[:2]
    with pytest.raises(ValueError, match=message):
        model(params, jnp.zeros(latents), jnp.zeros(t), jnp.zeros(text))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "2b"}, "1.3b, 14b"),
        ({"variant": "1.3b", "remat": "half"}, "none, full, self_attention, attention, qkv, products"),
        ({"variant": "1.3b", "dtype": "float17"}, "bfloat16"),
        ({"variant": "1.3b", "width": 3}, "width"),
        ({"dim": 32}, "num_heads"),
        ({"variant": "1.3b", "num_heads": 7}, "7 heads"),
    ],
)
def test_wrong_settings_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        wan.build(**arguments)


def test_variants_take_other_sizes():
    model = wan.build("1.3b", num_layers=2, patch_size=[1, 2, 2])
    assert model.config == dataclasses.replace(wan.WAN_1_3B, num_layers=2)
    assert hash(model) == hash(wan.build("1.3b", num_layers=2))
