"""The report of `prophy_jax.evaluate` as one HTML file: pictures, charts and numbers, no other files.

F H W video, C categories, E experts.
"""

import base64
import html
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prophy_jax.evaluation import pictures as visualize

AIM_AUC = 0.8  # mean over categories, at the first noise level
AIM_ENTROPY = 0.5  # entropy of the mean load, of its largest possible value
SPLITS = {"val": "validation clips", "test": "test clips, whose prompts are worded in new ways"}
BLUE, GREY, ORANGE = "#2563a8", "#b4bcc6", "#d9822b"

STYLE = """
body { font: 16px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1d242c;
  background: #f4f6f8; margin: 0; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; }
h2 { font-size: 21px; margin: 0 0 8px; }
h3 { font-size: 16px; margin: 20px 0 4px; }
p { margin: 6px 0; max-width: 850px; }
section { background: #fff; border: 1px solid #dfe4ea; border-radius: 8px; padding: 22px 26px;
  margin-top: 20px; }
.note, figcaption { color: #586473; font-size: 14px; }
.tiles { display: grid; grid-template-columns: repeat(3, 1fr); gap: 16px; margin-top: 20px; }
.tile { background: #fff; border: 1px solid #dfe4ea; border-radius: 8px; padding: 14px 20px; }
.tile b { display: block; font-size: 32px; line-height: 1.25; }
.met { color: #1f7a4d; font-weight: 600; } .missed { color: #b3421d; font-weight: 600; }
figure { margin: 12px 0; } img.chart { max-width: 100%; display: block; }
table { border-collapse: collapse; margin: 12px 0; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 14px; text-align: right; border-bottom: 1px solid #e6eaef; }
th { font-weight: 600; color: #586473; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.sum td { font-weight: 600; border-top: 2px solid #c3cad3; }
img.clip { image-rendering: pixelated; width: 100%; display: block; border-radius: 3px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 24px 32px; }
.pair > div { display: flex; flex-direction: column; justify-content: space-between; }
.strip { display: grid; gap: 8px; } .strip figure { margin: 0; }
.prompt { font-size: 14px; margin: 0 0 6px; }
.map { margin: 16px 0 24px; } .map .prompt { margin-top: 10px; } .map figure + figure { margin-top: 8px; }
details { margin-top: 12px; } pre { font-size: 12px; line-height: 1.4; overflow-x: auto; }
"""


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
      path: the file to write.
      config: the configuration as JSON types.
      results: what metrics.json holds, see `prophy_jax.evaluate`.
      clips: per prompt its caption and clips by name, uint8 (F, H, W, 3).
      maps: per clip its caption, frames (F, H, W, 3) and tracks: category, frames under P'_r, frames
        under the label, AUC.
      curves: per run its title and the lines of metrics.jsonl.
    """
    parts = [
        _head(config, results),
        _localisation(config, results, maps),
        _routers(results),
        _semantic(results),
        _diffusion(results),
        _clips(config, clips),
        _curves(curves),
        _configuration(config),
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>ProPhy: held-out measurements</title><style>{STYLE}</style></head>\n"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )
    with open(path, "w", encoding="utf-8") as file:
        file.write(page)


# --- Sections --------------------------------------------------------------------------------------


def _head(config: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    frames, height, width = (config["data"][key] for key in ("frames", "height", "width"))
    text = f"""<h1>Physical branch: held-out measurements</h1>
