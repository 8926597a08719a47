"""Measures of ProPhy's branch: where its token routing finds each phenomenon, and what its routers do.

    localisation     does P'_r, the token routing, find each phenomenon? ROC AUC against the token labels
    router health    entropy and load of both routers; which expert serves which category
    semantic router  correlation of its logits between categories

F H W video, M clips, S noise levels, N video tokens, E_s E_r experts, C categories of a table, E of all.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from prophy_jax.evaluation import charts, pictures
from prophy_jax.evaluation.auc import POSITIVE, roc_auc
from prophy_jax.evaluation.diffusion import SIGMAS
from prophy_jax.models.beside.prophy import ProPhy, Routing, router_statistics

TITLE, TEMPLATE = "Physical branch", "routing.html.j2"
FIELDS = ("category", "alignment", "alignment_present")
AIM_AUC = 0.8  # a covered token has the higher value four times out of five; guessing, every second time
AIM_ENTROPY = 0.5  # what an even use of only sqrt(E) of E experts has: a router below it has collapsed
SHOWN = (2, 3, 2, 3)  # phenomena in each clip whose routing is shown
ROUTERS = {
    "semantic": "semantic (one decision per prompt, all experts)",
    "refinement": "refinement (one decision per token, the top experts)",
}


# --- Measures --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One category in one clip that shows it."""

    category: int
    label: np.ndarray  # (N,) of this category
    others: np.ndarray  # (N,) largest label of the other categories present, 0 where there is none
    before: np.ndarray  # (S, N) P'_r of this category at step 0
    after: np.ndarray  # (S, N) P'_r of this category after training


def find_cases(label: np.ndarray, present: np.ndarray, before: np.ndarray, after: np.ndarray) -> list[Case]:
    """The cases of one clip.

    Args:
        label: (N, E).
        present: (E,).
        before: (S, N, E) P'_r at step 0.
        after: (S, N, E) P'_r now.
    """
    categories = np.flatnonzero(present)
    cases = []
    for e in categories:
        rest = label[:, categories[categories != e]]  # (N, categories - 1)
        others = rest.max(1, initial=0)
        cases.append(Case(int(e), label[:, e], others, before[..., e], after[..., e]))
    return cases


def localisation_auc(cases: Sequence[Case], scores: Sequence[np.ndarray]) -> float:
    """AUC of covered against uncovered tokens of all cases together; `scores` has one (N,) for each case."""
    label, score = np.concatenate([case.label for case in cases]), np.concatenate(scores)
    kept = (label >= POSITIVE) | (label == 0)
    return roc_auc(score[kept], label[kept] >= POSITIVE)


def specificity_auc(cases: Sequence[Case], scores: Sequence[np.ndarray]) -> float:
    """AUC of tokens covered by the category against tokens covered by the clip's other categories only.

    A map of "something happens here" scores 0.5, however well it localises.
    """
    label, score = np.concatenate([case.label for case in cases]), np.concatenate(scores)
    others = np.concatenate([case.others for case in cases])
    # A clip with one category has no negatives; its positives would be compared with other clips.
    paired = np.concatenate([np.full(case.label.shape, case.others.any()) for case in cases])
    positive = label >= POSITIVE
    kept = paired & (positive | ((label == 0) & (others >= POSITIVE)))
    return roc_auc(score[kept], positive[kept])


def localisation(cases: Sequence[Case], names: Sequence[str]) -> dict[str, Any]:
    """AUC per category and noise level, before and after training, and their means over categories.

    `names` are those of the E categories.
    """
    rows = []
    for category in sorted({case.category for case in cases}):
        own = [case for case in cases if case.category == category]
        row = {
            "category": names[category],
            "clips": len(own),
            "covered_tokens": int(sum((case.label >= POSITIVE).sum() for case in own)),
        }
        for name, measure in (("auc", localisation_auc), ("specificity", specificity_auc)):
            for when in ("before", "after"):
                row[f"{name}_{when}"] = [
                    measure(own, [getattr(case, when)[s] for case in own]) for s in range(len(SIGMAS))
                ]
        rows.append(row)
    keys = [f"{name}_{when}" for name in ("auc", "specificity") for when in ("before", "after")]
    known = {key: np.ma.masked_invalid([row[key] for row in rows]) for key in keys}
    mean = {key: table.mean(0).filled(np.nan).tolist() for key, table in known.items()}
    return {"categories": rows, "mean": mean}


