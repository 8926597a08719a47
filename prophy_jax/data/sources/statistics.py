"""What a source of captioned videos holds, as numbers, as a Markdown table and as a picture.

Durations, frame rates and sizes are what the annotation file says of them (WISA-80K does); no video is
opened.
"""

import itertools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from prophy_jax.data import taxonomy
from prophy_jax.data.sources.source import Source
from prophy_jax.run.errors import counted

GROUP_COLOURS = {"dynamics": "#2563a8", "thermodynamics": "#c8502d", "optics": "#2f8f6b"}
_INK, _GREY, _BARS = "#1d242c", "#586473", "#8a97a6"
_BINS = 24
_SHOWN = 8  # entries of a list in the picture; the table has all


def summarise(
    source: Source, known: taxonomy.Taxonomy = taxonomy.WISA, kept: Sequence[float] = ()
) -> dict[str, Any]:
    """Statistics of the clips used, JSON types only.

    Args:
        source: the clips.
        known: the categories that there are.
        kept: shares of their pictures that clips keep when they are cropped.

    Returns:
        records, used: numbers of records and of clips.
        skipped: kind of reason -> records, most frequent first.
        phenomena: each category -> clips.
        groups: each group of categories -> clips with at least one of them.
        members: each group -> its categories.
        phenomena_per_clip: "0", "1", ... -> clips.
        caption_words, duration (seconds): `_spread`; duration only if the records state it.
        kept: `_spread` of the percentages of the picture kept.
        fps, resolution: rate, and width x height -> clips, most frequent first; where stated.
        labels_not_understood: 'field: "text"' -> clips, most frequent first.
    """
    report = source.report
    categories = np.stack([clip.category for clip in source.clips]).astype(bool)  # (clips, E)
    durations, rates, sizes = [], Counter(), Counter()
    for _, record in source.annotations():
        duration, fps, width, height = (
            _number(record.get(key)) for key in ("duration", "fps", "width", "height")
        )
        if duration is not None:
            durations.append(duration)
        if fps is not None:
            rates[f"{fps:.4g}"] += 1
        if width is not None and height is not None:
            sizes[f"{width:g}x{height:g}"] += 1
    per_clip = np.bincount(categories.sum(1))
    return {
        "records": report.records,
        "used": len(source.clips),
        "skipped": _ordered(Counter(reason.partition(":")[0] for _, reason in report.skipped)),
        "phenomena": dict(zip(known.names, categories.sum(0).tolist(), strict=True)),
        "groups": {
            group: int(categories[:, list(members)].any(1).sum()) for group, members in known.groups.items()
        },
        "members": {group: [known.names[e] for e in members] for group, members in known.groups.items()},
        "phenomena_per_clip": {str(number): int(count) for number, count in enumerate(per_clip)},
        "caption_words": _spread([len(clip.caption.split()) for clip in source.clips], whole=True),
        "duration": _spread(durations),
        "kept": _spread([100 * share for share in kept]),
        "fps": _ordered(rates),
        "resolution": _ordered(sizes),
        "labels_not_understood": _ordered(report.unknown_labels),
    }


