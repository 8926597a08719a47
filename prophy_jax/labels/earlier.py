"""Labels that were made earlier, which are kept where the data have changed elsewhere."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prophy_jax.data import records
from prophy_jax.data.job import read_clips
from prophy_jax.run import storage


class EarlierLabels:
    """Labels that a folder holds already, found by what they follow from.

    Args:
        out: the folder; it may be empty, or unfinished.
        rows: those of the labels to be made, of `PreparedClips.list_rows`.
    """

    def __init__(self, out: str | Path, rows: Mapping[tuple[str, int], list[dict[str, Any]]] | None) -> None:
        self._out = out
        self._own = [row for part in (rows or {}).values() for row in part]
        self._by_id = {row["id"]: row for row in self._own}
        self._made: dict[tuple, Mapping[str, Any]] = {}
        self._open = functools.lru_cache(None)(functools.partial(records.open_dataset, out, "alignment"))
        if rows and (storage.path(out) / "manifest.json").exists():
            unreadable = {name for name, _ in records.read_manifest(out).get("unreadable", [])}
            made = [row for row in read_clips(out) if row["index"] is not None]
            self._made = {self._key(row): row for row in made if row["id"] not in unreadable}

    @staticmethod
    def _key(row: Mapping[str, Any]) -> tuple:
        return row["sha256"], row["bucket"], tuple(row["category"]), row["frames"]

    def find(self, clip_id: str) -> Mapping[str, Any] | None:
        """The example {"present", "maps"} of a clip; None if it is to be made."""
        row = self._by_id.get(clip_id)
        was = self._made.get(self._key(row)) if row else None
        if was is None:
            return None
        return self._open(was["bucket"], was["split"])[was["index"]]

    def print_changes(self) -> None:
        """Says which clips of a finished folder are labelled anew."""
        if self._made:
            print(f"{self._out} is brought up to date; the labels of other clips are kept")
            anew = [row["id"] for row in self._own if self._key(row) not in self._made]
            records.print_list("clips labelled anew", anew)
