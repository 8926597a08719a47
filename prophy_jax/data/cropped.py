"""How much of their pictures clips keep, of those that were made and of those that a dry run looks into."""

import concurrent.futures
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from prophy_jax.data import records
from prophy_jax.data.sources import statistics
from prophy_jax.data.sources.source import Clip, Source
from prophy_jax.data.sources.video import Bucket, choose_size, share_kept
from prophy_jax.data.taxonomy import Taxonomy
from prophy_jax.run.errors import UserError, counted, shortage

KEPT = 0.6  # clips that keep less of their picture are listed
OPENED = 200  # clips that a dry run looks into
THREADS = 8  # that open them


def list_cropped(shown: Mapping[str, tuple[int, int]], places: Mapping[str, Bucket]) -> list[list]:
    """[id, (height, width) shown, bucket] of clips that keep less than KEPT of their picture, worst first."""
    kept = {name: share_kept(*size, places[name]) for name, size in shown.items()}
    worst = sorted((share, name) for name, share in kept.items() if share < KEPT)
    return [[name, list(shown[name]), str(places[name])] for _, name in worst]


def print_cropped(cropped: Sequence[Sequence], data: Mapping[str, Any], where: str) -> None:
    """Prints what `list_cropped` gave, and what to do about it; `data` is that of the configuration."""
    lines, aspects = [], []
    for name, (height, width), bucket in cropped:
        kept = share_kept(height, width, Bucket.parse(bucket))
        lines.append(f"{name}: {kept:.0%}, shown as {height} x {width} (H x W), cropped to {bucket}")
        aspects.append(height / width)
    records.print_list(f"warning: clips that keep less than {KEPT:.0%} of their picture", lines, where)
    if not lines:
        return
    main = Bucket(*(data[key] for key in ("frames", "height", "width")))
    others = [Bucket(*bucket) for bucket in data.get("buckets", ())]
    # The main size, turned, if that suits them; else their median shape of about as many pixels.
    aspect, area = sorted(aspects)[len(aspects) // 2], main.height * main.width
    own = Bucket(main.frames, main.width, main.height)
    if share_kept(aspect, 1, own) < 0.9:
        sides = (max(16, 16 * round(math.sqrt(area * ratio) / 16)) for ratio in (aspect, 1 / aspect))
        own = Bucket(main.frames, *sides)
    buckets = f"--config.data.buckets='{tuple(map(tuple, dict.fromkeys((*others, own))))}'"
    print(f"  if the model takes other sizes, give them a bucket of their own: {buckets}")


def print_dry_run(
    source: Source, clips: Sequence[Clip], data: ConfigDict, buckets: Sequence[Bucket], known: Taxonomy
) -> None:
    """Prints statistics, what is skipped, and how some clips, spread over all, would be cropped."""
    chosen = clips[:: -(-len(clips) // OPENED)] if clips else []
    sizes, places, unusable = {}, {}, []

    def look(clip: Clip) -> tuple[int, int] | str | None:
        try:
            return source.shown(clip)
        except UserError as error:
            if shortage(error):
                raise
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        for clip, shown in zip(chosen, threads.map(look, chosen), strict=True):
            if isinstance(shown, str):
                unusable.append(f"{clip.id}: {shown}")
            elif shown and (size := choose_size(*shown, buckets, data.max_upscale)):
                sizes[clip.id], places[clip.id] = shown, Bucket(data.frames, *size)
            elif shown:
                unusable.append(f"{clip.id}: too small: {shown[0]} x {shown[1]} pixels (H x W)")
    kept = [share_kept(*shown, places[name]) for name, shown in sizes.items()]
    print(statistics.table(statistics.summarise(source, known, kept)))
    print(f"opened {counted(len(chosen), 'clip')}")
    records.print_list("of these cannot be used", unusable, "")
    print_cropped(list_cropped(sizes, places), data, "")
    records.print_list("skipped", [f"{name}: {reason}" for name, reason in source.report.skipped], "")