<p>ProPhy puts a <em>physical branch</em> beside a video diffusion model. From the prompt it reads which
physics the clip shows, and it routes every part of the clip (a <em>token</em>) to the physics that happens
there. This report measures a branch trained for {results["steps"]} steps on the {results["clips"]} clips
({frames} frames of {height}&times;{width} pixels) of the
{"test" if results["split"] == "test" else "validation"} split, which it was not trained on.</p>"""
    tiles = []
    if results["localisation"]:
        mean = {key: values[0] for key, values in results["localisation"]["mean"].items()}
        auc = mean["auc_after"]
        tiles.append(
            _tile("Finds where each physics happens", _number(auc), auc is not None and auc >= AIM_AUC,
                  f"mean AUC of covered against uncovered tokens, {_number(mean['auc_before'])} before "
                  "training; against tokens of other phenomena (specificity) "
                  f"{_number(mean['specificity_after'])}. Aim: AUC at least {AIM_AUC:.2f}")
        )  # fmt: skip
    routers = results["routers"]
    entropies = [value for name, value in routers.items() if name.endswith("mean_entropy")]
    if entropies:
        tiles.append(
            _tile("Routers use all their experts", _number(min(entropies)), min(entropies) >= AIM_ENTROPY,
                  "entropy of the mean load of the less even router; 1 is even, 0 is one expert. "
                  f"Aim: at least {AIM_ENTROPY:.1f}")
        )  # fmt: skip
    split, rows = next(iter(results["diffusion"].items()))
    whole = rows[-1]
    tiles.append(
        _tile("Does the video model no harm", _number(whole["ratio"], 3), _no_worse(whole),
              f"diffusion loss with the branch on {SPLITS[split]}, as a share of the loss without. Aim: not "
              "above 1 by more than two standard errors")
    )  # fmt: skip
    return text + f'<div class="tiles">{"".join(tiles)}</div>'


def _no_worse(row: Mapping[str, Any]) -> bool:
    return row["difference"] <= 2 * (row["standard_error"] or 0)


def _tile(title: str, value: str, met: bool, text: str) -> str:
    verdict = '<span class="met">met</span>' if met else '<span class="missed">missed</span>'
    return f'<div class="tile">{title}<b>{value}</b><span class="note">{text}: {verdict}.</span></div>'


def _localisation(config: Mapping[str, Any], results: Mapping[str, Any], maps: Sequence[tuple]) -> str:
    located, sigmas = results["localisation"], results["sigmas"]
    if not located:
        why = (
            "The data has no token labels (labels say where in a clip each phenomenon happens), so "
            "localisation was not measured."
            if "refinement/entropy" in results["routers"]
            else "This configuration has no token routing, so there is nothing to localise."
        )
        return _section("Localisation", f"<p>{why}</p>")
    rows, mean = located["categories"], located["mean"]
    text = f"""<p>For each token the branch predicts how much of each category happens there,
P&prime;<sub>r</sub>. A token is <em>covered</em> when its label, the share of it that the phenomenon
covers, is at least {results["covered_from"]:.0%}, and uncovered when it is 0; tokens in between are left
out. <b>AUC</b> is the chance that a covered token has a higher value than an uncovered one, over all tokens
of the clips that show the category: 0.5 is guessing, 1 is perfect. The branch reads the clip under noise,
here sigma = {sigmas[0]:g} (0 is clean, 1 is pure noise), with the same noise before and after training.</p>
<p>Finding <em>anything</em> that moves would also give a good AUC. <b>Specificity</b> tells the two apart:
it is the AUC of tokens that the category covers against tokens that the <em>other</em> categories of the
same clips cover. A map that merely shows where something happens scores 0.5.</p>"""
    if "alignment" in config["losses"]:
        text += """<p>ProPhy's alignment loss looks only at tokens that a category touches. Nothing teaches
its map to be low elsewhere, on other phenomena least of all: expect specificity to be below AUC.</p>"""
    chart = _image(_auc_chart(rows), "AUC per category before and after training, and specificity")
    heads = ["category", "clips", "covered tokens", "AUC before", "after"]
    heads += ["specificity before", "after"] + [f"AUC after, sigma {sigma:g}" for sigma in sigmas[1:]]

    def cells(row):
        columns = [
            row[key][0] for key in ("auc_before", "auc_after", "specificity_before", "specificity_after")
        ]
        return [_number(value) for value in columns + row["auc_after"][1:]]

    body = [[row["category"], row["clips"], row["covered_tokens"], *cells(row)] for row in rows]
    table = _table(heads, body + [["mean over categories", "", "", *cells(mean)]], total=True)
    shown = ""
    if maps:
        shown = """<h3>What the routing looks like</h3>
