"""The branch: identity at step 0, copies, routing, gradients, ablations, frozen parameters."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prophy_jax.models import build
from prophy_jax.models.attention import attention
from prophy_jax.models.beside import prophy
from prophy_jax.models.beside.part import Model
from prophy_jax.models.beside.prophy import (
    ProPhy,
    RefinementConfig,
    RefinementExperts,
    SemanticConfig,
    top_k_mask,
)
from prophy_jax.plan import flops
from prophy_jax.run import optim
from prophy_jax.run.errors import UserError
from tests.counting import attention_calls

LATENT, TEXT = (3, 4, 6, 16), (12, 16)  # 18 tokens
SEMANTIC, REFINEMENT = SemanticConfig((3, 4, 6), hidden=8), RefinementConfig()
BRANCHES = {
    "full": ProPhy((0, 2), SEMANTIC, REFINEMENT),
    "pb": ProPhy((0, 2)),
    "pb+seb": ProPhy((1, 3), SEMANTIC),
    "pb+reb": ProPhy((0, 1, 2, 3), None, REFINEMENT),
    "token basis": ProPhy((0, 2), SemanticConfig((3, 2, 3), basis_space="token"), REFINEMENT),
    "other basis size": ProPhy((0, 2), SemanticConfig((2, 8, 8)), REFINEMENT),
    "seb alone": ProPhy((0, 2), SEMANTIC, copies=False),
    "reb alone": ProPhy((0, 2), None, REFINEMENT, copies=False),
}


def make(branch: ProPhy | None, **sizes):
    model, params = _make(branch, tuple(sizes.items()))
    return model, jax.tree.map(lambda leaf: leaf, params)  # in dicts that a test may change


@functools.cache
def _make(branch: ProPhy | None, sizes: tuple):
    sizes = dict(dim=48, num_heads=2, num_layers=4, ffn_dim=96) | dict(sizes)
    backbone = build(dict(module="wan", text_dim=TEXT[1], text_len=TEXT[0], freq_dim=32, **sizes))
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"backbone": jax.jit(backbone.init)(keys[0])}
    # Wan's head starts at zero, which would hide everything.
    head = params["backbone"]["head"]["out"]
    head["kernel"] = 0.1 * jax.random.normal(keys[1], head["kernel"].shape)
    model = Model(backbone, {"branch": branch} if branch else {})
    if branch:
        init = functools.partial(model.init_part, "branch")
        params["branch"] = jax.jit(init)(jax.random.key(1), params)
    return model, params


def inputs(batch=2):
    keys = jax.random.split(jax.random.key(2), 2)
    mask = jnp.arange(TEXT[0])[None] < jnp.array([5, 12])[:batch, None]
    text = jax.random.normal(keys[1], (batch, *TEXT)) * mask[..., None]
    x = jax.random.normal(keys[0], (batch, *LATENT))
    return x, jnp.array([37.0, 800.0])[:batch], {"text": text, "text_mask": mask}


def away_from_zero(params, key=3):
    """Every parameter moved, so that no zero initialisation hides a path."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    moved = [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, moved)


# Outside jit the same operations run one by one: one branch in `make test`.
EAGER = [pytest.param(name, False, marks=() if name == "full" else pytest.mark.slow) for name in BRANCHES]


@pytest.mark.parametrize(("name", "jit"), [*((name, True) for name in BRANCHES), *EAGER])
def test_step_zero_is_the_backbone_bit_for_bit(name, jit):
    model, params = make(BRANCHES[name])
    wrap = jax.jit if jit else lambda f: f
    x, t, prompt = inputs()
    with_branch = wrap(model)(params, x, t, prompt).prediction
    alone = wrap(model.backbone)(params["backbone"], x, t, prompt["text"])
    assert with_branch.dtype == alone.dtype
    assert np.asarray(with_branch).tobytes() == np.asarray(alone).tobytes()
    # The same comparison must be able to fail: a hint that is not zero changes the output.
    own = params["branch"]
    if "exits" in own:
        own["exits"]["bias"] += 1e-3
    else:
        own["semantic"]["basis"] += 1e-2
    changed = wrap(model)(params, x, t, prompt).prediction
    assert np.asarray(changed).tobytes() != np.asarray(alone).tobytes()


