"""ProPhy's physical branch next to a video DiT (ProPhy, CVPR 2026).

    X~ = X + sum_e rho_s[e] B_e                 Semantic Expert Block: which physics the prompt implies
    c_0 = embed(X~),  c_i = PB_i(c_{i-1})       Physical Blocks: copies of the backbone's own blocks
    c_K = sum_{e in topk rho_r} rho_r[e] W_e c_K    Refinement Expert Block: which physics each token shows
    x <- x + scale * exit_i(c_i)                added to the video stream after backbone block layers[i]

The branch never reads the backbone's running state, so that it fits any backbone. Every exit starts at
zero: at step 0 the model is the backbone, bit for bit.

Without physical blocks (the paper's "LoRA + SEB" and "LoRA + REB") there is no stream of its own: the
backbone itself goes on from embed(X~), and the refinement experts act on its tokens after the last block of
`layers`, x <- x + scale * exit(sum_e rho_r[e] W_e x). How the paper attaches them then is not stated.

B batch, T h w latent grid, N video tokens, L text length, D text width, C model width,
E_s semantic experts, E_r refinement experts, E_a aligned categories, K physical blocks.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from prophy_jax.models.backbone import Backbone, Params, Stream, Visit
from prophy_jax.models.beside.part import Batch, Flow, Part
from prophy_jax.run.errors import UserError


@dataclasses.dataclass(frozen=True)
class SemanticConfig:
    """Semantic Expert Block.

    Attributes:
        basis_grid: (T, h, w) of B_e, in latents or tokens.
        experts: E_s; where it is not stated, one for each category.
        hidden: Width of the router's MLP.
        basis_space: "latent": B_e is (T, h, w, 16); "token": it is (N, C).
    """

    basis_grid: tuple[int, int, int]
    experts: int = 17
    hidden: int = 512
    basis_space: str = "latent"

    def __post_init__(self) -> None:
        if self.basis_space not in ("latent", "token"):
            raise UserError(f'semantic.basis_space={self.basis_space!r}: choose "latent" or "token"')


@dataclasses.dataclass(frozen=True)
class RefinementConfig:
    """Refinement Expert Block.

    Attributes:
        experts: E_r, linear ones.
        top_k: How many of them a token chooses.
        categories: E_a, those of the token labels; where it is not stated, as many as there are.
        align_hidden: Width of the MLP that turns rho_r into P'_r.
    """

    experts: int = 8
    top_k: int = 2
    categories: int = 17
    align_hidden: int = 64


class Routing(flax.struct.PyTreeNode):
    """What the routers decided; None where the branch lacks that part. All fp32."""

    semantic_logits: jax.Array | None = None  # (B, E_s); rho_s is their softmax
    refinement: jax.Array | None = None  # (B, N, E_r) rho_r, all experts, sums to 1
    alignment: jax.Array | None = None  # (B, N, E_a) P'_r = MLP(rho_r)


class SemanticRouter(nn.Module):
    """Masked mean of the text -> MLP -> (B, E_s) logits, in fp32."""

    config: SemanticConfig

    @nn.compact
    def __call__(self, text: jax.Array, text_mask: jax.Array) -> jax.Array:
        mask = text_mask.astype(jnp.float32)[..., None]  # (B, L, 1)
        pooled = (text.astype(jnp.float32) * mask).sum(1) / jnp.maximum(mask.sum(1), 1.0)
        hidden = nn.gelu(nn.Dense(self.config.hidden, name="hidden")(pooled))
        return nn.Dense(self.config.experts, name="logits")(hidden)


class RefinementExperts(nn.Module):
    """(B, N, C) tokens -> refined tokens, rho_r (B, N, E_r), P'_r (B, N, E_a).

    Every expert is computed for every token and the unchosen ones are weighted by zero: for a few linear
    experts that is a few well-shaped matrix products. The weights are the chosen rho_r as they are, not
    renormalised, as in the paper's equation. The router sees normalised tokens, in fp32.
    """

    config: RefinementConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        experts, width = self.config.experts, tokens.shape[-1]
        normed = nn.LayerNorm(use_bias=False, use_scale=False, use_fast_variance=False, name="router_norm")(
            tokens.astype(jnp.float32)
        )
        rho = jax.nn.softmax(nn.Dense(experts, name="router")(normed))  # (B, N, E_r)
        weights = (rho * top_k_mask(rho, self.config.top_k)).astype(self.dtype)
        kernel = self.param(
            "kernel", nn.initializers.lecun_normal(batch_axis=0), (experts, width, width)
        ).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (experts, width)).astype(self.dtype)
        refined = mix_experts(tokens.astype(self.dtype), weights, kernel, bias)
        hidden = nn.gelu(nn.Dense(self.config.align_hidden, name="align_hidden")(rho))
        return refined, rho, nn.Dense(self.config.categories, name="align")(hidden)


@jax.checkpoint  # otherwise the backward pass would hold every weighted copy of the tokens
def mix_experts(tokens: jax.Array, weights: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """sum_e w_e (x W_e + b_e), one expert after the other, so that no (B, N, E, C) is held.

    Tokens x are weighted before the product: no gradient then needs the experts' outputs.

    The sum is taken in fp32.

    Args:
        tokens: (B, N, C).
        weights: (B, N, E).
        kernel: (E, C, C).
        bias: (E, C).
    """
    total = jnp.matmul(weights, bias, preferred_element_type=jnp.float32)
    for expert, matrix in enumerate(kernel):
        weighted = weights[..., expert, None] * tokens
        total += jnp.matmul(weighted, matrix, preferred_element_type=jnp.float32)
    return total.astype(tokens.dtype)


def top_k_mask(rho: jax.Array, k: int) -> jax.Array:
    """(..., E) -> 1.0 at the k largest entries, 0.0 elsewhere; ties go to the lower index.

    By k maxima: `jax.lax.top_k` is not split over devices, so that each would gather the whole batch.
    """
    mask = jnp.zeros_like(rho)
    for _ in range(k):
        mask += jax.nn.one_hot(jnp.where(mask > 0, -jnp.inf, rho).argmax(-1), rho.shape[-1], dtype=rho.dtype)
    return mask


def cast_kernels(tree: Any, dtype: Any) -> Any:
    """The matrices of a parameter tree in the dtype of the products; the rest as it is.

    Projections of the time, named "modulation", are computed in fp32 and stay as they are too.
    """

    def cast(path: tuple, leaf: Any) -> Any:
        *modules, name = (entry.key for entry in path)
        return leaf.astype(dtype) if name == "kernel" and "modulation" not in modules else leaf

    return jax.tree_util.tree_map_with_path(cast, tree)


@dataclasses.dataclass(frozen=True)
class ProPhy(Part):
    """The physical branch. Parameters: {"semantic", "blocks", "exits", "refinement"}, where it has them.

    Attributes:
        layers: Backbone blocks that are copied, and after which the copies' hints are added; ascending.
        copies: Whether there are physical blocks.
        semantic: Semantic Expert Block; None: the branch has none.
        refinement: Refinement Expert Block; None: the branch has none.
        categories: Names of the categories of the labels, in their order; empty: they are not known.
    """

    layers: tuple[int, ...]
    semantic: SemanticConfig | None = None
    refinement: RefinementConfig | None = None
    categories: tuple[str, ...] = ()
    copies: bool = True

    def __post_init__(self) -> None:
        if not (self.copies or self.semantic or self.refinement):
            raise UserError("the branch has neither physical blocks nor expert blocks: leave it out")
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise UserError(f"layers={self.layers} of the branch: list at least one block, ascending from 0")
        if self.refinement and not 1 <= self.refinement.top_k <= self.refinement.experts:
            raise UserError(
                f"refinement.top_k={self.refinement.top_k} of the branch: choose 1 to experts="
                f"{self.refinement.experts}"
            )

    def init(self, key: jax.Array, backbone: Backbone, params: Params) -> dict[str, Any]:
        """Parameters in fp32: blocks copied from their own layers, exits and bases zero."""
        stacked = params["backbone"]["blocks"]
        depth, layers = jax.tree.leaves(stacked)[0].shape[0], jnp.array(self.layers)
        if self.layers[-1] >= depth:
            raise UserError(f"layers={self.layers} of the branch: the backbone has {depth} blocks")
        width, exits = backbone.config.dim, len(self.layers) if self.copies else int(bool(self.refinement))
        drawn: dict[str, Any] = {}
        if self.copies:
            drawn["blocks"] = jax.tree.map(lambda leaf: leaf[layers].astype(jnp.float32), stacked)
        if exits:
            drawn["exits"] = {"kernel": jnp.zeros((exits, width, width)), "bias": jnp.zeros((exits, width))}
        semantic_key, refinement_key = jax.random.split(key)
        if self.semantic:
            text = jnp.zeros((1, 1, backbone.config.text_dim))
            router = SemanticRouter(self.semantic).init(semantic_key, text, jnp.ones((1, 1), bool))
            grid, token = self.semantic.basis_grid, self.semantic.basis_space == "token"
            shape = (math.prod(grid), width) if token else (*grid, backbone.config.in_channels)
            basis = jnp.zeros((self.semantic.experts, *shape))
            drawn["semantic"] = {"router": router["params"], "basis": basis}
        if self.refinement:
            experts = RefinementExperts(self.refinement).init(refinement_key, jnp.zeros((1, 1, width)))
            drawn["refinement"] = experts["params"]
        return drawn

    def read(self, params: Params, prompt: Batch) -> Any:
        """(B, E_s) logits of the semantic router; None without one. Reads the valid rows of text alone."""
        if not self.semantic:
            return None
        router = SemanticRouter(self.semantic)
        return router.apply({"params": params["semantic"]["router"]}, prompt["text"], prompt["text_mask"])

    def read_ahead(
        self, backbone: Backbone, params: Params, text: jax.Array, mask: jax.Array, rows: int | None
    ) -> Any:
        return backbone.text_ahead(params["blocks"], text, mask, rows) if self.copies else None

    def enter(self, params: Params, flow: Flow) -> Flow:
        return flow if self.copies else flow._replace(stream=self._enhanced(params, flow))

    def visits(self, params: Params, flow: Flow) -> tuple[Any, tuple[Visit, ...]]:
        """Hint i follows backbone block layers[i]; the carry is the branch's own stream.

        Without physical blocks there is one hint, of the backbone's own tokens, and no carry.
        """
        backbone, cond, dtype = flow.backbone, flow.cond, flow.stream.video.dtype
        if "exits" not in params:
            return None, ()
        # Cast once, rather than in each block and again where it is recomputed.
        exits = cast_kernels(params["exits"], dtype)
        copies = (cast_kernels(params["blocks"], dtype), flow.ahead) if self.copies else ()

        def copy(hidden: Stream, layer: Any) -> Stream:
            params, ahead = jax.tree.map(lambda leaf: leaf[None], layer)  # a stack of one
            return backbone.blocks(params, hidden, cond, ahead=ahead)

        def add(stream: Stream, tokens: jax.Array, exit: Params) -> Stream:
            hint = flow.scale * (tokens @ exit["kernel"] + exit["bias"].astype(dtype))
            return stream.replace(video=stream.video + hint.astype(dtype))

        def visit(hidden: Stream, stream: Stream, x: Any) -> tuple[Stream, Stream, Any]:
            exit, following = x
            return copy(hidden, following), add(stream, hidden.video, exit), ()

        def last_visit(hidden: Stream, stream: Stream, exit: Params) -> tuple[Stream, Stream, Any]:
            tokens, seen = (hidden if self.copies else stream).video, []
            if self.refinement:
                experts: Any = RefinementExperts(self.refinement, dtype=dtype)
                tokens, *seen = experts.apply({"params": params["refinement"]}, tokens)
            return hidden, add(stream, tokens, exit), tuple(seen)

        def take(tree: Any, index: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf[index], tree)

        if not self.copies:
            return None, (Visit(self.layers[-1:], last_visit, exits),)
        first = copy(self._enhanced(params, flow), take(copies, 0))
        return first, (
            Visit(self.layers[:-1], visit, (take(exits, slice(None, -1)), take(copies, slice(1, None)))),
            Visit(self.layers[-1:], last_visit, take(exits, slice(-1, None))),
        )

    def leave(self, params: Params, flow: Flow, outs: Sequence[Any]) -> tuple[Stream, Routing]:
        routing = Routing(semantic_logits=flow.read)
        if self.refinement:
            rho, aligned = (out[0] for out in outs[-1])
            routing = routing.replace(refinement=rho, alignment=aligned)
        return flow.stream, routing

    def token_maps(self, seen: Routing) -> jax.Array | None:
        """P'_r: where the branch sees which category."""
        return seen.alignment

    def statistics(self, seen: Routing) -> dict[str, jax.Array]:
        found: dict[str, jax.Array] = {}
        if seen.semantic_logits is not None:
            found |= router_statistics("semantic", jax.nn.softmax(seen.semantic_logits))
        if seen.refinement is not None and self.refinement:
            found |= router_statistics("refinement", seen.refinement, self.refinement.top_k)
        return {f"router/{name}": value for name, value in found.items()}

    def _enhanced(self, params: Params, flow: Flow) -> Stream:
        """embed(X~)."""
        if self.semantic is None:
            return flow.stream
        rho = jax.nn.softmax(flow.read)  # (B, E_s)
        prior = jnp.einsum("be,e...->b...", rho, params["semantic"]["basis"])  # (B, T, h, w, 16) or (B, N, C)
        video, latents = flow.stream.video, flow.latents
        if self.semantic.basis_space == "token":
            if prior.shape[1] != video.shape[1]:
                raise UserError(
                    f"semantic.basis_grid={self.semantic.basis_grid} has {prior.shape[1]} tokens, "
                    f'the clip {video.shape[1]}: a "token" basis fits one clip size only'
                )
            return flow.stream.replace(video=video + prior.astype(video.dtype))
        if prior.shape != latents.shape:
            prior = jax.image.resize(prior, latents.shape, "linear")
        return flow.backbone.embed(flow.params, latents + prior, flow.t, flow.text)[0]