def table(stats: Mapping[str, Any]) -> str:
    """The statistics as Markdown."""
    used = stats["used"]
    are = "is" if stats["records"] == 1 else "are"
    lines = [f"{used:,} of {counted(stats['records'], 'record')} {are} used.", ""]

    def add(title: str, counts: Mapping[str, int], share: bool = True) -> None:
        counts = {name: count for name, count in counts.items() if count}
        if not counts:
            return
        lines.extend(
            [f"| {title} | clips |{' share |' if share else ''}", f"|---|--:|{'--:|' if share else ''}"]
        )
        for name, count in counts.items():
            # A bar or a line break in a name would end the cell.
            name = " ".join(name.replace("|", "\\|").split())
            lines.append(f"| {name} | {count:,} |" + (f" {count / used:.1%} |" if share else ""))
        lines.append("")

    add("skipped", stats["skipped"], share=False)
    if shown := _shown(stats):
        add("group", stats["groups"])
        add("phenomenon", stats["phenomena"])
        add("phenomena in a clip", stats["phenomena_per_clip"])
        if rest := [name for name in stats["phenomena"] if name not in shown]:
            lines.extend([f"No clip shows {', '.join(rest)}.", ""])
    else:
        lines.extend(["No clip has a category.", ""])
    spreads = {
        "words in the caption": stats["caption_words"],
        "seconds": stats["duration"],
        "% of the picture kept": stats["kept"],
    }
    lines.extend(["| | min | 5 % | median | mean | 95 % | max |", "|---|--:|--:|--:|--:|--:|--:|"])
    for name, spread in spreads.items():
        if spread:
            lines.append(f"| {name} | " + " | ".join(f"{spread[key]:.4g}" for key in _SPREAD) + " |")
    lines.append("")
    add("frames per second", stats["fps"])
    add("width x height", stats["resolution"])
    add("label not understood", stats["labels_not_understood"], share=False)
    return "\n".join(lines)