<p>Real held-out clips. Above: P&prime;<sub>r</sub> of each category present, each over its own range
(grey: the median and below; yellow: the highest values). Below: the label (yellow: half a token or
more).</p>"""
        shown += "".join(_map(*clip, config["data"]["fps"]) for clip in maps)
    return _section("Localisation: where does each physics happen?", text + chart + table + shown)


def _map(caption: str, frames: np.ndarray, tracks: Sequence[tuple], fps: float) -> str:
    prompt = f'<p class="prompt">{html.escape(caption)}</p>'
    cells = [f"<div>{_clip(frames, 'the clip', fps)}{prompt}</div>"]
    for category, predicted, label, auc in tracks:
        cells.append(
            f"<div>{_clip(predicted, f'{category}, predicted<br>AUC in this clip {_number(auc)}', fps)}"
            f"{_clip(label, f'{category}, label', fps)}</div>"
        )
    return f'<div class="map">{_strip(cells, 192)}</div>'


def _routers(results: Mapping[str, Any]) -> str:
    routers = results["routers"]
    if not routers:
        return ""
    names = {
        "semantic": "semantic (one decision per prompt, all experts)",
        "refinement": "refinement (one decision per token, the top experts)",
    }
    rows = []
    for name, title in names.items():
        if f"{name}/entropy" in routers:
            largest = max(value for key, value in routers.items() if key.startswith(f"{name}/load_"))
            shown = routers[f"{name}/entropy"], routers[f"{name}/mean_entropy"], largest
            rows.append([title, *map(_number, shown)])
    text = """<p>A mixture of experts fails when its router sends everything to one expert. Entropies are
in shares of the largest possible one: low for one decision means that the router is sure; low for the
mean decision means that it has collapsed. The largest load is the share of all choices that the busiest
expert gets. All tokens count, and most of them are background.</p>"""
    text += _table(["router", "entropy of one decision", "entropy of the mean load", "largest load"], rows)
    if results.get("experts"):
        table = results["experts"]
        values = np.array(list(table.values()))  # (C + 1, E)
        experts = [str(index + 1) for index in range(values.shape[1])]
        chart = _heat_chart(values, list(table), experts, "viridis", 0, values.max(), "refinement expert")
        text += _figure(
            _image(chart, "Mean routing probability per category and refinement expert"),
            "Mean routing probability over the tokens that each category covers. Even routing would be "
            f"{1 / values.shape[1]:.3g} everywhere; where rows differ, experts specialise. "
            "Background: tokens that no category touches.",
        )
    return _section("Router health: are the experts used?", text)


def _semantic(results: Mapping[str, Any]) -> str:
    semantic = results.get("semantic")
    if not semantic:
        return ""
    names = semantic["categories"]
    matrix = np.array(semantic["correlation"], float)  # None becomes NaN
    pairs = sorted(
        (matrix[i, j], names[i], names[j]) for i, j in itertools.combinations(range(len(names)), 2)
    )

    def listed(some):
        return "; ".join(f"{a} and {b} ({value:+.2f})" for value, a, b in some)

    text = """<p>The semantic router reads the prompt alone. Its logits, averaged over the held-out
prompts of each category, are compared by Pearson correlation over the experts: related categories should
be alike, unrelated ones not. A prompt with several phenomena counts for each.</p>"""
    if pairs:
        mean = np.mean([value for value, _, _ in pairs])
        text += (
            f"<p>Most alike: {listed(pairs[:-4:-1])}. Least alike: {listed(pairs[:3])}. "
            f"Mean over all pairs: {mean:+.2f}.</p>"
        )
    chart = _heat_chart(matrix, names, names, "RdBu_r", -1, 1, "")
    picture = _image(chart, "Correlation of semantic logits between categories")
    return _section("Semantic router: which physics are alike?", text + _figure(picture, ""))


def _diffusion(results: Mapping[str, Any]) -> str:
    text = """<p>The error of the denoising model itself, on held-out clips under noise of strength sigma,
