"""ProPhy's physical losses and their ablations (ProPhy, CVPR 2026), and how a step adds them up.

Each is a function of router outputs and labels that returns an fp32 scalar. A configuration lists the
losses it wants with their weights, e.g. {"relative": 0.1, "alignment": 0.02, "balance": 0.01}, the
paper's coefficients; a loss that is not listed is not computed.

B batch, N tokens, E_s semantic experts, E_r refinement experts, E_a aligned categories.
"""

import math

import jax
import jax.numpy as jnp

from prophy_jax.models.beside.prophy import top_k_mask

COARSE = ("relative", "bce")  # read the text alone: taken over the whole batch, once per step
FINE = ("alignment", "absolute_alignment", "balance")  # read the tokens: taken per microbatch


def _cosine_matrix(vectors: jax.Array) -> jax.Array:
    """(B, E) -> (B, B) cosines; zero rows give zero cosines and zero gradients."""
    squared = (vectors**2).sum(-1, keepdims=True)
    unit = vectors * jax.lax.rsqrt(jnp.where(squared > 0, squared, 1.0))
    return unit @ unit.T


def relative(semantic_logits: jax.Array, category: jax.Array, reduction: str = "sum") -> jax.Array:
    """L_coarse = sum_{i<j} (P_s[i,j] - Q_s[i,j])^2 over the batch, P_s and Q_s cosine matrices.

    Args:
      semantic_logits: (B, E_s); their softmax is rho_s.
      category: (B, 17) multi-hot q_s. A clip without any category has no cosine and joins no pair.
      reduction: "sum" as in the paper, or "mean" over the pairs.
    """
    difference = _cosine_matrix(jax.nn.softmax(semantic_logits)) - _cosine_matrix(category)
    labelled = category.sum(-1) > 0
    pairs = jnp.triu(labelled[:, None] & labelled[None, :], k=1)  # (B, B), i < j
    total = jnp.where(pairs, difference, 0.0) ** 2
    return total.sum() / (jnp.maximum(pairs.sum(), 1) if reduction == "mean" else 1)


def bce(semantic_logits: jax.Array, category: jax.Array) -> jax.Array:
    """Ablation of `relative`: mean binary cross-entropy of expert e against category e.

    Args: semantic_logits (B, 17), category (B, 17). Needs as many semantic experts as categories.
    Clips without any category are left out.
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

    Args: predicted P'_r, target Q_r and mask M (B, N, E_a); `count` is the size of M over the whole batch
    (a mean), or 1 (the paper's sum). An empty mask gives 0.
    """
    error = jnp.where(mask, predicted - target, 0.0)
    return (error**2).sum() / jnp.maximum(count, 1.0)


def balance(refinement: jax.Array, top_k: int) -> jax.Array:
    """L_balance = E_r sum_e f_e p_e (Shazeer 2017, Fedus 2021): 1 when the load is even.

    Args: refinement rho_r (B, N, E_r). f_e is the share of the top-k choices that went to expert e
    (no gradient), p_e the mean of rho_r.
    """
    chosen = jax.lax.stop_gradient(top_k_mask(refinement, top_k)).mean((0, 1)) / top_k  # (E_r,)
    return refinement.shape[-1] * (chosen * refinement.mean((0, 1))).sum()


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
