"""The T5 encoders without torch: recorded values, counts, buckets, padding, sharding."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import traverse_util

from prophy_jax.models import build as build_model
from prophy_jax.models.text import t5
from prophy_jax.run import checkpoints, encoders, parallel
from prophy_jax.run.errors import NotFinite, UserError
from tests.tiny_tokenizer import save_tiny_tokenizer

# Values recorded from the public PyTorch models have six decimals and their own fp32 rounding.
GOLDEN = 2e-5

# ours, without the layer axis: (transformers name, stored transposed)
_BLOCK = {
    "attn_norm/scale": ("layer.0.layer_norm", False),
    "attn/q/kernel": ("layer.0.SelfAttention.q", True),
    "attn/k/kernel": ("layer.0.SelfAttention.k", True),
    "attn/v/kernel": ("layer.0.SelfAttention.v", True),
    "attn/o/kernel": ("layer.0.SelfAttention.o", True),
    "position_bias/embedding": ("layer.0.SelfAttention.relative_attention_bias", False),
    "ffn_norm/scale": ("layer.1.layer_norm", False),
    "ffn/gate/kernel": ("layer.1.DenseReluDense.wi_0", True),
    "ffn/up/kernel": ("layer.1.DenseReluDense.wi_1", True),
    "ffn/down/kernel": ("layer.1.DenseReluDense.wo", True),
}


def from_transformers(state: dict[str, np.ndarray], config: t5.T5Config) -> dict:
    """Our tree of the tensors of a transformers T5EncoderModel or UMT5EncoderModel."""
    tree = {
        "embedding/embedding": state["shared.weight"],
        "norm/scale": state["encoder.final_layer_norm.weight"],
    }
    for path, (name, transposed) in _BLOCK.items():
        names = [f"encoder.block.{i}.{name}.weight" for i in range(config.num_layers)]
        if path == "position_bias/embedding" and config.shared_bias:
            tree[path] = state[names[0]]
        else:
            tree[f"blocks/{path}"] = np.stack([state[n].T if transposed else state[n] for n in names])
    return traverse_util.unflatten_dict(tree, sep="/")


def transformers_shapes(config: t5.T5Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a transformers encoder, without the embedding's alias."""
    shapes = {
        "shared.weight": (config.vocab_size, config.d_model),
        "encoder.final_layer_norm.weight": (config.d_model,),
    }
    tree = jax.eval_shape(t5.T5(config).init, jax.random.key(0))
    leaves = traverse_util.flatten_dict(tree["blocks"], sep="/")
    for path, (name, transposed) in _BLOCK.items():
        if path in leaves:
            shape = leaves[path].shape[1:]
            for i in range(config.num_layers):
                shapes[f"encoder.block.{i}.{name}.weight"] = shape[::-1] if transposed else shape
    if config.shared_bias:
        name, _ = _BLOCK["position_bias/embedding"]
        shapes[f"encoder.block.0.{name}.weight"] = tree["position_bias"]["embedding"].shape
    return shapes


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def random_params(model: t5.T5, seed: int = 0) -> dict:
    """Norms and tables random too."""
    leaves, treedef = jax.tree.flatten(model.init(jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, noisy)


def tiny(shared_bias: bool = False, **sizes) -> t5.T5:
    defaults = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return t5.build(shared_bias=shared_bias, **(defaults | sizes))


def tokens(lengths: list[int], width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """ids and mask of prompts that end with token 1 and are padded with 0."""
    ids = np.random.default_rng(seed).integers(2, 50, (len(lengths), width)).astype(np.int32)
    mask = np.arange(width) < np.array(lengths)[:, None]
    ids[np.arange(len(lengths)), np.array(lengths) - 1] = 1
    return np.where(mask, ids, 0), mask


def test_umt5_has_the_recorded_values():
    model = t5.build(
        vocab_size=99, d_model=64, d_kv=16, d_ff=96, num_layers=3, num_heads=4, shared_bias=False
    )
    state = {}
    shapes = transformers_shapes(model.config)
    assert len(shapes) == 32
    for seed, name in enumerate(sorted(shapes)):
        noise = np.random.RandomState(seed).standard_normal(shapes[name])
        norm = "norm" in name.split(".")[-2]
        noise = 1 + 0.1 * noise if norm else noise / math.sqrt(math.prod(shapes[name][1:]))
        state[name] = noise.astype(np.float32)
    params = from_transformers(state, model.config)
    ids = np.random.RandomState(10005).randint(2, 99, (1, 160))
    assert ids[0, :6].tolist() == [17, 46, 57, 73, 49, 47]
    ids[0, 149], ids[0, 150:] = 1, 0
    mask = np.arange(160)[None] < 150

    block = t5.T5Block(model.config, jnp.float32)
    x = params["embedding"]["embedding"][ids]
    first = block.apply({"params": jax.tree.map(lambda a: a[0], params["blocks"])}, x, None, mask)
    expected = [0.588878, -0.012046, 0.213726, -1.118172]
    np.testing.assert_allclose(np.asarray(first).ravel()[:4], expected, rtol=0, atol=GOLDEN)

    out = np.asarray(jax.jit(model)(params, ids, mask))
    expected = [0.637874, 0.136347, -0.171624, -2.332656, -0.164178, -0.193926, -0.143810, -0.155580]
    np.testing.assert_allclose(out.ravel()[:8], expected, rtol=0, atol=GOLDEN)
    moments = [out.mean(), out.std(), np.abs(out).max()]
    np.testing.assert_allclose(moments, [0.0090426, 0.9618059, 3.639869], rtol=0, atol=GOLDEN)


def test_t5_has_the_recorded_values():
    model = t5.build(vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, shared_bias=True)
    noise = np.random.RandomState(0)
    state = {}
    for name, shape in sorted(transformers_shapes(model.config).items()):
        value = 0.05 * noise.standard_normal(math.prod(shape)).reshape(shape)
        state[name] = (1 + value if len(shape) == 1 else value).astype(np.float32)
    ids = (7 * np.arange(40)[None] + 3) % 50
    params = from_transformers(state, model.config)
    out = np.asarray(jax.jit(model)(params, ids, None))
    at = [0, 1, 2, 213, 320, 638, 639]
    expected = [1.791573, 0.225771, 1.234537, 0.959855, 0.074172, -0.406110, 0.404835]
    np.testing.assert_allclose(out.ravel()[at], expected, rtol=0, atol=GOLDEN)
    np.testing.assert_allclose([out.mean(), out.std()], [0.063711, 1.004816], rtol=0, atol=GOLDEN)
    np.testing.assert_allclose(np.abs(out).sum(), 528.0152, rtol=GOLDEN)
    # As CogVideoX is set up: the last rows are padding to the mask, which changes nothing.
    encoding = dataclasses.replace(model, padding="encoded")
    mask = np.arange(40)[None] < 25
    np.testing.assert_array_equal(jax.jit(encoding)(params, ids, mask), out)
    assert np.abs(np.asarray(jax.jit(model)(params, ids, mask)) - out)[:, :25].max() > 0.01


@pytest.mark.parametrize(("variant", "count"), [("umt5-xxl", 5_680_910_336), ("t5-v1.1-xxl", 4_762_310_656)])
def test_public_variants_have_their_parameters(variant, count):
    model = t5.build(variant)
    tree = jax.eval_shape(lambda key: model.init(key, jnp.bfloat16), jax.random.key(0))
    flat = traverse_util.flatten_dict(tree, sep="/")
    assert sum(math.prod(leaf.shape) for leaf in flat.values()) == count
    assert all(leaf.dtype == jnp.bfloat16 for leaf in flat.values())
    expected = {
        "embedding/embedding": (256384, 4096),
        "blocks/attn_norm/scale": (24, 4096),
        **{f"blocks/attn/{name}/kernel": (24, 4096, 4096) for name in "qkvo"},
        "blocks/position_bias/embedding": (24, 32, 64),
        "blocks/ffn_norm/scale": (24, 4096),
        "blocks/ffn/gate/kernel": (24, 4096, 10240),
        "blocks/ffn/up/kernel": (24, 4096, 10240),
        "blocks/ffn/down/kernel": (24, 10240, 4096),
        "norm/scale": (4096,),
    }
    if variant == "t5-v1.1-xxl":
        expected["embedding/embedding"] = (32128, 4096)
        expected["position_bias/embedding"] = expected.pop("blocks/position_bias/embedding")[1:]
    assert {path: leaf.shape for path, leaf in flat.items()} == expected
    ids = jax.ShapeDtypeStruct((2, 512), jnp.int32)
    mask = jax.ShapeDtypeStruct((2, 512), jnp.bool)
    out = jax.eval_shape(model, tree, ids, mask)
    assert (out.shape, out.dtype) == ((2, 512, 4096), jnp.float32)


def test_buckets_of_every_distance():
    # Where each bucket begins, recorded from the PyTorch implementations.
    starts = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91, 512]
    expected = np.repeat(np.arange(16), np.diff(starts))
    buckets = t5.relative_buckets(512, 32, 128)
    assert buckets.shape == (512, 512) and buckets.dtype == np.int32
    np.testing.assert_array_equal(buckets[:, 0], expected)  # the key is before the query
    np.testing.assert_array_equal(buckets[0, 1:], 16 + expected[1:])
    for query, key in [(100, 97), (97, 100), (511, 3), (40, 41)]:
        shifted = buckets[0, key - query] if key > query else buckets[query - key, 0]
        assert buckets[query, key] == shifted
    assert 16 not in buckets  # a later key is at least one token away


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(8, 20), (16, 33), (64, 300), (4, 5)])
def test_buckets_follow_the_logarithm(num_buckets, max_distance):
    half, exact = num_buckets // 2, num_buckets // 4
    distances = np.arange(1, 400)
    log = np.log(distances / exact) / np.log(max_distance / exact) * (half - exact)
    # The small term lifts exact powers, which the logarithm may put just below an integer.
    large = np.minimum(exact + np.floor(log + 1e-9), half - 1)
    expected = np.where(distances < exact, distances, large)
    np.testing.assert_array_equal(t5.relative_buckets(400, num_buckets, max_distance)[1:, 0], expected)