def test_scale_zero_is_the_backbone_and_scale_moves_the_output():
    model, params = make(BRANCHES["full"])
    params = away_from_zero(params)
    x, t, prompt = inputs()
    alone = jax.jit(model.backbone)(params["backbone"], x, t, prompt["text"])
    silent, half, full = (jax.jit(model)(params, x, t, prompt, s).prediction for s in (0.0, 0.5, 1.0))
    np.testing.assert_array_equal(silent, alone)
    assert np.abs(half - alone).max() > 1e-3 and np.abs(full - half).max() > 1e-3


def test_blocks_are_copies_of_their_own_layers_in_fp32():
    model, params = make(BRANCHES["pb+seb"])  # layers 1, 3
    backbone = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params["backbone"])
    init = functools.partial(model.init_part, "branch")
    branch = jax.jit(init)(jax.random.key(1), {"backbone": backbone})
    for copy, source in zip(
        jax.tree.leaves(branch["blocks"]), jax.tree.leaves(backbone["blocks"]), strict=True
    ):
        assert copy.dtype == jnp.float32
        np.testing.assert_array_equal(copy, source[jnp.array([1, 3])].astype(jnp.float32))
    assert not np.array_equal(*np.asarray(branch["blocks"]["ffn"]["up"]["kernel"]))


def test_semantic_basis_by_hand():
    """X~ = X + sum_e rho_e B_e, seen through a branch whose input is X~."""
    model, params = make(BRANCHES["full"])
    params = away_from_zero(params)
    x, t, prompt = inputs()
    logits = model.parts["branch"].read(params["branch"], prompt)
    rho = np.asarray(jax.nn.softmax(logits), np.float64)
    basis = np.asarray(params["branch"]["semantic"]["basis"], np.float64)
    enhanced = np.asarray(x, np.float64) + sum(
        rho[:, e, None, None, None, None] * basis[e] for e in range(17)
    )
    without = Model(model.backbone, {"branch": dataclasses.replace(BRANCHES["full"], semantic=None)})
    # Both branches get X~; only their backbones differ in input, so compare the routing.
    expected = jax.jit(without)(params, jnp.float32(enhanced), t, prompt).seen["branch"].refinement
    got = jax.jit(model)(params, x, t, prompt).seen["branch"].refinement
    np.testing.assert_allclose(got, expected, atol=1e-5)  # fp32 against one fp64 sum


def test_semantic_router_reads_valid_text_alone():
    model, params = make(BRANCHES["full"])
    x, t, prompt = inputs()
    text, mask = prompt["text"], prompt["text_mask"]

    def read(text, mask):
        return model.parts["branch"].read(params["branch"], {"text": text, "text_mask": mask})

    logits = read(text, mask)
    noisy = jnp.where(mask[..., None], text, 7.0)
    np.testing.assert_array_equal(read(noisy, mask), logits)
    other = read(text.at[0, 0].add(1.0), mask)
    assert np.abs(other - logits)[0].max() > 0 and np.abs(other - logits)[1].max() == 0
    assert logits.shape == (2, 17) and logits.dtype == jnp.float32
    none = read(text, jnp.zeros_like(mask))
    assert np.isfinite(none).all()


