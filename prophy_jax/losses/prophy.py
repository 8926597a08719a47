"""ProPhy's physical losses and their ablations (ProPhy, CVPR 2026).

Each is a function of router outputs and labels that returns an fp32 scalar. The paper's coefficients are
{"relative": 0.1, "alignment": 0.02, "balance": 0.01}.

B batch, N tokens, E categories, E_s semantic experts, E_r refinement experts, E_a = E aligned categories.
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import jax
import jax.numpy as jnp

from prophy_jax.losses.loss import Batch, Loss, Seen
from prophy_jax.models.backbone import Params
from prophy_jax.models.beside.prophy import ProPhy, top_k_mask


def _cosine_matrix(vectors: jax.Array) -> jax.Array:
    """(B, E) -> (B, B) cosines; zero rows give zero cosines and zero gradients."""
    squared = (vectors**2).sum(-1, keepdims=True)
    unit = vectors * jax.lax.rsqrt(jnp.where(squared > 0, squared, 1.0))
    return unit @ unit.T


def relative(semantic_logits: jax.Array, category: jax.Array, reduction: str = "sum") -> jax.Array:
    """L_coarse = sum_{i<j} (P_s[i,j] - Q_s[i,j])^2 over the batch, P_s and Q_s cosine matrices.

    Args:
        semantic_logits: (B, E_s); their softmax is rho_s.
        category: (B, E) multi-hot q_s. A clip without any category has no cosine and joins no pair.
        reduction: "sum" as in the paper, or "mean" over the pairs.
    """
    difference = _cosine_matrix(jax.nn.softmax(semantic_logits)) - _cosine_matrix(category)
    labelled = category.sum(-1) > 0
    pairs = jnp.triu(labelled[:, None] & labelled[None, :], k=1)  # (B, B), i < j
    total = jnp.where(pairs, difference, 0.0) ** 2
    return total.sum() / (jnp.maximum(pairs.sum(), 1) if reduction == "mean" else 1)


def bce(semantic_logits: jax.Array, category: jax.Array) -> jax.Array:
    """Ablation of `relative`: mean binary cross-entropy of expert e against category e.

    Needs as many semantic experts as categories.

    Args:
        semantic_logits: (B, E).
        category: (B, E). Clips without any category are left out.
    """
    labelled = (category.sum(-1, keepdims=True) > 0).astype(jnp.float32)
    entropy = jax.nn.softplus(semantic_logits) - semantic_logits * category
    return (entropy * labelled).sum() / jnp.maximum(labelled.sum() * category.shape[-1], 1.0)


def alignment_mask(target: jax.Array, present: jax.Array, positive: bool = True) -> jax.Array:
    """M = present AND Q_r > 0: (B, N, E_a) targets, (B, E_a) presence -> (B, N, E_a) bool.

    Without `positive`, the ablation "absolute alignment": every token of the categories present.
    """
    listed = jnp.broadcast_to(present[:, None, :] > 0, target.shape)
    return listed & (target > 0) if positive else listed


def alignment(
    predicted: jax.Array, target: jax.Array, mask: jax.Array, count: jax.Array | float
) -> jax.Array:
    """L_fine = sum_{M=1} (P'_r - Q_r)^2 / count.

    Args:
        predicted: P'_r (B, N, E_a).
        target: Q_r (B, N, E_a).
        mask: M (B, N, E_a). An empty one gives 0.
        count: The size of M over the whole batch (a mean), or 1 (the paper's sum).
    """
    error = jnp.where(mask, predicted - target, 0.0)
    return (error**2).sum() / jnp.maximum(count, 1.0)


def balance(refinement: jax.Array, top_k: int) -> jax.Array:
    """L_balance = E_r sum_e f_e p_e (Shazeer 2017, Fedus 2021): 1 when the load is even.

    f_e is the share of the top-k choices that went to expert e (no gradient), p_e the mean of rho_r.

    Args:
        refinement: rho_r (B, N, E_r).
        top_k: Experts that a token chooses.
    """
    chosen = jax.lax.stop_gradient(top_k_mask(refinement, top_k)).mean((0, 1)) / top_k  # (E_r,)
    return refinement.shape[-1] * (chosen * refinement.mean((0, 1))).sum()


# --- Rows of the table -------------------------------------------------------------------------------


def _relative(part: Any, params: Params, batch: Batch, reduction: str) -> jax.Array:
    """L_coarse: how alike two clips are routed, against how alike their categories are."""
    return relative(part.read(params, batch), batch["category"], reduction)


def _bce(part: Any, params: Params, batch: Batch, reduction: str) -> jax.Array:
    """L_coarse of an ablation: each semantic expert against one category."""
    return bce(part.read(params, batch), batch["category"])


def _mask(batch: Batch, positive: bool) -> jax.Array:
    return alignment_mask(batch["alignment"], batch["alignment_present"], positive)


def _aligned(positive: bool) -> Loss:
    """Token alignment where Q_r is positive, or everywhere in the categories present."""

    def count(batch: Batch, reduction: str) -> jax.Array:
        return jnp.float32(_mask(batch, positive).sum() if reduction == "mean" else 1)

    def share(seen: Seen, batch: Batch, count: Any) -> jax.Array:
        """L_fine: what each token is routed to, against the token labels."""
        return alignment(seen.of_part.alignment, batch["alignment"], _mask(batch, positive), count)

    def misfit(part: ProPhy, shapes: Mapping[str, tuple[int, ...]]) -> str:
        labels = shapes["alignment"][-1]
        if not part.refinement or part.refinement.categories == labels:
            return ""
        return f"refinement.categories={part.refinement.categories}, the token labels have {labels}"

    def idle(part: ProPhy, clips: int, zero: AbstractSet[str]) -> str:
        if zero.isdisjoint({"alignment", "alignment_present"} if positive else {"alignment_present"}):
            return ""
        return (
            "can only be 0: the clips have no token labels, so nothing teaches the branch where in a "
            "clip each category happens; make them with prophy_jax.label and name them with "
            "--config.data.side.alignment=DIR"
        )

    fields = ("alignment", "alignment_present")
    return Loss(ProPhy, "refinement", fields, share, count=count, reduction="mean", misfit=misfit, idle=idle)


def _balance(seen: Seen, batch: Batch, count: Any) -> jax.Array:
    """L_balance: 1 when all refinement experts are chosen equally often."""
    share = len(seen.error) / count  # a product of means: taken per microbatch, and averaged
    return share * balance(seen.of_part.refinement, seen.part.refinement.top_k)


def _misfit_of_experts(part: ProPhy, shapes: Mapping[str, tuple[int, ...]]) -> str:
    if not part.semantic or part.semantic.experts == shapes["category"][-1]:
        return ""
    return f"semantic.experts={part.semantic.experts}, the clips have {shapes['category'][-1]} categories"


def _no_categories(part: ProPhy, clips: int, zero: AbstractSet[str]) -> str:
    if "category" not in zero:
        return ""
    return (
        "can only be 0: the clips have no categories, so nothing teaches the semantic router which "
        "physics a prompt implies; prepare clips that have categories"
    )


def _no_pairs(part: ProPhy, clips: int, zero: AbstractSet[str]) -> str:
    if clips > 1:
        return _no_categories(part, clips, zero)
    return (
        "can only be 0: it compares the clips of a batch with each other and a batch has one, so nothing "
        "teaches the semantic router which physics a prompt implies; raise --config.batch_size and, by as "
        "much, --config.accumulation, which takes no more memory"
    )


def _no_choice(part: ProPhy, clips: int, zero: AbstractSet[str]) -> str:
    refinement = part.refinement
    if not refinement or refinement.top_k < refinement.experts:
        return ""
    return (
        f"is always 1: every token takes all {refinement.experts} refinement experts, so the load is even "
        "whatever the router does; lower refinement.top_k of the part, or leave this loss out"
    )


LOSSES = {
    "alignment": _aligned(positive=True),
    "absolute_alignment": _aligned(positive=False),
    "balance": Loss(ProPhy, "refinement", share=_balance, idle=_no_choice),
    "relative": Loss(ProPhy, "semantic", ("category",), whole=_relative, idle=_no_pairs),
    "bce": Loss(
        ProPhy, "semantic", ("category",), whole=_bce, misfit=_misfit_of_experts, idle=_no_categories
    ),
}