with the branch and with its hints switched off. Clips and noise are the same, so the difference is paired
clip by clip: below zero, the branch helps.</p>"""
    heads = ["", "loss with the branch", "loss without", "ratio", "difference &plusmn; standard error"]
    for split, measured in results["diffusion"].items():
        rows = [
            [
                f"sigma {row['sigma']:g}" if row["sigma"] != "all" else "mean",
                _number(row["with_branch"], 4),
                _number(row["without_branch"], 4),
                _number(row["ratio"], 4),
                f"{row['difference']:+.5f} &plusmn; {_number(row['standard_error'], 5)}",
            ]
            for row in measured
        ]
        text += f"<h3>On {SPLITS[split]}</h3>" + _table(heads, rows, total=True)
    return _section("Diffusion loss: does the branch help or harm?", text)


def _clips(config: Mapping[str, Any], clips: Sequence[tuple[str, Mapping[str, np.ndarray]]]) -> str:
    settings, fps = config["samples"], config["data"]["fps"]
    text = f"""<p>Held-out prompts, chosen so that many phenomena and one to three at once are shown: the
real clip, a clip generated with the branch, and one generated by the backbone alone from the same noise
({html.escape(settings["solver"])}, {settings["steps"]} steps,
{settings["guidance_schedule"]} guidance {settings["guidance"]:g}). Nothing
was picked by its looks.</p>"""
    cells = []
    for caption, versions in clips:
        strip = _strip([_clip(frames, name, fps) for name, frames in versions.items()])
        cells.append(f'<div><p class="prompt">{html.escape(caption)}</p>{strip}</div>')
    return _section("Sampled clips", text + f'<div class="pair">{"".join(cells)}</div>')


def _curves(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    charts = [
        f"<h3>{html.escape(title)}</h3>" + _image(_curve_chart(lines), f"Losses over the steps: {title}")
        for title, lines in curves.items()
        if lines
    ]
    text = """<p>Each loss by itself, before its weight. Pale: as logged, one batch each; dark: a running
mean. Validation losses are of the averaged (EMA) parameters at fixed noise.</p>"""
    return _section("Training", text + "".join(charts)) if charts else ""


def _configuration(config: Mapping[str, Any]) -> str:
    branch = config["branch"]
    refinement, semantic = branch.get("refinement"), branch.get("semantic")
    rows = [
        ["backbone", ", ".join(f"{key} {value}" for key, value in config["backbone"].items())],
        ["copied blocks", ", ".join(map(str, branch["layers"]))],
        ["semantic experts", semantic.get("experts", 17) if semantic else "none"],
        [
            "refinement experts",
            f"{refinement.get('experts', 8)}, top {refinement.get('top_k', 2)}" if refinement else "none",
        ],
        ["losses", "diffusion 1" + "".join(f", {key} {value:g}" for key, value in config["losses"].items())],
        ["batch", config["batch_size"]],
        ["seed", config["seed"]],
    ]
    body = "".join(
        f"<tr><td>{a}</td><td style='text-align:left'>{html.escape(str(b))}</td></tr>" for a, b in rows
    )
    whole = html.escape(json.dumps(config, indent=1))
    return _section(
        "Configuration",
        f"<table>{body}</table><details><summary>All of it</summary><pre>{whole}</pre></details>",
    )


# --- Pieces of HTML --------------------------------------------------------------------------------


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>\n"


def _figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]], total: bool = False) -> str:
    """Cells are HTML. With `total` the last row is set off."""
    lines = ["<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for index, row in enumerate(rows):
        kind = ' class="sum"' if total and index == len(rows) - 1 else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def _strip(cells: Sequence[str], width: int | None = None) -> str:
    """Cells side by side: of `width` pixels, or sharing the space."""
    columns = f"repeat({len(cells)}, {f'{width}px' if width else '1fr'})"
    return f'<div class="strip" style="grid-template-columns: {columns}">{"".join(cells)}</div>'


def _clip(frames: np.ndarray, caption: str, fps: float) -> str:
    """An animation with its caption, which is HTML."""
    file = io.BytesIO()
    visualize.save_webp(file, frames, fps)
    data = base64.b64encode(file.getvalue()).decode()
    text = caption.replace("<br>", ", ")
    return _figure(f'<img class="clip" alt="{text}" src="data:image/webp;base64,{data}">', caption)


def _number(value: float | None, digits: int = 2) -> str:
    return "&ndash;" if value is None or not np.isfinite(value) else f"{value:.{digits}f}"


# --- Charts ----------------------------------------------------------------------------------------


def _image(figure: Figure, text: str) -> str:
    """The figure as an SVG image; its bytes depend on the figure alone."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "prophy"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img class="chart" alt="{html.escape(text)}" src="data:image/svg+xml;base64,{data}">'