@pytest.mark.parametrize("shared_bias", [False, True])
def test_padding_changes_nothing_and_comes_out_as_zeros(shared_bias):
    model = tiny(shared_bias)
    params = random_params(model)
    lengths = [7, 150, 1]
    ids, mask = tokens(lengths, 160)
    padded = np.asarray(jax.jit(model)(params, ids, mask))
    assert np.all(padded[~mask] == 0)
    for row, length in enumerate(lengths):
        alone = jax.jit(model)(params, ids[row : row + 1, :length], None)
        # Sums over other lengths are taken in another order.
        np.testing.assert_allclose(padded[row, :length], alone[0], rtol=0, atol=1e-5)
    other = np.where(mask, ids, 9)
    np.testing.assert_array_equal(jax.jit(model)(params, other, mask), padded)


def test_without_a_mask_padding_is_encoded_and_attended_to():
    model = tiny(shared_bias=True)
    params = random_params(model)
    ids, mask = tokens([5, 12], 20)
    out = jax.jit(model)(params, ids, None)
    np.testing.assert_array_equal(jax.jit(model)(params, ids, np.ones_like(mask)), out)
    assert np.all(np.abs(out[~mask]).max(-1) > 0.1)
    masked = jax.jit(model)(params, ids, mask)
    assert np.abs(np.asarray(out - masked)[mask]).max() > 0.1


