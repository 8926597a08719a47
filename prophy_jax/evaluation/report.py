"""The report of `prophy_jax.evaluate` as one HTML file: pictures, charts and numbers, no other files.

The words are in `report.html.j2`, and those about a part of the model in the template of its measures.

F H W video, C categories, E experts.
"""

import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np

from prophy_jax import evaluation
from prophy_jax.evaluation import charts, diffusion, pictures
from prophy_jax.run.errors import counted
from prophy_jax.run.storage import write_atomically

SPLITS = {"val": "validation clips", "test": "test clips, whose prompts are worded in new ways"}


def templates() -> jinja2.Environment:
    """The templates of this package, with filters for numbers, figures and clips."""
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
    return page


def write(
    path: str,
    config: Mapping[str, Any],
    results: Mapping[str, Any],
    clips: Sequence[tuple[str, Mapping[str, np.ndarray]]],
    shown: Mapping[str, Any],
    curves: Mapping[str, Sequence[Mapping[str, float]]],
) -> None:
    """Writes the report. The same arguments give the same bytes.

    Args:
        path: The file to write.
        config: The configuration as JSON types.
        results: What metrics.json holds, see `prophy_jax.evaluate`.
        clips: For each prompt its caption and clips by name, uint8 (F, H, W, 3).
        shown: For each part what `show` of its measures returned, if anything.
        curves: For each run its title and the lines of metrics.jsonl.
    """
    page = templates()
    page.globals |= {"splits": SPLITS, "no_worse": diffusion.no_worse, "curve_chart": charts.curve_chart,
        "counted": counted, "too_few": _too_few}  # fmt: skip
    parts = {name: spec for name, spec in (config["parts"] or {}).items() if spec}
    files = evaluation.measures(parts)
    measured = [
        {"template": own.TEMPLATE, "config": parts[name], "view": own.view(results), "shown": shown.get(name)}
        for name, own in files.items()
    ]
    about = {
        "title": ", ".join(own.TITLE for own in files.values()) or "Video model",
        "added": evaluation.name_parts(parts),
        "measured": measured,
        "others": {name: spec for name, spec in parts.items() if name not in files},
    }
    text = page.get_template("report.html.j2").render(
        config=config, results=results, clips=clips, curves=curves, **about
    )
    write_atomically(path, text)


def _too_few(split: str) -> str:
    """Why something was not measured that takes more than one clip."""
    return f"too few {'test' if split == 'test' else 'validation'} clips (1)"


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None or not np.isfinite(value) else f"{value:.{digits}f}"


def _webp(frames: np.ndarray, fps: float) -> str:
    """The clip as a data URI of an animation."""
    file = io.BytesIO()
    pictures.save_webp(file, frames, fps)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
