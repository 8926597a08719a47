"""Which parameters train, with which learning rate, and the optimizer over them.

A configuration lists `optimizer.groups` as (pattern, name) pairs and gives each name its learning rate in
`optimizer.learning_rates`; 0 or None freezes. A number may stand in place of the name, as in earlier
versions. A parameter belongs to the first pattern that matches its path ("branch/blocks/ffn/up/kernel") from
the start. Every parameter must be claimed and every pattern must claim something, so that a renamed layer
cannot silently stop training.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from prophy_jax.run.errors import UserError, check_pattern

Tree = dict[str, Any]
Groups = Sequence[tuple[str, float | None]]


def groups_of(settings: Any) -> Groups:
    """The (pattern, learning rate) pairs of `config.optimizer`, None where parameters are frozen.

    Raises:
        UserError: on a group whose name has no learning rate, a learning rate that no group names, and a
            pattern that is no regular expression.
    """
    for pattern, _ in settings.groups:
        check_pattern(pattern, "optimizer.groups")
    rates = getattr(settings, "learning_rates", None) or {}
    names = [name for _, name in settings.groups if isinstance(name, str)]
    unknown, unused = sorted(set(names) - set(rates)), sorted(set(rates) - set(names))
    if unknown:
        raise UserError(
            f"optimizer.groups names {unknown}, optimizer.learning_rates has {sorted(rates)}: give each "
            "name of a group its learning rate, 0 to freeze it"
        )
    if unused and names:
        raise UserError(
            f"optimizer.learning_rates has {unused}, which no group of optimizer.groups names: remove them, "
            f"or name a group so, such as ({unused[0] + '/'!r}, {unused[0]!r})"
        )
    return tuple(
        (pattern, (rates[rate] or None) if isinstance(rate, str) else rate)
        for pattern, rate in settings.groups
    )


def warn_of_unused_rates(settings: Any) -> None:
    """Says on stderr when groups in the form of earlier versions leave `learning_rates` without effect."""
    rates = getattr(settings, "learning_rates", None)
    if rates and not any(isinstance(name, str) for _, name in settings.groups):
        print(
            f"warning: optimizer.learning_rates {sorted(rates)} are not used, because optimizer.groups has "
            'numbers in place of names: write names there, such as ("branch/", "branch")',
            file=sys.stderr,
        )


def learning_rates(steps: int, settings: Any) -> dict[str, optax.Schedule]:
    """Group -> its learning rate in a step, counted from 0; frozen groups have none."""
    names = [name if isinstance(name, str) else pattern.strip("/") for pattern, name in settings.groups]
    pairs = zip(names, groups_of(settings), strict=True)
    return {name: schedule(peak, steps, settings) for name, (_, peak) in pairs if peak is not None}


def claim(params: Mapping[str, Any], groups: Groups) -> dict[str, str]:
    """Path -> the pattern that claims it. Raises UserError naming unclaimed paths and idle patterns."""
    owner: dict[str, str] = {}
    unclaimed = []
    for path in flatten_dict(params, sep="/"):
        pattern = next((pattern for pattern, _ in groups if re.match(pattern, path)), None)
        if pattern is None:
            unclaimed.append(path)
        else:
            owner[path] = pattern
    idle = [pattern for pattern, _ in groups if pattern not in owner.values()]
    if unclaimed or idle:
        raise UserError(
            "optimizer.groups must claim every parameter and waste no pattern: "
            f"{len(unclaimed)} unclaimed {unclaimed[:5]}, patterns without a parameter {idle}"
        )
    return owner


def split(params: Mapping[str, Any], groups: Groups) -> tuple[Tree, Tree]:
    """(trainable, frozen) trees; `merge` puts them together again."""
    owner, rate = claim(params, groups), dict(groups)
    trainable, frozen = {}, {}
    for path, leaf in flatten_dict(params, sep="/").items():
        (frozen if rate[owner[path]] is None else trainable)[path] = leaf
    return unflatten_dict(trainable, sep="/"), unflatten_dict(frozen, sep="/")


def merge(*trees: Mapping[str, Any]) -> Tree:
    """One tree out of trees with disjoint paths."""
    merged: dict[str, Any] = {}
    for tree in trees:
        merged |= flatten_dict(tree, sep="/")
    return unflatten_dict(merged, sep="/")


def labels(trainable: Mapping[str, Any], groups: Groups) -> Tree:
    """A tree shaped like `trainable` with the claiming pattern at each leaf."""
    paths = flatten_dict(trainable, sep="/")
    pattern_of = {path: next(pattern for pattern, _ in groups if re.match(pattern, path)) for path in paths}
    return unflatten_dict(pattern_of, sep="/")


def make_optimizer(trainable: Mapping[str, Any], steps: int, settings: Any) -> optax.GradientTransformation:
    """AdamW with one learning rate per group, after clipping by the global norm over all groups.

    The rate warms up linearly over `warmup` steps, then stays ("constant") or falls to 0 at `steps`
    ("cosine").

    Args:
        trainable: The parameters.
        steps: Of the run.
        settings: `config.optimizer`: groups, learning_rates, warmup, decay, clip, b1, b2, eps, weight_decay.

    Raises:
        UserError: on another `decay`, and where nothing trains.
    """
    groups = groups_of(settings)
    if not jax.tree.leaves(trainable):
        raise UserError("nothing trains: every group of optimizer.groups has the learning rate 0 or None")
    pattern_of = labels(trainable, groups)
    used = set(jax.tree.leaves(pattern_of))
    shared = {name: getattr(settings, name) for name in ("b1", "b2", "eps", "weight_decay")}
    adam = {
        pattern: optax.adamw(schedule(peak, steps, settings), **shared)
        for pattern, peak in groups
        if pattern in used
    }
    return optax.chain(optax.clip_by_global_norm(settings.clip), optax.partition(adam, pattern_of))


def schedule(peak: float, steps: int, settings: Any) -> optax.Schedule:
    """The learning rate of a group by the step, counted from 0. Raises UserError on an unknown `decay`."""
    warmup, decay = settings.warmup, settings.decay
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, max(steps - warmup, 1)),
    }
    if decay not in after:
        raise UserError(f"optimizer.decay={decay!r}: choose one of {sorted(after)}")
    ramp = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    return optax.join_schedules([ramp, after[decay]], [warmup])


def group_norms(gradients: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Gradient norm of each part of the trainable tree, two levels deep ("branch/blocks")."""
    norms = {}
    for top, parts in gradients.items():
        for name, part in parts.items():
            norms[f"{top}/{name}"] = optax.tree.norm(part)
    return norms
