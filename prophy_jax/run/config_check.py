"""Refuses values of a configuration that no run can have, before anything is read or written."""

import difflib
import fnmatch
import math
from collections.abc import Iterable
from typing import Any

from prophy_jax.run.errors import UserError
from prophy_jax.run.workdir import RENAMED

INT32 = 2**31 - 1
# Key -> the least and the largest number that it may be, or that each number of it may be; the first match
# counts.
LIMITS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),  # what all random generators take
    "data.seed": (0, 2**63 - 1),
    "data.sandbox.seed": (0, 2**63 - 1),
    "label_check.seed": (0, 2**63 - 1),
    "label.every": (1, INT32),
    "*.every": (0, INT32),  # 0: never
    "data.subset": (0, INT32),
    "data.sandbox.*": (0, INT32),
    "data.val_share": (0, 1),
    "caption_dropout": (0, 1),
    "data.fps": (0.01, 10_000),
    "label_check.fps": (0.01, 10_000),
    "log.profile": (0, INT32),
    "data.buckets": (1, INT32),
    "data.weights": (0, 1e9),
    "data.max_upscale": (0.01, math.inf),
    **dict.fromkeys(("optimizer.b1", "optimizer.b2", "optimizer.ema"), (0, 0.9999999)),  # 1 keeps the first
    "optimizer.warmup": (0, INT32),
    "optimizer.clip": (1e-30, math.inf),
    "optimizer.*": (0, 1e38),
    "losses.*": (0, 1e38),
    "mesh.*": (-1, INT32),
    "backbone.*": (0, math.inf),
    "parts.*": (0, math.inf),
    "validation.times": (0, 1),
    "samples.skip": (1, INT32),
    "study.prompts": (1, INT32),
    "study.seed": (0, 2**32 - 1),
    "samples.guidance": (-1e6, 1e6),
    **dict.fromkeys(
        ("steps", "batch_size", "accumulation", "data.*", "samples.clips", "samples.steps"), (1, INT32)
    ),
    **dict.fromkeys(("validation.batches", "validation.batch_size", "checkpoint.keep"), (1, INT32)),
}


_ELSEWHERE = ("losses.*", "evaluators", "evaluators.*", "data.side", "data.side.*", "parts.*") + tuple(
    f"{name}.*" for name in ("backbone", "codec", "text_encoder", "objective")
)


def nearest(key: str, known: Iterable[str]) -> str:
    """The known key that was probably meant, "" without a guess: one of this name, or a similar one."""
    table, _, name = key.rpartition(".")
    known = list(known)
    if same := [own for own in known if own.split(".")[-1] == name]:  # in another table
        return same[0]
    beside = {own.split(".")[-1]: own for own in known if own.rpartition(".")[0] == table}
    if similar := difflib.get_close_matches(name, beside, 1, 0.6):
        return beside[similar[0]]
    return next(iter(difflib.get_close_matches(key, set(known) - set(beside.values()), 1, 0.75)), "")


def check(config: Any) -> None:
    """Raises UserError on an unknown key, NaN, a number out of limits, and ill-formed buckets and weights.

    Keys of what a `module=` describes, of `losses` and of `data.side` are checked where they are read.
    """
    from prophy_jax.run.config_help import MEANINGS, list_keys

    for key, value in list_keys(config):
        old = next((old for old in RENAMED if f"{key}.".startswith(f"{old}.")), None)
        if old:
            raise UserError(f"config.{old} is now config.{RENAMED[old]}: rename it in the configuration")
        if not any(fnmatch.fnmatchcase(key, pattern) for pattern in (*MEANINGS, *_ELSEWHERE)):
            hint = nearest(key, MEANINGS)
            raise UserError(
                f"the configuration has an unknown key, config.{key}"
                + (f": did you mean config.{hint}?" if hint else ": remove it")
            )
        limits = next((LIMITS[pattern] for pattern in LIMITS if fnmatch.fnmatchcase(key, pattern)), None)
        for number in _numbers(value, key):
            if math.isnan(number):
                raise UserError(f"config.{key}={_short(value)} is not a number: fix it")
            if limits and not limits[0] <= number <= limits[1]:
                least, most = (f"{limit:.10g}" for limit in limits)
                raise UserError(f"config.{key}={_short(value)}: choose {least} to {most}")
    buckets = config.get("data", {}).get("buckets", ())
    if any(not isinstance(one, tuple | list) or len(one) != 3 for one in buckets):
        raise UserError(
            f"config.data.buckets={_short(buckets)}: list (frames, height, width), each in brackets of its "
            "own, such as --config.data.buckets='((49, 480, 832),)'"
        )
    profile = config.get("log", {}).get("profile", ())
    if not isinstance(profile, tuple | list) or len(profile) not in (0, 2) or profile and not profile[1]:
        raise UserError(
            f"config.log.profile={_short(profile)}: give how many steps to skip and how many to trace, "
            "such as --config.log.profile='(10, 5)'"
        )
    weights = config.get("data", {}).get("weights", ())
    if any(not isinstance(one, int | float) or isinstance(one, bool) for one in weights):
        raise UserError(
            f"config.data.weights={_short(weights)}: list one number for each source, such as "
            "--config.data.weights='(3, 1)'"
        )


def _numbers(value: Any, key: str, depth: int = 0) -> list[float]:
    """All numbers in a value, also in the sequences of it."""
    if isinstance(value, tuple | list):
        if depth > 8:
            raise UserError(f"config.{key}: brackets in brackets in brackets, {depth} deep: fix it")
        return [number for one in value for number in _numbers(one, key, depth + 1)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:80]}..."