def picture(stats: Mapping[str, Any], path: str | os.PathLike | BinaryIO) -> None:
    """Draws the statistics into a PNG. The same statistics give the same pixels."""
    from matplotlib.figure import Figure

    charts = [
        ("words in the caption", _draw_histogram, "caption_words"),
        ("seconds", _draw_histogram, "duration"),
        ("frames per second", _draw_rows, "fps"),
        ("width x height", _draw_rows, "resolution"),
        ("records skipped", _draw_rows, "skipped"),
    ]
    charts = [chart for chart in charts if stats[chart[2]]]
    if shown := _shown(stats):
        charts.insert(0, ("phenomena in a clip", _draw_columns, "phenomena_per_clip"))
    rows = 3 if shown else -(-len(charts) // 2)
    size = (13, 8.4) if shown else (10, 0.9 + 2.5 * rows)
    figure = Figure(figsize=size, dpi=110, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1, wspace=0.03, hspace=0.04)
    figure.suptitle(
        f"{counted(stats['used'], 'clip')} of {counted(stats['records'], 'record')}"
        + ("" if shown else "; no clip has a category"),
        x=0.012, ha="left", fontsize=17, fontweight="bold", color=_INK,
    )  # fmt: skip
    if unknown := sum(stats["labels_not_understood"].values()):
        text = f"labels not understood: {unknown:,}"
        figure.text(0.988, 0.985, text, ha="right", va="top", color=_GREY)
    grid = figure.add_gridspec(rows, 3 if shown else 2, width_ratios=(1.55, 1, 1) if shown else (1, 1))
    if shown:
        _draw_phenomena(figure.add_subplot(grid[:, 0]), stats)
    for place, (title, draw, key) in enumerate(charts):
        axes = figure.add_subplot(grid[place // 2, place % 2 + (1 if shown else 0)])
        _style(axes, title)
        draw(axes, stats[key])
    figure.savefig(path, format="png", metadata={"Software": None})


def _shown(stats: Mapping[str, Any]) -> list[str]:
    """The categories that some clip has."""
    return [name for name, count in stats["phenomena"].items() if count]


_SPREAD = ("min", "p5", "median", "mean", "p95", "max")


def _spread(values: Sequence[float], whole: bool = False) -> dict[str, Any]:
    """{min, p5, median, mean, p95, max, edges, counts} of some values, the last two a histogram; or {}.

    The histogram reaches to the 99.5th percentile; its last bin has all that is above. The bins of whole
    numbers hold equally many of them.
    """
    if not len(values):
        return {}
    low, p5, median, p95, top, high = np.percentile(values, [0, 5, 50, 95, 99.5, 100]).tolist()
    if whole:
        width = np.ceil((top - low + 1) / _BINS)
        edges = np.arange(low - 0.5, top + width, width)
    else:
        margin = max(0, 0.5 - (top - low) / 2)  # of nearly equal values, so that they fill one bin
        edges = np.linspace(low - margin, top + margin, _BINS + 1)
    counts, _ = np.histogram(np.minimum(values, edges[-1]), edges)
    return {
        **dict(zip(_SPREAD, (low, p5, median, float(np.mean(values)), p95, high), strict=True)),
        "edges": edges.tolist(),
        "counts": counts.tolist(),
    }


def _number(value: Any) -> float | None:
    """A positive finite number, also one written as text; else None."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # the last: an integer of hundreds of digits
        return None
    return number if 0 < number < float("inf") else None


def _ordered(counts: Mapping[str, int]) -> dict[str, int]:
    """Most frequent first, then by name."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _style(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c3cad3")
    axes.tick_params(colors=_GREY, labelsize=9, length=0)


def _draw_phenomena(axes: Any, stats: Mapping[str, Any]) -> None:
    """A row for each category, in the colour of its group."""
    from matplotlib.patches import Patch

    _style(axes, "clips with each phenomenon")
    of_group = dict(zip(stats["members"], itertools.cycle(GROUP_COLOURS.values()), strict=False))
    colours = {name: of_group[group] for group, members in stats["members"].items() for name in members}
    bars = [colours.get(name, _BARS) for name in stats["phenomena"]]
    _draw_rows(axes, stats["phenomena"], bars, stats["used"])
    axes.tick_params(axis="y", labelsize=10, labelcolor=_INK)
    if not of_group:
        return
    axes.legend(
        handles=[
            Patch(color=colour, label=f"{group}: {counted(stats['groups'][group], 'clip')}")
            for group, colour in of_group.items()
        ],
        loc="upper center", bbox_to_anchor=(0.4, -0.01), ncols=3, frameon=False, fontsize=9.5,
        handlelength=1, handleheight=1, columnspacing=1.4,
    )  # fmt: skip


def _draw_rows(axes: Any, counts: Mapping[str, int], colours: Any = _BARS, whole: int | None = None) -> None:
    """Horizontal bars from the top down, with their counts, and shares of `whole`."""
    if whole is None and len(counts) > _SHOWN:
        shown = dict(list(counts.items())[: _SHOWN - 1])
        counts = {
            **shown,
            counted(len(counts) - len(shown), "other"): sum(counts.values()) - sum(shown.values()),
        }
    names, values = list(counts), list(counts.values())
    bars = axes.barh(range(len(names)), values, color=colours, height=0.72)
    labels = [f"{value:,}" + (f"  ({value / whole:.0%})" if whole else "") for value in values]
    axes.bar_label(bars, labels, padding=4, fontsize=9, color=_GREY)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(len(names), 5) - 0.4, -0.6)
    axes.set_xlim(0, max(values) * 1.25 or 1)  # room for the counts
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def _draw_columns(axes: Any, counts: Mapping[str, int]) -> None:
    """Vertical bars with their counts; the last has all that is beyond."""
    names, values = list(counts), list(counts.values())
    if len(names) > _SHOWN:
        names = [*names[: _SHOWN - 1], f"{names[_SHOWN - 1]}+"]
        values = [*values[: _SHOWN - 1], sum(values[_SHOWN - 1 :])]
    bars = axes.bar(range(len(names)), values, color=_BARS, width=0.72)
    axes.bar_label(bars, [f"{value:,}" for value in values], padding=2, fontsize=8, color=_GREY)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.6, max(len(names), 5) - 0.4)
    axes.set_ylim(0, max(values) * 1.15)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def _draw_histogram(axes: Any, spread: Mapping[str, Any]) -> None:
    edges = np.array(spread["edges"])
    axes.bar(
        edges[:-1], spread["counts"], np.diff(edges), align="edge", color=_BARS, edgecolor="white", lw=0.5
    )
    axes.axvline(spread["median"], color=_INK, lw=1.2)
    axes.annotate(
        f"median {spread['median']:.4g}",
        (spread["median"], 1), (5, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
        va="top", fontsize=9, color=_INK, bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1},
    )  # fmt: skip
    axes.set_ylim(0, max(spread["counts"]) * 1.2)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
