"""Counts what a jaxpr runs, loops by their length."""

import collections
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.extend.core import DropVar

# The blockwise form (compiled functions), cuDNN (primitives) and splash (Pallas kernels; its backward pass
# is two, and the one for keys and values is counted).
FORWARD = ("attention_forward", "dot_product_attention_fwd", "splash_mha_fwd")
BACKWARD = ("attention_backward", "dot_product_attention_bwd", "splash_mha_dkv")


def equations(jaxpr) -> Iterator[tuple]:
    """Each equation of a jaxpr and of those inside it, with the times that it runs.

    Equations whose results are not used are left out: no compiled program contains them.
    """
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if not eqn.effects and all(isinstance(v, DropVar) for v in eqn.outvars):
            continue
        yield eqn, 1
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(inner, "eqns"):
                for eqn_inside, count in equations(inner):
                    yield eqn_inside, times * count


def attention_calls(jaxpr) -> dict[tuple[str, int], int]:
    """{("forward" or "backward", M): calls} of the blockwise, cuDNN and splash attentions in a jaxpr.

    M counts the keys that the kernel sees: of one device inside shard_map, padded to whole blocks for splash.
    """
    calls = collections.Counter()
    for eqn, times in equations(jaxpr):
        params = (eqn.params.get(key, "") for key in ("name", "name_and_src_info"))
        kernel = " ".join([eqn.primitive.name, *map(str, params)])
        for kind, kernels in (("forward", FORWARD), ("backward", BACKWARD)):
            if any(name in kernel for name in kernels) and (keys := _keys(eqn, kind)):
                calls[kind, keys] += times
    return dict(calls)


def _keys(eqn, kind: str) -> int | None:
    if eqn.primitive.name in ("jit", "pjit"):
        # The blockwise form. Its first product makes scores, or their transpose in the backward pass. A
        # part of it without one only lays out arrays ahead of a loop.
        products = [e for e, _ in equations(eqn.params["jaxpr"]) if e.primitive.name == "dot_general"]
        return products[0].outvars[0].aval.shape[kind == "forward"] if products else None
    # q, k, v (B, M, H, D), in splash (B H, M, D), follow its tables of integers.
    avals = [v.aval for v in eqn.invars if jnp.issubdtype(v.aval.dtype, jnp.floating)]
    return [aval for aval in avals if aval.ndim >= 3][1].shape[1]
