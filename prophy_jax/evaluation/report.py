"""The report of `prophy_jax.evaluate` as one HTML file: pictures, charts and numbers, no other files.

The words are in `report.html.j2`, and those about ProPhy's branch in `routing.html.j2`.

F H W video, C categories, E experts.
"""

import base64
import io
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np

from prophy_jax.evaluation import charts
from prophy_jax.evaluation import pictures as visualize

AIM_AUC = 0.8  # mean over categories, at the first noise level
AIM_ENTROPY = 0.5  # entropy of the mean load, of its largest possible value
SPLITS = {"val": "validation clips", "test": "test clips, whose prompts are worded in new ways"}
ROUTERS = {
    "semantic": "semantic (one decision per prompt, all experts)",
    "refinement": "refinement (one decision per token, the top experts)",
}


def write(
    path: str,
    config: Mapping[str, Any],
    results: Mapping[str, Any],
    clips: Sequence[tuple[str, Mapping[str, np.ndarray]]],
    maps: Sequence[tuple[str, np.ndarray, Sequence[tuple]]],
    curves: Mapping[str, Sequence[Mapping[str, float]]],
) -> None:
    """Writes the report. The same arguments give the same bytes.

    Args:
        path: The file to write.
        config: The configuration as JSON types.
        results: What metrics.json holds, see `prophy_jax.evaluate`.
        clips: For each prompt its caption and clips by name, uint8 (F, H, W, 3).
        maps: For each clip its caption, frames (F, H, W, 3) and tracks: category, frames under P'_r, frames
            under the label, AUC.
        curves: For each run its title and the lines of metrics.jsonl.
    """
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(os.path.dirname(__file__)),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters |= {
        "number": _number,
        "svg": charts.svg,
        "webp": _webp,
        "json": lambda value: json.dumps(value, indent=1),
    }
    page.globals |= {"splits": SPLITS, "no_worse": _no_worse, "curve_chart": charts.curve_chart}
    text = page.get_template("report.html.j2").render(
        config=config, results=results, clips=clips, maps=maps, curves=curves, view=_routing(results)
    )
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def _routing(results: Mapping[str, Any]) -> dict[str, Any]:
    """What routing.html.j2 shows that metrics.json does not hold as such."""
    routers, view = [], {"aim_auc": AIM_AUC, "aim_entropy": AIM_ENTROPY}
    for name, title in ROUTERS.items():
        own = {
            key.removeprefix(f"{name}/"): value
            for key, value in results["routers"].items()
            if key.startswith(name)
        }
        if own:
            load = max(value for key, value in own.items() if key.startswith("load_"))
            routers.append((title, (own["entropy"], own["mean_entropy"], load)))
    if routers:
        view |= {"routers": routers, "least_even": min(numbers[1] for _, numbers in routers)}
    if results["localisation"]:
        view["auc_chart"] = charts.auc_chart(results["localisation"]["categories"])
    if results.get("experts"):
        table = results["experts"]
        values = np.array(list(table.values()))  # (C + 1, E)
        experts = [str(index + 1) for index in range(values.shape[1])]
        view["expert_chart"] = charts.heat_chart(
            values, list(table), experts, "viridis", 0, values.max(), "refinement expert"
        )
    if results.get("semantic"):
        names = results["semantic"]["categories"]
        matrix = np.array(results["semantic"]["correlation"], float)  # None becomes NaN
        view["pairs"] = sorted(
            (matrix[i, j], names[i], names[j]) for i, j in itertools.combinations(range(len(names)), 2)
        )
        view["semantic_chart"] = charts.heat_chart(matrix, names, names, "RdBu_r", -1, 1, "")
    return view


def _no_worse(row: Mapping[str, Any]) -> bool:
    return row["difference"] <= 2 * (row["standard_error"] or 0)


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None or not np.isfinite(value) else f"{value:.{digits}f}"


def _webp(frames: np.ndarray, fps: float) -> str:
    """The clip as a data URI of an animation."""
    file = io.BytesIO()
    visualize.save_webp(file, frames, fps)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