def test_top_k_mask():
    rho = jnp.array([[0.1, 0.4, 0.4, 0.1], [0.7, 0.1, 0.1, 0.1]])
    np.testing.assert_array_equal(top_k_mask(rho, 1), [[0, 1, 0, 0], [1, 0, 0, 0]])  # ties: lower index
    np.testing.assert_array_equal(top_k_mask(rho, 2), [[0, 1, 1, 0], [1, 1, 0, 0]])
    np.testing.assert_array_equal(top_k_mask(rho, 4), 1)


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_refinement_experts_against_float64(top_k):
    config = RefinementConfig(top_k=top_k)
    experts = RefinementExperts(config)
    tokens = jax.random.normal(jax.random.key(0), (2, 5, 12)) * 3 + 1
    params = away_from_zero(experts.init(jax.random.key(1), tokens)["params"])
    refined, rho, aligned = experts.apply({"params": params}, tokens)

    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = np.asarray(tokens, np.float64)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    logits = normed @ p["router"]["kernel"] + p["router"]["bias"]
    want_rho = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    want = np.zeros_like(x)
    for b, n in np.ndindex(2, 5):
        for e in np.argsort(-want_rho[b, n], kind="stable")[:top_k]:
            want[b, n] += want_rho[b, n, e] * (x[b, n] @ p["kernel"][e] + p["bias"][e])
    h = want_rho @ p["align_hidden"]["kernel"] + p["align_hidden"]["bias"]
    want_aligned = np.asarray(nn.gelu(h)) @ p["align"]["kernel"] + p["align"]["bias"]
    np.testing.assert_allclose(rho, want_rho, atol=1e-5)  # fp32 products of width 12
    np.testing.assert_allclose(refined, want, atol=2e-5)
    np.testing.assert_allclose(aligned, want_aligned, atol=1e-5)