def test_one_table_in_every_layer_is_the_shared_table():
    shared, own = tiny(True, num_layers=3), tiny(False, num_layers=3)
    params = random_params(shared)
    # Large enough that the position decides much of the attention.
    table = params["position_bias"]["embedding"] = 10 * params["position_bias"]["embedding"]
    ids, mask = tokens([30, 19], 30)
    expected = jax.jit(shared)(params, ids, mask)
    blocks = params["blocks"] | {"position_bias": {"embedding": jnp.stack([table] * 3)}}
    repeated = {"embedding": params["embedding"], "blocks": blocks, "norm": params["norm"]}
    np.testing.assert_allclose(jax.jit(own)(repeated, ids, mask), expected, rtol=0, atol=1e-6)
    blocks["position_bias"]["embedding"] = jnp.stack([table, 2 * table, table])
    assert np.abs(np.asarray(jax.jit(own)(repeated, ids, mask) - expected)).max() > 1e-2


def test_bfloat16_parameters_and_bfloat16_compute():
    model = tiny()
    params = random_params(model)
    ids, mask = tokens([30, 19], 40)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    widened = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rounded)
    exact = jax.jit(model)(widened, ids, mask)
    # Stored in half, computed in fp32: nothing but the storage is rounded.
    np.testing.assert_array_equal(jax.jit(model)(rounded, ids, mask), exact)

    half = dataclasses.replace(model, dtype=jnp.dtype(jnp.bfloat16))
    out = jax.jit(half)(rounded, ids, mask)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(jax.jit(half)(widened, ids, mask), out)
    error = np.asarray(out - exact)[mask]
    # bfloat16 has 8 bits: each of the two layers' few roundings costs up to 2^-9 of values of size 1.
    assert 1e-4 < error.std() < 2e-2

    jaxpr = jax.make_jaxpr(half)(rounded, ids, mask).jaxpr
    (scan,) = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    assert scan.outvars[0].aval.dtype == jnp.bfloat16  # the residual stream


