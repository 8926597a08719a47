"""The charts of the report, drawn by matplotlib without a display.

F H W video, R rows, C columns.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, GREY, ORANGE = "#2563a8", "#b4bcc6", "#d9822b"


def svg(figure: Figure) -> str:
    """The figure as a data URI of an SVG image; its bytes depend on the figure alone."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "prophy"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def make_axes(figure: Figure, *place: int):
    """Axes without a frame at the top and the right."""
    axes = figure.add_subplot(*place)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, color="#8b95a1")
    return axes


def heat_chart(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    colours: str,
    low: float,
    high: float,
    label: str,
) -> Figure:
    """A table (R, C) of numbers on colours; `low` and `high` are the ends of the colour map."""
    long = max(map(len, columns)) > 3
    size = (2.2 + 0.56 * len(columns), (1.7 if long else 0.8) + 0.36 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = make_axes(figure, 1, 1, 1)
    axes.spines[:].set_visible(False)
    image = axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            style = dict(ha="center", va="center", fontsize=7.5, color="white" if dark else "black")
            axes.text(j, i, f"{value:.2f}", **style)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    axes.set_xticks(
        range(len(columns)), columns, fontsize=9, rotation=40 if long else 0, ha="right" if long else "center"
    )
    axes.tick_params(length=0)
    axes.set_xlabel(label, fontsize=9)
    return figure


def curve_chart(lines: Sequence[Mapping[str, float]]) -> Figure:
    """One panel for each training loss, and one for the validation losses."""
    names = sorted({name for line in lines for name in line if name.startswith("loss/")} - {"loss/total"})
    validation = sorted({name for line in lines for name in line if name.startswith("validation/")})
    panels = [(name.removeprefix("loss/").replace("_", " "), [name]) for name in names]
    panels += [("validation", validation)] if validation else []
    rows = -(-len(panels) // 3)
    figure = Figure(figsize=(10.6, 2.5 * rows), layout="constrained")
    for index, (title, series) in enumerate(panels):
        axes = make_axes(figure, rows, 3, index + 1)
        axes.set_title(title, fontsize=10, loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlim(0, max(line["step"] for line in lines) * 1.02)
        for name in series:
            points = np.array([(line["step"], line[name]) for line in lines if name in line])
            if title == "validation":
                text = name.removeprefix("validation/").replace("sigma_", "sigma ").replace("loss", "mean")
                width = 2 if name == "validation/loss" else 1
                axes.plot(*points.T, marker=".", linewidth=width, label=text)
                axes.legend(fontsize=7, frameon=False)
            else:
                axes.plot(*points.T, color=GREY, linewidth=0.8)
                axes.plot(points[:, 0], _running_mean(points[:, 1]), color=BLUE, linewidth=1.6)
    return figure


def difference_chart(
    rows: Sequence[Mapping[str, Any]], points: Mapping[tuple[str, str], Sequence[float]], versus: str
) -> Figure:
    """A panel for each metric: of each arm its difference from `versus`, with interval, and of each seed.

    Args:
        rows: Of the table of `prophy_jax.study`.
        points: (metric, arm) -> the difference of each seed.
        versus: The arm that the others are compared with.
    """
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    arms = list(dict.fromkeys(row["arm"] for row in rows if row["arm"] != versus))
    columns = min(len(metrics), 3)
    lines = -(-len(metrics) // columns)
    size = (max(5.0, 3.6 * columns), lines * (1.2 + 0.34 * len(arms)))
    figure = Figure(figsize=size, layout="constrained")
    for index, metric in enumerate(metrics):
        axes = make_axes(figure, lines, columns, index + 1)
        axes.set_title(metric.replace("_", " "), fontsize=10, loc="left")
        axes.set_xlabel(f"difference from {versus}", fontsize=9)
        axes.axvline(0, color=GREY, linewidth=1)
        for row in rows:
            if row["metric"] != metric or row["difference"] is None:
                continue
            at = arms.index(row["arm"])
            axes.plot([row["low"], row["high"]], [at, at], color=BLUE, linewidth=2)
            axes.plot(row["difference"], at, "o", color=BLUE, markersize=6)
            own = points[metric, row["arm"]]
            axes.plot(own, [at] * len(own), "|", color=ORANGE, markersize=10)
        axes.set_yticks(range(len(arms)), arms, fontsize=9)
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.ticklabel_format(axis="x", scilimits=(-3, 4))
    return figure


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Each value averaged with its neighbours, a twentieth of the series in all."""
    half = max(len(values) // 40, 1)
    padded = np.pad(values, half, mode="edge")
    return np.convolve(padded, np.ones(2 * half + 1) / (2 * half + 1), "valid")
