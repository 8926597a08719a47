"""ProPhy's physical branch beside a video DiT (ProPhy, CVPR 2026).

    X~ = X + sum_e rho_s[e] B_e                 Semantic Expert Block: which physics the prompt implies
    c_0 = embed(X~),  c_i = PB_i(c_{i-1})       Physical Blocks: copies of the backbone's own blocks
    c_K = sum_{e in topk rho_r} rho_r[e] W_e c_K    Refinement Expert Block: which physics each token shows
    x <- x + scale * exit_i(c_i)                added to the video stream after backbone block layers[i]

The branch is written against the backbone's seam (embed -> blocks -> head on a `Stream`) and never reads
the backbone's running state, so it sits beside any backbone that offers that seam. Every exit starts at
zero: at step 0 the model is the backbone, bit for bit.

B batch, T h w latent grid, N video tokens, L text length, D text width, C model width,
E_s semantic experts, E_r refinement experts, E_a aligned categories, K physical blocks.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from prophy_jax.run.errors import UserError

Params = Mapping[str, Any]

# Of `ProPhy.train_flops`, as commands print it.
FLOP_RULE = (
    "2 per multiply-add of matrix products and attention; the backward pass of attention counts twice the "
    "forward pass, that of frozen layers the gradient of their input alone, up to the first hint nothing; "
    "nothing recomputed"
)


@dataclasses.dataclass(frozen=True)
class SemanticConfig:
    """Semantic Expert Block. `basis_space` "latent": B_e is (T, h, w, 16), "token": (N, C)."""

    basis_grid: tuple[int, int, int]  # (T, h, w) in latents, or the token grid for "token"
    experts: int = 17
    hidden: int = 512
    basis_space: str = "latent"

    def __post_init__(self):
        if self.basis_space not in ("latent", "token"):
            raise UserError(f'branch.semantic.basis_space={self.basis_space!r}: choose "latent" or "token"')


@dataclasses.dataclass(frozen=True)
class RefinementConfig:
    """Refinement Expert Block: `top_k` of `experts` linear experts per token."""

    experts: int = 8
    top_k: int = 2
    categories: int = 17
    align_hidden: int = 64


@dataclasses.dataclass(frozen=True)
class BranchConfig:
    """Which parts the branch has; a part that is None does not exist.

    layers: backbone blocks that are copied, and after which the copies' hints are added; ascending.
    """

    layers: tuple[int, ...]
    semantic: SemanticConfig | None = None
    refinement: RefinementConfig | None = None

    def __post_init__(self):
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise UserError(f"branch.layers={self.layers}: list at least one block, ascending")

    @classmethod
    def from_dict(cls, spec: Mapping[str, Any]) -> "BranchConfig":
        """From nested dicts of a configuration or its JSON; an absent part is None or missing."""
        semantic, refinement = spec.get("semantic"), spec.get("refinement")
        if semantic:
            semantic = SemanticConfig(**{**semantic, "basis_grid": tuple(semantic["basis_grid"])})
        return cls(
            layers=tuple(spec["layers"]),
            semantic=semantic or None,
            refinement=RefinementConfig(**refinement) if refinement else None,
        )


@flax.struct.dataclass
class Routing:
    """What the routers decided; None where the branch lacks that part. All fp32."""

    semantic_logits: jax.Array | None = None  # (B, E_s); rho_s is their softmax
    refinement: jax.Array | None = None  # (B, N, E_r) rho_r, all experts, sums to 1
    alignment: jax.Array | None = None  # (B, N, E_a) P'_r = MLP(rho_r)


@flax.struct.dataclass
class Prompt:
    """What the model reads of its prompts: the same at every step of a sampler."""

    text: jax.Array  # (B, L, C) text tokens
    semantic_logits: jax.Array | None = None  # (B, E_s)
    # What the blocks of the backbone and of the branch compute of the text alone: see `read_ahead`.
    backbone: Any = None
    branch: Any = None


@flax.struct.dataclass
class Output:
    velocity: jax.Array  # (B, T, h, w, 16), the backbone's prediction
    routing: Routing


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

    Args: tokens (B, N, C), weights (B, N, E), kernel (E, C, C), bias (E, C). The sum is taken in fp32.
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
class ProPhy:
    """A backbone and, unless `branch` is None, its physical branch.

    Parameters are one plain dict: {"backbone": ..., "branch": {"semantic", "blocks", "exits", "refinement"}}.
    """

    backbone: Any
    branch: BranchConfig | None = None

    def init_branch(self, key: jax.Array, backbone_params: Params) -> Params:
        """Branch parameters in fp32: blocks copied from their own layers, exits and bases zero."""
        config = self.branch
        stacked = backbone_params["blocks"]
        depth, layers = jax.tree.leaves(stacked)[0].shape[0], jnp.array(config.layers)
        if config.layers[-1] >= depth:
            raise UserError(f"branch.layers={config.layers}: the backbone has {depth} blocks")
        width = self.backbone.config.dim
        blocks = len(config.layers)
        params = {
            "blocks": jax.tree.map(lambda leaf: leaf[layers].astype(jnp.float32), stacked),
            "exits": {
                "kernel": jnp.zeros((blocks, width, width)),
                "bias": jnp.zeros((blocks, width)),
            },
        }
        semantic_key, refinement_key = jax.random.split(key)
        if config.semantic:
            router = SemanticRouter(config.semantic)
            text = jnp.zeros((1, 1, self.backbone.config.text_dim))
            params["semantic"] = {
                "router": router.init(semantic_key, text, jnp.ones((1, 1), bool))["params"],
                "basis": jnp.zeros((config.semantic.experts, *self._basis_shape())),
            }
        if config.refinement:
            experts = RefinementExperts(config.refinement)
            tokens = jnp.zeros((1, 1, width))
            params["refinement"] = experts.init(refinement_key, tokens)["params"]
        return params

    def _basis_shape(self) -> tuple[int, ...]:
        semantic = self.branch.semantic
        if semantic.basis_space == "token":
            return (math.prod(semantic.basis_grid), self.backbone.config.dim)
        return (*semantic.basis_grid, self.backbone.config.in_channels)

    def semantic_logits(self, params: Params, text: jax.Array, text_mask: jax.Array) -> jax.Array:
        """(B, L, D) text -> (B, E_s) logits. Needs neither latents nor noise."""
        router = SemanticRouter(self.branch.semantic)
        return router.apply({"params": params["branch"]["semantic"]["router"]}, text, text_mask)

    def read(self, params: Params, text: jax.Array, text_mask: jax.Array) -> Prompt:
        """What the model reads of text embeddings (B, L, D), padded as the backbone was trained on them.

        The mask (B, L) is read by the semantic router alone.
        """
        tokens = self.backbone.embed_text(params["backbone"], text)
        logits = None
        if self.branch is not None and self.branch.semantic:
            logits = self.semantic_logits(params, text, text_mask)
        return Prompt(tokens, logits)

    def read_ahead(
        self, params: Params, text: jax.Array, text_mask: jax.Array, rows: int | None = None
    ) -> Prompt:
        """As `read`, with all that the blocks compute of the text alone: for many steps on one prompt.

        `rows` shortens the padding, see the backbone's `text_ahead`.
        """
        prompt = self.read(params, text, text_mask)

        def ahead(part: str) -> Any:
            return self.backbone.text_ahead(params[part]["blocks"], prompt.text, text_mask, rows)

        return prompt.replace(backbone=ahead("backbone"), branch=ahead("branch") if self.branch else None)

    def __call__(
        self,
        params: Params,
        latents: jax.Array,
        t: jax.Array,
        text: jax.Array,
        text_mask: jax.Array,
        scale: float | jax.Array = 1.0,
    ) -> Output:
        """Predicts the velocity of noisy latents from text: `read`, then `predict`."""
        return self.predict(params, latents, t, self.read(params, text, text_mask), scale)

    def predict(
        self,
        params: Params,
        latents: jax.Array,
        t: jax.Array,
        prompt: Prompt,
        scale: float | jax.Array = 1.0,
    ) -> Output:
        """Predicts the velocity of noisy latents.

        Args:
          params: see the class.
          latents: (B, T, h, w, 16) noisy latents, normalised.
          t: (B,) model time in the backbone's units (Wan: 0..1000, CogVideoX: 0..999).
          prompt: of `read` or `read_ahead`, B rows.
          scale: multiplies every hint; 0 is the backbone alone.
        """
        stream, cond = self.backbone.embed(params["backbone"], latents, t, prompt.text)
        routing = Routing(semantic_logits=prompt.semantic_logits)
        if self.branch is None:
            frozen = params["backbone"]["blocks"]
            stream = self.backbone.blocks(frozen, stream, cond, ahead=prompt.backbone)
        else:
            hidden = self._enter(params, stream, latents, t, prompt)
            stream, routing = self._run_beside(params, stream, hidden, cond, prompt, scale, routing)
        return Output(self.backbone.head(params["backbone"], stream, cond), routing)

    def _run_beside(self, params, stream, hidden, cond, prompt, scale, routing):
        """All blocks of the backbone on `stream`, with the hints of the branch's blocks on `hidden`.

        Hint i follows segment i of the backbone, which ends with block layers[i]. Segments of one length
        share a compiled body. The first is apart: nothing before its hint is trained, so it has no
        backward pass.
        """
        backbone, layers, dtype = self.backbone, self.branch.layers, stream.video.dtype
        frozen, branch = params["backbone"]["blocks"], params["branch"]
        # Cast once, rather than in each block and again where it is recomputed.
        exits, copies = cast_kernels(branch["exits"], dtype), cast_kernels(branch["blocks"], dtype)
        starts = (0, *(layer + 1 for layer in layers))  # of the segments
        per_hint = (jnp.array(starts[:-1]), exits, (copies, prompt.branch))

        def copy(hidden, layer):
            params, ahead = jax.tree.map(lambda leaf: leaf[None], layer)  # a stack of one
            return backbone.blocks(params, hidden, cond, ahead=ahead)

        def segment(stream, start, count, tokens, exit):
            stream = backbone.blocks(frozen, stream, cond, start, count, prompt.backbone)
            hint = scale * (tokens @ exit["kernel"] + exit["bias"].astype(dtype))
            return stream.replace(video=stream.video + hint.astype(dtype))

        def take(tree, index):
            return jax.tree.map(lambda leaf: leaf[index], tree)

        hidden = copy(hidden, take(per_hint[2], 0))
        last = len(layers) - 1
        for (_, count), group in itertools.groupby(
            range(last), lambda i: (i == 0, starts[i + 1] - starts[i])
        ):
            first, *others = group

            def step(carry, layer, count=count):
                (stream, hidden), (start, exit, following) = carry, layer
                return (segment(stream, start, count, hidden.video, exit), copy(hidden, following)), None

            own, following = slice(first, first + 1 + len(others)), slice(first + 1, first + 2 + len(others))
            per_step = (*take(per_hint[:2], own), take(per_hint[2], following))
            if others:
                (stream, hidden), _ = jax.lax.scan(step, (stream, hidden), per_step)
            else:
                (stream, hidden), _ = step((stream, hidden), take(per_step, 0))

        tokens = hidden.video
        if self.branch.refinement:
            experts = RefinementExperts(self.branch.refinement, dtype=dtype)
            tokens, rho, aligned = experts.apply({"params": branch["refinement"]}, tokens)
            routing = routing.replace(refinement=rho, alignment=aligned)
        stream = segment(stream, starts[last], starts[last + 1] - starts[last], tokens, take(exits, last))
        depth = jax.tree.leaves(frozen)[0].shape[0]
        stream = backbone.blocks(frozen, stream, cond, starts[-1], depth - starts[-1], prompt.backbone)
        return stream, routing

    def _enter(self, params, stream, latents, t, prompt):
        """The branch's own stream, embed(X~)."""
        semantic = self.branch.semantic
        if semantic is None:
            return stream
        rho = jax.nn.softmax(prompt.semantic_logits)  # (B, E_s)
        basis = params["branch"]["semantic"]["basis"]
        prior = jnp.einsum("be,e...->b...", rho, basis)  # (B, T, h, w, 16) or (B, N, C)
        if semantic.basis_space == "token":
            if prior.shape[1] != stream.video.shape[1]:
                raise UserError(
                    f"branch.semantic.basis_grid={semantic.basis_grid} has {prior.shape[1]} tokens, "
                    f'the clip {stream.video.shape[1]}: a "token" basis fits one clip size only'
                )
            return stream.replace(video=stream.video + prior.astype(stream.video.dtype))
        if prior.shape != latents.shape:
            prior = jax.image.resize(prior, latents.shape, "linear")
        return self.backbone.embed(params["backbone"], latents + prior, t, prompt.text)[0]

    def train_flops(self, tokens: int) -> int:
        """Floating-point operations of one training step on one clip: 2 per multiply-add.

        Matrix products and attention, nothing recomputed. Trained parts count their forward pass three
        times. The frozen blocks after the first hint add the gradient with respect to their input; those
        up to it have no backward pass at all.
        """
        backbone, forward = self.backbone, self.backbone.forward_flops(tokens)
        if self.branch is None:
            return 3 * forward
        layers, width = self.branch.layers, backbone.config.dim
        frozen_backward = backbone.config.num_layers - layers[0] - 1
        linear = len(layers)  # the exits
        if self.branch.refinement:
            linear += self.branch.refinement.experts
        return (
            forward
            + frozen_backward * backbone.frozen_backward_flops(tokens)
            + 3 * len(layers) * backbone.block_flops(tokens)
            + 3 * linear * 2 * tokens * width**2
        )