def expert_table(
    rho: np.ndarray, label: np.ndarray, present: np.ndarray, names: Sequence[str]
) -> dict[str, list[float]]:
    """Mean rho_r over the tokens that each category covers, and over tokens that none covers.

    Args:
        rho: (M, N, E_r).
        label: (M, N, E).
        present: (M, E).
        names: Of the E categories.

    Returns:
        E_r numbers for each category, and for "background". Those without such tokens are left out.
    """
    label = label * (present[:, None, :] > 0)
    masks = {name: label[..., e] >= POSITIVE for e, name in enumerate(names)}
    masks["background"] = (label == 0).all(-1) & (present.sum(-1, keepdims=True) > 0)
    return {name: rho[mask].mean(0).tolist() for name, mask in masks.items() if mask.any()}


def semantic_correlation(logits: np.ndarray, category: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Pearson correlation, over experts, between the mean logits of the clips of each two categories.

    Args:
        logits: (M, E_s).
        category: (M, E). Categories that no clip shows are left out.
        names: Of the E categories.
    """
    present = np.flatnonzero(category.any(0))
    means = np.stack([logits[category[:, e] > 0].mean(0) for e in present])  # (categories, E_s)
    correlation = np.atleast_2d(np.corrcoef(means))
    return {"categories": [names[e] for e in present], "correlation": correlation.tolist()}


# --- Of a run --------------------------------------------------------------------------------------


def keep(before: Routing, after: Routing) -> dict[str, jax.Array]:
    """What the measures need of the routing at step 0 and now.

    Returns:
        Where the model has them, before and after (B, N, E) P'_r, rho (B, N, E_r), semantic_logits (B, E_s).
    """
    found = {
        "before": before.alignment,
        "after": after.alignment,
        "rho": after.refinement,
        "semantic_logits": after.semantic_logits,
    }
    return {name: value for name, value in found.items() if value is not None}


def summarise(part: ProPhy, clips: Mapping[str, Any], kept: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The measures of a run.

    Args:
        part: The branch.
        clips: category (M, E), alignment (M, N, E) and alignment_present (M, E) of all clips.
        kept: What `keep` returned, for all clips and noise levels, (M, S, ...).

    Returns:
        covered_from, routers, localisation (None where it cannot be measured), and where they can be measured
        semantic and experts.
    """
    results: dict[str, Any] = {"covered_from": POSITIVE, "localisation": None, "routers": {}}
    if "semantic_logits" in kept:
        logits = kept["semantic_logits"][:, 0]
        results["routers"] |= router_statistics("semantic", jax.nn.softmax(logits))
        if clips["category"].any():
            results["semantic"] = semantic_correlation(logits, clips["category"], part.categories)
    if "rho" in kept:
        rho, label, present = kept["rho"][:, 0], clips["alignment"], clips["alignment_present"]
        results["routers"] |= router_statistics("refinement", rho, part.refinement.top_k)
        if present.any():
            results["experts"] = expert_table(rho, label, present, part.categories)
            cases = map(find_cases, label, present, kept["before"], kept["after"])
            cases = [case for clip in cases for case in clip]
            results["localisation"] = localisation(cases, part.categories)
    return results


def show(
    part: ProPhy, clips, kept, captions: Sequence[str], decode: Callable, grid: tuple[int, int, int]
) -> list[tuple]:
    """Pictures of the routing in a few clips that show many phenomena.

    Args:
        part: The branch.
        clips: As for `summarise`, and latents (M, T, h, w, 16).
        kept: As for `summarise`.
        captions: M texts.
        decode: Latents of one clip -> frames (F, H, W, 3).
        grid: Of the N tokens.

    Returns:
        For each clip its caption, frames (F, H, W, 3) and tracks. A track is a category, the frames under its
        P'_r, the frames under its label, and its AUC in this clip.
    """
    if "after" not in kept or not clips["alignment_present"].any():
        return []
    shown = []
    for i in pictures.choose_clips(clips["alignment_present"], SHOWN):
        frames, tracks = decode(clips["latents"][i]), []
        own = (clips["alignment"], clips["alignment_present"], kept["before"], kept["after"])
        for case in find_cases(*(value[i] for value in own)):
            heat = [pictures.stretch(case.after[0]), np.minimum(case.label / (2 * POSITIVE), 1)]
            under = [
                pictures.overlay(frames, pictures.tokens_to_frames(tokens, grid, frames.shape[:3]))
                for tokens in heat
            ]
            tracks.append((part.categories[case.category], *under, localisation_auc([case], [case.after[0]])))
        shown.append((captions[i], frames, tracks))
    return shown


# --- For the report --------------------------------------------------------------------------------


def view(results: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows and `results`, what metrics.json holds, does not have in that form."""
    routers, found = [], {"aim_auc": AIM_AUC, "aim_entropy": AIM_ENTROPY}
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
        found |= {"routers": routers, "least_even": min(numbers[1] for _, numbers in routers)}
    if results["localisation"]:
        rows, mean = results["localisation"]["categories"], results["localisation"]["mean"]
        measured = [row for row in rows if row["auc_after"][0] is not None]
        found["left_out"] = [row["category"] for row in rows if row not in measured]
        found["specific"] = mean["specificity_after"][0] is not None
        if measured:
            found |= {"rows": measured, "auc_chart": auc_chart(measured)}
    if results.get("experts"):
        table = results["experts"]
        values = np.array(list(table.values()))  # (C + 1, E)
        experts = [str(index + 1) for index in range(values.shape[1])]
        found["expert_chart"] = charts.heat_chart(
            values, list(table), experts, "viridis", 0, values.max(), "refinement expert"
        )
    # Of one clip, all categories are alike: they have the same logits.
    if results.get("semantic") and results["clips"] > 1 and len(results["semantic"]["categories"]) > 1:
        names = results["semantic"]["categories"]
        matrix = np.array(results["semantic"]["correlation"], float)  # None becomes NaN
        found["pairs"] = sorted(
            (matrix[i, j], names[i], names[j]) for i, j in itertools.combinations(range(len(names)), 2)
        )
        found["semantic_chart"] = charts.heat_chart(matrix, names, names, "RdBu_r", -1, 1, "")
    return found


def auc_chart(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Bars of AUC before and after training for each category, and its specificity after training."""
    figure = Figure(figsize=(9, 1.1 + 0.34 * len(rows)), layout="constrained")
    axes = charts.make_axes(figure, 1, 1, 1)
    y = np.arange(len(rows))
    for key, offset, colour, label in (
        ("auc_before", -0.19, charts.GREY, "AUC before training"),
        ("auc_after", 0.19, charts.BLUE, "AUC after training"),
    ):
        values = np.array([row[key][0] for row in rows], float)
        axes.barh(y + offset, values, 0.36, color=colour, label=label)
    values = np.array([row["specificity_after"][0] for row in rows], float)
    if not np.isnan(values).all():
        axes.plot(values, y, "D", color=charts.ORANGE, markersize=5, label="specificity after training")
    axes.axvline(0.5, color="#1d242c", linewidth=0.8, linestyle=":")
    axes.set_yticks(y, [row["category"] for row in rows], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("0.5 is guessing", fontsize=9)
    handles = axes.get_legend_handles_labels()[0]  # lines before bars
    place = dict(loc="lower left", bbox_to_anchor=(0, 1))
    axes.legend(handles=[*handles[-2:], *handles[:-2]], fontsize=8, frameon=False, ncols=3, **place)
    return figure