def test_sharded_parameters_give_the_same_output():
    model = tiny(vocab_size=4096, d_model=128, d_ff=512, d_kv=32)
    params = random_params(model)
    ids, mask = tokens([30, 19], 40)
    expected = jax.jit(model)(params, ids, mask)
    mesh = parallel.make_mesh({"data": 1, "fsdp": 8, "context": 1}, 8, jax.devices())
    sharded = jax.device_put(params, parallel.shard_largest(params, mesh))
    whole = sharded["embedding"]["embedding"]
    assert whole.addressable_shards[0].data.size * 8 == whole.size
    # Each device sums its share of a product: another order.
    np.testing.assert_allclose(jax.jit(model)(sharded, ids, mask), expected, rtol=0, atol=1e-5)


def test_initial_weights_keep_unscaled_scores_small():
    model = tiny(vocab_size=500, d_model=128, d_kv=32, d_ff=256)
    params = traverse_util.flatten_dict(model.init(jax.random.key(0)), sep="/")
    scale = {
        "embedding/embedding": 1,
        "blocks/attn/q/kernel": (128 * 32) ** -0.5,
        "blocks/attn/k/kernel": 128**-0.5,
        "blocks/attn/v/kernel": 128**-0.5,
        "blocks/attn/o/kernel": (4 * 32) ** -0.5,
        "blocks/ffn/gate/kernel": 128**-0.5,
        "blocks/ffn/up/kernel": 128**-0.5,
        "blocks/ffn/down/kernel": 256**-0.5,
        "blocks/position_bias/embedding": (2 * 32 * 4) ** -0.5,
    }
    for path, std in scale.items():
        # The smallest, the position biases, are 256 samples: 4.4 % of standard error.
        np.testing.assert_allclose(params[path].std(), std, rtol=0.15, err_msg=path)
    for path in params.keys() - scale.keys():
        assert path.endswith("norm/scale") and np.all(params[path] == 1), path


def test_a_token_outside_the_vocabulary_cannot_go_unnoticed():
    model = tiny()
    ids, mask = tokens([5, 6], 8)
    ids[1, 2] = 50
    out = np.asarray(jax.jit(model)(random_params(model), ids, mask))
    assert np.isfinite(out[0]).all() and np.isnan(out[1, :6]).all()


def test_shapes_that_do_not_belong_together():
    model = tiny()
    params = random_params(model)
    ids, mask = tokens([5, 6], 8)
    with pytest.raises(ValueError, match=r"ids must be \(B, L\), got \(8,\)"):
        model(params, ids[0], None)
    with pytest.raises(ValueError, match=r"mask must be \(2, 8\) as the ids are, got \(2, 7\)"):
        model(params, ids, mask[:, :7])


PROMPTS = [
    "a red ball",
    "",
    "the blue box falls on the red ball, the red ball rolls into the box",
    "a red ball",
]


def text_config(folder, padding: str):
    """A T5 v1.1 with weights and tokenizer in `folder`, for 12 rows of text."""
    sizes = dict(vocab_size=256, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, shared_bias=True)
    spec = dict(module="t5", length=12, padding=padding, **sizes)
    if not folder.exists():
        params = random_params(build_model(spec))
        checkpoints.save_params(str(folder), params, {"part": "text_encoder", "model": spec})
        save_tiny_tokenizer(folder / "tokenizer", 250)
    encoder = ml_collections.ConfigDict(spec)
    return ml_collections.ConfigDict(
        dict(text_encoder=encoder, text_encoder_params=str(folder), backbone_remedy="")
    )


