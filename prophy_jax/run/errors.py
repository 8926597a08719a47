"""What commands say to the user: the one exception that they show as a single line, and counts."""

import contextlib
import sys
from collections.abc import Iterable, Iterator

from prophy_jax.run import signals


class UserError(Exception):
    """Bad input: the message names the file or setting and the remedy, on one line."""


class NotFinite(UserError):
    """Numbers that became NaN or infinite on their way, in these rows of a batch."""

    def __init__(self, message: str, rows: Iterable[int]) -> None:
        super().__init__(message)
        self.rows = list(rows)


def counted(number: int, noun: str, plural: str = "") -> str:
    """How messages count: "1 clip", "20,000 clips"; `plural` is needed where it is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Wraps a command's body: a `UserError` becomes one line on stderr and exit status 1, Ctrl-C 130.

    A signal to stop becomes a line and status 75, see `prophy_jax.run.signals`.
    """
    try:
        with signals.ending():
            yield
    except signals.Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(signals.STOPPED)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
