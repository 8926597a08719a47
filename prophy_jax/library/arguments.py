"""Arguments of the library: their checks, and errors of what the commands share, in their words."""

import contextlib
import math
import numbers
import re
from collections.abc import Iterator
from typing import Any

from absl import logging

from prophy_jax.run.errors import NotFinite, UserError, explain_system

# What the commands call a flag or a key of the configuration -> the argument here.
_ARGUMENTS = (
    (r"change config\.data\.height(, width or frames| or width)", "change size"),
    (r"(?<!\S)--(checkpoint|branch|lora|batch)\b", r"\1"),
    (r"(--|(?<![\w'\"]))(config\.)?samples\.(steps|guidance|shift|solver|negative_prompt)\b", r"\3"),
    (r"--config\.([a-z_.]+[a-z_])=(\S+?)(?=[:;,]?(\s|$))", r'settings={"\1": \2}'),
    (r"(?<![\w/.-])config\.(?!json|py)([a-z_.]+[a-z_])", r'settings["\1"]'),
    ("name the --config of that model|name its --config=FILE.py:VARIANT", "name weights of one model"),
    ("fix the configuration", "change settings"),
)


@contextlib.contextmanager
def own_words() -> Iterator[None]:
    """Errors name arguments of the library; and Orbax does not warn of what is no fault."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    except UserError as error:
        text = " ".join(str(error).split())
        for words, own in _ARGUMENTS:
            text = re.sub(words, own, text)
        again = NotFinite(text, error.rows) if isinstance(error, NotFinite) else UserError(text)
        raise again.with_traceback(error.__traceback__) from None
    except OSError as error:
        if text := explain_system(error):
            raise UserError(text) from error
        raise
    finally:
        logging.set_verbosity(before)


def number(name: str, value: Any) -> float:
    """Raises UserError unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise UserError(f"{name}={value!r}: give a finite number")
    return float(value)


def whole_number(name: str, value: Any, least: int, most: int = 2**31 - 1) -> int:
    """Raises UserError unless `value` is a whole number in this range."""
    whole = not isinstance(value, bool) and isinstance(value, numbers.Integral)
    if not whole or not least <= int(value) <= most:
        raise UserError(f"{name}={value!r}: give a whole number from {least} to {most}")
    return int(value)