def _axes(figure: Figure, *place: int):
    axes = figure.add_subplot(*place)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, color="#8b95a1")
    return axes


def _auc_chart(rows: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(9, 1.1 + 0.34 * len(rows)), layout="constrained")
    axes = _axes(figure, 1, 1, 1)
    y = np.arange(len(rows))
    for key, offset, colour, label in (
        ("auc_before", -0.19, GREY, "AUC before training"),
        ("auc_after", 0.19, BLUE, "AUC after training"),
    ):
        values = np.array([row[key][0] for row in rows], float)
        axes.barh(y + offset, values, 0.36, color=colour, label=label)
    values = np.array([row["specificity_after"][0] for row in rows], float)
    axes.plot(values, y, "D", color=ORANGE, markersize=5, label="specificity after training")
    axes.axvline(0.5, color="#1d242c", linewidth=0.8, linestyle=":")
    axes.set_yticks(y, [row["category"] for row in rows], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("0.5 is guessing", fontsize=9)
    specificity, *aucs = axes.get_legend_handles_labels()[0]
    place = dict(loc="lower left", bbox_to_anchor=(0, 1))
    axes.legend(handles=[*aucs, specificity], fontsize=8, frameon=False, ncols=3, **place)
    return figure


def _heat_chart(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    colours: str,
    low: float,
    high: float,
    label: str,
) -> Figure:
    """A table (rows, columns) in colours with its numbers."""
    long = max(map(len, columns)) > 3
    size = (2.2 + 0.56 * len(columns), (1.7 if long else 0.8) + 0.36 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = _axes(figure, 1, 1, 1)
    axes.spines[:].set_visible(False)
    image = axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            axes.text(
                j,
                i,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=7.5,
                color="white" if dark else "black",
            )
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    axes.set_xticks(
        range(len(columns)), columns, fontsize=9, rotation=40 if long else 0, ha="right" if long else "center"
    )
    axes.tick_params(length=0)
    axes.set_xlabel(label, fontsize=9)
    return figure


def _curve_chart(lines: Sequence[Mapping[str, float]]) -> Figure:
    """One panel for each training loss, and one for the validation losses."""
    names = sorted({name for line in lines for name in line if name.startswith("loss/")} - {"loss/total"})
    validation = sorted({name for line in lines for name in line if name.startswith("validation/")})
    panels = [(name.removeprefix("loss/").replace("_", " "), [name]) for name in names]
    panels += [("validation", validation)] if validation else []
    rows = -(-len(panels) // 3)
    figure = Figure(figsize=(10.6, 2.5 * rows), layout="constrained")
    for index, (title, series) in enumerate(panels):
        axes = _axes(figure, rows, 3, index + 1)
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


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Each value averaged with its neighbours, a twentieth of the series in all."""
    half = max(len(values) // 40, 1)
    padded = np.pad(values, half, mode="edge")
    return np.convolve(padded, np.ones(2 * half + 1) / (2 * half + 1), "valid")