@pytest.mark.parametrize("padding", t5.PADDINGS)
def test_rows_of_encoded_texts(tmp_path, padding):
    config = text_config(tmp_path / "text_encoder", padding)
    cache = str(tmp_path / "cache")
    encoder = encoders.load_text_encoder(config, cache)
    text, mask = encoder(PROMPTS)
    assert (text.shape, text.dtype) == ((4, 12, 32), np.float32)
    # The words and the end of each prompt, whatever becomes of the other rows.
    assert mask.sum(1).tolist() == [4, 1, 12, 4] and (np.diff(mask.astype(int)) <= 0).all()
    rows = np.abs(text).max(-1)
    assert rows[mask].min() > 0.1
    assert rows[~mask].min() > 0.1 if padding == "encoded" else not rows[~mask].any()
    assert encoder.words_lost(PROMPTS[2]) == 5 and encoder.words_lost(PROMPTS[0]) == 0

    ids, valid = encoder._tokenizer(PROMPTS, 12)
    want = jax.jit(build_model(config.text_encoder))(
        encoder._params, ids, valid if padding == "zeros" else None
    )
    np.testing.assert_array_equal(mask, valid)
    # One prompt at a time and another batch: sums in another order.
    np.testing.assert_allclose(text, want, rtol=0, atol=1e-5)
    other = encoders.load_text_encoder(config)
    for index, prompt in enumerate(PROMPTS[:3]):
        alone, alone_mask = other([prompt])
        np.testing.assert_array_equal(alone[0], text[index])  # to the last bit, whatever is encoded with it
        np.testing.assert_array_equal(alone_mask[0], mask[index])

    kept = encoders.load_text_encoder(config, cache)
    kept._load = None  # the weights are not read
    for first, again in zip((text, mask), kept(PROMPTS), strict=True):
        np.testing.assert_array_equal(first, again)


def test_prompts_that_become_nan_are_told_apart(tmp_path):
    config, cache = text_config(tmp_path / "text_encoder", "zeros"), tmp_path / "cache"
    encoder = encoders.load_text_encoder(config, str(cache))
    encoder._load()
    ids, _ = encoder._tokenizer(PROMPTS, 12)
    token = next(own for own in ids[2] if own not in ids[0])
    table = encoder._params["embedding"]
    table["embedding"] = table["embedding"].at[token].set(np.inf)
    with pytest.raises(
        NotFinite, match="text_encoder makes NaN or infinity of a prompt: config.text_enc"
    ) as caught:
        encoder(PROMPTS)
    assert caught.value.rows == [2]
    kept = sorted(cache.rglob("*.npz"))
    assert len(kept) == 2  # of three texts
    whole, _ = encoder(PROMPTS[:2])
    kept[0].write_bytes(b"damaged")
    np.testing.assert_array_equal(encoder(PROMPTS[:2])[0], whole)


def test_texts_of_another_padding_are_not_taken_from_the_cache(tmp_path):
    cache = str(tmp_path / "cache")
    texts = [
        encoders.load_text_encoder(text_config(tmp_path / "text_encoder", padding), cache)(PROMPTS[:1])[0]
        for padding in t5.PADDINGS
    ]
    assert np.abs(texts[0] - texts[1])[0, :4].max() > 0.1


def test_build_takes_variants_and_sizes_and_names_mistakes():
    config = t5.build("umt5-xxl", num_layers=2).config
    assert (config.num_layers, config.vocab_size, config.shared_bias) == (2, 256384, False)
    assert t5.build("t5-v1.1-xxl").config.shared_bias
    sizes = dataclasses.asdict(config)
    assert build_model({"module": "t5", "dtype": "bfloat16", **sizes}).config == config
    for arguments, message in [
        ({"variant": "t5-small"}, "unknown T5 variant 't5-small': choose one of umt5-xxl, t5-v1.1-xxl"),
        ({"variant": "umt5-xxl", "dtype": "float16"}, "unknown compute dtype 'float16'"),
        (
            {"variant": "umt5-xxl", "padding": "kept"},
            "unknown padding 'kept' of texts: choose one of zeros, enc",
        ),
        ({"variant": "umt5-xxl", "heads": 3}, "T5 sizes .'heads'. do not fit T5Config"),
        ({"d_model": 8}, "T5 sizes .'d_model'. do not fit T5Config.*missing"),
        ({"variant": "umt5-xxl", "num_buckets": 30}, "30 position buckets up to distance 128"),
        ({"variant": "umt5-xxl", "max_distance": 8}, "32 position buckets up to distance 8"),
    ]:
        with pytest.raises(UserError, match=message):
            t5.build(**arguments)
