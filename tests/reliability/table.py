"""What came of the trials: counts by kind and command, and of each fault how to repeat it."""

import collections
import dataclasses
from collections.abc import Sequence

FAULTS = ("lost", "silent", "traceback", "hang")


@dataclasses.dataclass
class Trial:
    """One trial of a kind ("kills", "mutations", "faults"), by the name and number that repeat it.

    Attributes:
        count: how many kills, mutations or faults it tried.
        outcome: "same" (the right result), "refused" (status 1 and one line), "taken" (another result, of an
            input that nobody can tell from an intended one), or one of FAULTS.
        seconds: that it took.
    """

    kind: str
    name: str
    number: int
    count: int = 0
    outcome: str = "same"
    detail: str = ""
    seconds: float = 0.0

    def failed(self, outcome: str, detail: str) -> "Trial":
        self.outcome, self.detail = outcome, detail
        self.count = max(self.count, 1)
        return self


def show(trials: Sequence[Trial]) -> str:
    """The table, a row for each kind and name, and the sums."""
    rows = collections.defaultdict(collections.Counter)
    for trial in trials:
        for name in (trial.name, None):
            rows[trial.kind, name]["tried"] += trial.count
            rows[trial.kind, name]["seconds"] += trial.seconds
            rows[trial.kind, name][trial.outcome] += 1 if trial.outcome in FAULTS else trial.count
    columns = ("tried", "same", "refused", "taken", *FAULTS, "seconds")
    names = [f"{kind}: {name or 'ALL'}" for kind, name in rows]
    width = max(map(len, names), default=0)
    lines = [" " * width + "".join(f"{column:>10}" for column in columns)]
    for text, counts in sorted(zip(names, rows.values(), strict=True), key=lambda row: row[0]):
        lines.append(
            f"{text:<{width}}" + "".join(f"{round(counts[column]) or '.':>10}" for column in columns)
        )
    return "\n".join(lines)
