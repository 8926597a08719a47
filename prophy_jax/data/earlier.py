"""What a folder of records holds already, so that only what has changed is encoded anew."""

import functools
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from prophy_jax.data import records
from prophy_jax.data.job import read_clips
from prophy_jax.data.sources.source import Clip, Sample, Source
from prophy_jax.data.sources.video import Bucket
from prophy_jax.run import storage


class Earlier:
    """What a folder holds already, by the content of its clips; see `prophy_jax.data.job.read_clips`.

    Attributes:
        made: id -> row of each clip that `read` was asked for.
    """

    def __init__(self, out: storage.AnyPath) -> None:
        self._out = out
        self._rows = read_clips(out)
        self._finished = (out / "manifest.json").exists()
        seen = [*self._rows, *read_clips(out, working=True)]
        self._by_place = {(row["source"], row["video"]): row for row in seen}
        self._by_content = {row["sha256"]: row for row in self._rows if self._finished and row["sha256"]}
        self._open = functools.lru_cache(None)(functools.partial(records.open_dataset, out, "records"))
        self.made: dict[str, dict[str, Any]] = {}

    def row(self, source: Source, clip: Clip, read: bool = False) -> dict[str, Any]:
        """What a clip's record is made of. Without `read` the content of a new clip is left open."""
        known = self._by_place.get((clip.source, clip.video))
        content = source.content(clip, known) if known or read else {}
        return {
            "id": clip.id,
            "source": clip.source,
            "video": clip.video,
            "caption": hashlib.sha256(clip.caption.encode()).hexdigest()[:16],
            "category": [int(e) for e in np.flatnonzero(clip.category)],
            "sha256": content.get("sha256"),
            "stamp": content.get("stamp"),
        }

    def read(self, source: Source, clip: Clip) -> Sample | str | None:
        """The clip as it was encoded earlier, or why it was skipped; None if it must be read."""
        row = self.made[clip.id] = self.row(source, clip, read=True)
        was = self._by_content.get(row["sha256"])
        if was is None or was["bucket"] is None:
            return None
        row["shown"] = was.get("shown")
        stored = self._open(was["bucket"], was["split"])[was["index"]]
        text = stored["text"], stored.get("text_mask")
        same = stored["caption"].decode() == clip.caption
        return Sample(
            None, Bucket.parse(was["bucket"]), latents=stored["latents"], text=text if same else None
        )

    def print_changes(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Says which clips differ from those of a finished folder."""
        if not self._finished or not self._rows:
            return
        was, now = {row["id"]: row for row in self._rows}, {row["id"]: row for row in rows}
        both = now.keys() & was.keys()

        def differ(key: str) -> list[str]:
            return [name for name in now if name in both and now[name][key] not in (None, was[name][key])]

        print(f"{self._out} is brought up to date; what is not listed here is kept")
        records.print_list("clips added", [name for name in now if name not in both])
        records.print_list("clips removed", [name for name in was if name not in both])
        records.print_list("videos replaced", differ("sha256"))
        moved = [name for name in now if name in both and now[name]["sha256"] is None]
        records.print_list("videos moved, encoded anew only if their content has changed", moved)
        records.print_list("captions changed", differ("caption"))
        records.print_list("categories changed", differ("category"))