def router_statistics(name: str, rho: jax.Array, top_k: int = 0) -> dict[str, jax.Array]:
    """What to watch in a router's probabilities rho (..., E), all in [0, 1].

    entropy: of one decision, on average; mean_entropy: of the average decision, whose fall is collapse;
    load_e: the share of expert e in the top-k choices, or in rho when `top_k` is 0.
    """
    experts, axes = rho.shape[-1], tuple(range(rho.ndim - 1))

    def entropy(p: jax.Array) -> jax.Array:
        return -(p * jnp.log(jnp.maximum(p, 1e-9))).sum(-1) / math.log(experts)

    load = (top_k_mask(rho, top_k) / top_k if top_k else rho).mean(axes)  # (E,)
    return {
        f"{name}/entropy": entropy(rho).mean(),
        f"{name}/mean_entropy": entropy(rho.mean(axes)),
        **{f"{name}/load_{expert}": load[expert] for expert in range(experts)},
    }


def build(
    layers: Sequence[int],
    semantic: Mapping[str, Any] | None = None,
    refinement: Mapping[str, Any] | None = None,
    categories: Sequence[str] = (),
    copies: bool = True,
) -> ProPhy:
    """Builds the branch from nested dicts of a configuration or its JSON.

    Args:
        layers: See `ProPhy`.
        semantic: Fields of `SemanticConfig`, or None.
        refinement: Fields of `RefinementConfig`, or None.
        categories: Names of the categories of the data; empty: not known.
        copies: Whether there are physical blocks.

    Raises:
        UserError: on another number of categories than there are.
    """
    count = len(categories)
    if semantic:
        stated = {"experts": count} if count else {}
        semantic = {**stated, **semantic, "basis_grid": tuple(semantic["basis_grid"])}
    if refinement and count:
        refinement = {"categories": count, **refinement}
        if refinement["categories"] != count:
            raise UserError(
                f"refinement.categories={refinement['categories']} of the branch, but the data have {count} "
                f"({', '.join(categories)}): leave it out, or name another file with "
                "--config.data.taxonomy=FILE"
            )
    return ProPhy(
        layers=tuple(layers),
        semantic=SemanticConfig(**semantic) if semantic else None,
        refinement=RefinementConfig(**refinement) if refinement else None,
        categories=tuple(categories),
        copies=copies,
    )