def test_every_branch_parameter_and_every_expert_gets_gradient():
    model, params = make(BRANCHES["full"])
    params["branch"] = away_from_zero(params["branch"])
    x, t, prompt = inputs()

    def loss(branch):
        output = model({**params, "branch": branch}, x, t, prompt)
        return (output.prediction**2).mean() + (output.seen["branch"].alignment ** 2).mean()

    gradient = jax.jit(jax.grad(loss))(params["branch"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)
    for name in ("kernel", "bias"):
        assert (np.abs(gradient["refinement"][name]).reshape(8, -1).max(1) > 0).all()
    assert (np.abs(gradient["semantic"]["basis"]).reshape(17, -1).max(1) > 0).all()


def test_at_step_zero_exits_learn_from_the_diffusion_loss_and_routers_from_theirs():
    model, params = make(BRANCHES["full"])
    x, t, prompt = inputs()

    def gradient_of(read):
        def loss(branch):
            return (read(model({**params, "branch": branch}, x, t, prompt)) ** 2).mean()

        return jax.jit(jax.grad(loss))(params["branch"])

    diffusion = gradient_of(lambda output: output.prediction)
    assert np.abs(diffusion["exits"]["kernel"]).max() > 0
    assert max(float(np.abs(g).max()) for g in jax.tree.leaves(diffusion["blocks"])) == 0
    aligned = gradient_of(lambda output: output.seen["branch"].alignment)
    assert np.abs(aligned["refinement"]["router"]["kernel"]).max() > 0
    assert np.abs(aligned["blocks"]["ffn"]["up"]["kernel"]).max() > 0
    assert np.abs(aligned["semantic"]["basis"]).max() > 0


POLICIES = ("none", "products", "qkv", "attention", "self_attention", "full")
# Every policy with two sets of layers; the policies do not know the layers.
OFTEN = [(layers, remat) for layers in ((0, 3, 6), (1, 3, 5, 6)) for remat in POLICIES]
OFTEN += [
    pytest.param(layers, remat, marks=() if remat == "self_attention" else pytest.mark.slow)
    for layers in ((2, 4), (4,))
    for remat in POLICIES
]


@pytest.mark.parametrize(("layers", "remat"), OFTEN)
def test_attention_runs_as_often_as_it_must(layers, remat):
    """L + K times forwards and L - l_1 - 1 + K times backwards, and never twice unless remat says so."""
    depth, tokens, words = 9, 72, 64  # more scores than the blockwise form leaves to one softmax
    backbone = build(
        dict(module="wan", dim=24, num_heads=2, num_layers=depth, ffn_dim=32)
        | dict(text_dim=8, text_len=words, freq_dim=8, remat=remat)
    )
    backbone = dataclasses.replace(backbone, attention=functools.partial(attention, backend="blockwise"))
    branch = ProPhy(layers, SemanticConfig((3, 8, 12), hidden=8), REFINEMENT)
    model = Model(backbone, {"branch": branch})
    params = {"backbone": jax.eval_shape(backbone.init, jax.random.key(0))}
    params["branch"] = jax.eval_shape(
        lambda key, params: model.init_part("branch", key, params), jax.random.key(0), params
    )
    shapes = [(1, 3, 8, 12, 16), (1,), (1, words, 8), (1, words)]

    def loss(branch, frozen, x, t, text, mask):
        output = model({"branch": branch, "backbone": frozen}, x, t, {"text": text, "text_mask": mask})
        return (output.prediction**2).mean() + output.seen["branch"].alignment.mean()

    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    jaxpr = jax.make_jaxpr(jax.grad(loss))(params["branch"], params["backbone"], *args)
    forward = depth + len(layers)
    backward = depth - layers[0] - 1 + len(layers)
    calls = attention_calls(jaxpr)
    # Self-attention, and the one to the text.
    for keys, repeating in ((tokens, ("full",)), (words, ("full", "self_attention"))):
        again = backward if remat in repeating else 0
        assert calls["backward", keys] == backward
        assert calls["forward", keys] == forward + again


def _scan_outputs(jaxpr, reverse: bool):
    """Shapes that scans over layers return, in that direction."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan" and equation.params["reverse"] == reverse:
            yield from (variable.aval.shape for variable in equation.outvars)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda item: hasattr(item, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _scan_outputs(inner, reverse)


@pytest.mark.parametrize("remat", ["none", "attention"])
def test_frozen_parameters_get_no_gradient_and_are_not_copied(remat):
    """By the jaxpr: no loop returns a stack shaped as some layers' frozen weights."""
    branch = ProPhy((2, 4), SEMANTIC, REFINEMENT)
    model, params = make(branch, num_layers=7, remat=remat)
    x, t, prompt = inputs()
    trainable, frozen = optim.split(params, (("branch/", 1.0), ("backbone/", None)))

    def loss(trainable):
        output = model(optim.merge(trainable, frozen), x, t, prompt)
        return (output.prediction**2).mean() + output.seen["branch"].alignment.mean()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(trainable).jaxpr
    weights = {leaf.shape[1:] for leaf in jax.tree.leaves(frozen["backbone"]["blocks"]) if leaf.ndim > 2}
    backward, forward = (
        {shape for shape in _scan_outputs(jaxpr, reverse) if shape[-2:] in weights}
        for reverse in (True, False)
    )
    # The copies, each a stack of its own, have weight gradients. The frozen segments have 3, 2 and 2 blocks.
    assert backward and all(shape[0] == 1 for shape in backward)
    assert not forward


def test_bf16_backbone_keeps_routers_in_fp32():
    model, params = make(BRANCHES["full"], dtype="bfloat16")
    x, t, prompt = inputs()
    output = model(away_from_zero(params), x, t, prompt)
    assert output.prediction.dtype == jnp.float32
    assert output.seen["branch"].refinement.dtype == output.seen["branch"].alignment.dtype == jnp.float32
    np.testing.assert_allclose(output.seen["branch"].refinement.sum(-1), 1.0, atol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(output))


def test_batch_of_one_equals_its_row_in_a_batch():
    model, params = make(BRANCHES["full"])
    params = away_from_zero(params)
    x, t, prompt = inputs()
    both = jax.jit(model)(params, x, t, prompt)
    one = jax.jit(model)(params, x[1:], t[1:], jax.tree.map(lambda leaf: leaf[1:], prompt))
    np.testing.assert_allclose(one.prediction, both.prediction[1:], atol=1e-5)  # other matmul shapes


def count_train_flops(name: str | None) -> int:
    """Of one clip's gradient by what is trained: the branch, or the backbone where there is none."""
    model, params = make(BRANCHES[name] if name else None, remat="full")
    trained = {key: params.pop(key) for key in (model.parts or ("backbone",))}

    def loss(trained):
        output = flops.plain(model)({**params, **trained}, *inputs(1))
        aligned = output.seen["branch"].alignment if name == "full" else jnp.zeros(1)
        return (output.prediction**2).mean() + (aligned**2).mean()

    return flops.model_flops(jax.grad(loss), trained)


def test_train_flops_by_hand():
    """Trained products count three times, but for the first of a path, whose input needs no gradient."""
    n, d, f, s, t, e = 18, 48, 96, TEXT[0], 32, TEXT[1]
    patch, text, time = 2 * n * 64 * d, 2 * s * e * d, 2 * t * d  # the first layers of the embeddings
    block = 12 * n * d * d + 4 * s * d * d + 4 * n * d * f + 4 * n * n * d + 4 * n * s * d
    forward = 4 * block + patch + text + 2 * s * d * d + time + 14 * d * d + 2 * n * d * 64
    x, times, prompt = inputs(1)
    model, params = make(None)
    assert flops.model_flops(model.backbone, params["backbone"], x, times, prompt["text"]) == forward
    assert count_train_flops(None) == 3 * forward - patch - text - time

    # Layers 0, 2 of 4: three frozen blocks pass the gradient of their input on, as does the head.
    frozen = 12 * n * d * d + 4 * n * d * f + 8 * n * n * d + 4 * n * s * d
    exits, text_keys = 2 * 2 * n * d * d, 2 * 4 * s * d * d
    blocks = forward + 3 * frozen + 2 * n * d * 64 + 3 * 2 * block - text_keys + 3 * exits
    assert count_train_flops("pb") == blocks
    experts = 3 * 8 * 2 * n * d * d + 3 * 2 * n * 8 * d  # kernels, biases
    routing = 3 * 2 * n * (d * 8 + 8 * 64 + 64 * 17)  # router, then P'_r
    semantic = 2 * (2 * e * 8 + 3 * 8 * 17) + 3 * 2 * 17 * 3 * 4 * 6 * 16 + 2 * patch
    assert count_train_flops("full") == blocks + experts + routing + semantic


def test_paper_size_parameter_counts():
    """Wan-1.3B, K=10: the blocks and exits, 36 M of latent bases, 8 experts of 1536 x 1536."""
    backbone = build(dict(module="wan", variant="1.3b"))
    branch = ProPhy(tuple(range(0, 30, 3)), SemanticConfig((21, 60, 104)), REFINEMENT)
    frozen = jax.eval_shape(backbone.init, jax.random.key(0))
    shapes = jax.eval_shape(
        lambda key, frozen: branch.init(key, backbone, {"backbone": frozen}), jax.random.key(0), frozen
    )
    count = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in shapes.items()}
    d, f = 1536, 8960
    block = 8 * (d * d + d) + 4 * d + 2 * d * f + f + d + 2 * d + 6 * d
    assert count["blocks"] == 10 * block
    assert count["exits"] == 10 * (d * d + d)
    assert shapes["semantic"]["basis"].size == 17 * 21 * 60 * 104 * 16 == 35_642_880
    assert shapes["refinement"]["kernel"].size == 8 * d * d


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        (dict(layers=()), "layers=.. of the branch"),
        (dict(layers=(2, 0)), "ascending"),
        (dict(layers=(0,), semantic=dict(basis_grid=(1, 1, 1), basis_space="pixel")), "basis_space"),
    ],
)
def test_wrong_configurations_are_refused(spec, word):
    with pytest.raises(UserError, match=word):
        prophy.build(**spec)


def test_wrong_sizes_are_refused():
    with pytest.raises(UserError, match="has 4 blocks"):
        make(ProPhy((0, 4)))
    model, params = make(ProPhy((0,), SemanticConfig((1, 1, 1), basis_space="token")))
    with pytest.raises(UserError, match="one clip size"):
        model(params, *inputs())
