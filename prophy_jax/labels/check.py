"""How well the labels find what is known exactly: the physics sandbox and its masks.

Two measures, ROC AUCs of the target against the mask, for every band of layers and every way of denoising:

    AUC          tokens covered by a phenomenon against uncovered ones. 1 finds them all first.
    specificity  tokens covered by a phenomenon against those covered only by the clip's other phenomena.

0.5 is chance. A map of "something is here", such as attention without denoising gives even with random
weights, has an AUC above 0.5, but a specificity of 0.5. One cell of the model is one token of the mask. A
case is a phenomenon in a clip; both are measured in single cases, since targets of two clips have scales of
their own, and averaged over the cases of a phenomenon, then over phenomena. The two ratios order the tokens
of a case alike, so they measure the same.

T latent times, G masks a side, N = T G G tokens.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from prophy_jax.data.sandbox.clip import make_clip
from prophy_jax.data.taxonomy import PHENOMENA
from prophy_jax.evaluation.auc import POSITIVE, roc_auc
from prophy_jax.labels import labelling, targets
from prophy_jax.labels.vlm import Answer, Vlm

MEASURES = ("auc", "specificity")
CONFIGURED = "configured"  # the band of config.label.layers
Cases = dict[tuple[str, str, str, str], list[float]]  # (band, denoise, phenomenon, measure) -> one per case


def measure(model: Vlm, settings: ConfigDict, sandbox: ConfigDict, step: Callable[[], Any]) -> dict[str, Any]:
    """Labels `sandbox.clips` clips and measures them.

    Args:
        model: Answers the questions.
        settings: `config.label`; `every`, `cell`, `batch` and `scale` change nothing.
        sandbox: `config.label_check`: clips, size, frames, fps, seed.
        step: called after each clip.

    Returns:
        What `summarise` does.
    """
    bands = list_bands(settings.layers, model.num_layers)
    reading = labelling.make_reading(settings, tuple(range(model.num_layers)))
    cases: Cases = defaultdict(list)
    for index in range(sandbox.clips):
        clip = make_clip(sandbox.seed, "test", index, sandbox.size, sandbox.frames, sandbox.fps)
        view = labelling.View.of(
            clip.masks.shape[:3], len(clip.masks), sandbox.frames, sandbox.fps, every=1, cell=1
        )
        [answers] = labelling.ask(model, [clip.frames], [clip.category], view, reading)
        for band, layers in bands.items():
            for denoise in targets.DENOISE:
                for name, kind, value in score(answers, clip.masks, clip.category, layers, denoise):
                    cases[band, denoise, name, kind].append(value)
        step()
    return summarise(cases, bands, settings.denoise)


def list_bands(configured: tuple, num_layers: int) -> dict[str, list[int]]:
    """Name -> layers: the quarters of the depth, all of it, and last the configured one."""
    quarters = [part.tolist() for part in np.array_split(np.arange(num_layers), 4) if part.size]
    bands = {f"{part[0]} to {part[-1]}": part for part in quarters}
    bands[f"0 to {num_layers - 1}"] = list(range(num_layers))
    return bands | {CONFIGURED: list(labelling.choose_layers(configured, num_layers))}


def score(
    answers: list[Answer], masks: np.ndarray, category: np.ndarray, layers: list[int], denoise: str
) -> Iterator[tuple[str, str, float]]:
    """Yields (phenomenon, measure, value) of one clip where there are tokens to compare.

    masks (T, G, G, E).
    """
    *own, background = (answer.maps[layers] for answer in answers)
    label = masks.reshape(-1, masks.shape[-1])  # (T, G, G, E) -> (N, E)
    for e, maps in zip(np.flatnonzero(category), own, strict=True):
        target = targets.target(maps, background, masks.shape[:3], denoise, "max")
        covered, uncovered = label[:, e] >= POSITIVE, label[:, e] == 0
        others = (np.delete(label, e, 1) >= POSITIVE).any(1)
        for kind, negative in (("auc", uncovered), ("specificity", uncovered & others)):
            kept = covered | negative
            value = roc_auc(target[kept], covered[kept])
            if not np.isnan(value):
                yield PHENOMENA[e], kind, value


def summarise(cases: Cases, bands: Mapping[str, list[int]], denoise: str) -> dict[str, Any]:
    """JSON types, with both measures as {"mean": over phenomena, "error": its standard error}.

    {"bands": {band: {"layers": [...], denoise: {"auc": ..., "specificity": ...}}},
     "phenomena": {name: {"cases": number, "auc": mean, "specificity": mean}} as configured,
     "best": {measure: {"band", "denoise", "mean"}},
     "configured": {"denoise", "auc": mean, "specificity": mean}}
    """

    def values(band: str, how: str, name: str, kind: str) -> list[float]:
        return cases.get((band, how, name, kind), [])

    def over_phenomena(band: str, how: str, kind: str) -> dict[str, float] | None:
        found = [values(band, how, name, kind) for name in PHENOMENA]
        return _mean([float(np.mean(own)) for own in found if own])

    results: dict[str, Any] = {"bands": {}, "phenomena": {}}
    for band, layers in bands.items():
        results["bands"][band] = {"layers": layers} | {
            how: {kind: over_phenomena(band, how, kind) for kind in MEASURES} for how in targets.DENOISE
        }
    for name in PHENOMENA:
        own = {kind: values(CONFIGURED, denoise, name, kind) for kind in MEASURES}
        if own["auc"]:
            means = {kind: float(np.mean(found)) for kind, found in own.items() if found}
            results["phenomena"][name] = {"cases": len(own["auc"]), **means}
    results["best"] = {}
    for kind in MEASURES:
        found = [
            {"band": band, "denoise": how, "mean": row[how][kind]["mean"]}
            for band, row in results["bands"].items()
            for how in targets.DENOISE
            if row[how][kind]
        ]
        results["best"][kind] = max(found, key=lambda setting: setting["mean"], default=None)
    own = results["bands"][CONFIGURED][denoise]
    results[CONFIGURED] = {"denoise": denoise} | {kind: own[kind] and own[kind]["mean"] for kind in MEASURES}
    return results


def _mean(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "error": error}


def table(results: Mapping[str, Any]) -> str:
    """The results as text."""
    lines = []
    titles = {"auc": "AUC", "specificity": "Specificity, among phenomena"}
    for kind, title in titles.items():
        lines += [f"{title}: mean over phenomena (standard error), 0.5 is chance"]
        lines += [f"  {'layers':<12}" + "".join(f"{how:>16}" for how in targets.DENOISE)]
        for band, row in results["bands"].items():
            cells = (_cell(row[how][kind]) for how in targets.DENOISE)
            lines += [f"  {band:<12}" + "".join(f"{cell:>16}" for cell in cells)]
        lines += [""]
    own = results[CONFIGURED]
    lines += [f"{'As configured, ' + own['denoise']:<30}{'AUC':>10}{'specificity':>14}{'clips':>8}"]
    for name, row in results["phenomena"].items():
        specificity = f"{row['specificity']:.3f}" if "specificity" in row else "-"
        lines += [f"  {name:<28}{row['auc']:>10.3f}{specificity:>14}{row['cases']:>8}"]
    lines += [""]
    for kind, title in titles.items():
        best = results["best"][kind]
        if best:
            layers = results["bands"][best["band"]]["layers"]
            lines += [
                f"Best {title}: {best['mean']:.3f}, layers {layers[0]} to {layers[-1]}, {best['denoise']}; "
                f"configured: {own[kind]:.3f}"
            ]
    lines += ["A high AUC with a specificity of 0.5 tells where something is, not what."]
    return "\n".join(lines)


def _cell(value: Mapping[str, float] | None) -> str:
    if value is None:
        return "-"
    return f"{value['mean']:.3f}" + (f" ({value['error']:.3f})" if value["error"] is not None else "")
