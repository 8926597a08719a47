"""Measures a finished run of the physical branch on held-out clips.

    python -m prophy_jax.evaluate --config=configs/wan.py:demo --workdir=runs/demo [--out=DIR]

Give the configuration, and the overrides, of the training run. Writes OUT/metrics.json and OUT/report.html,
one file that needs nothing else; OUT is WORKDIR unless given. The clips are those of the test split, or of
the validation split where there is no test split. What is measured:

    localisation     does P'_r, the token routing, find each phenomenon? ROC AUC against the token labels
    router health    entropy and load of both routers; which expert serves which category
    semantic router  correlation of its logits between categories
    diffusion loss   with the branch and without, from the same noise; on the validation split too
    clips            held-out prompts sampled with the branch and without, from the same noise

B batch, M clips, S noise levels, N video tokens, T h w latent grid, E_s E_r experts, 17 categories.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prophy_jax import losses, sample
from prophy_jax.data.taxonomy import PHENOMENA
from prophy_jax.evaluation import pictures as visualize
from prophy_jax.run import optim, parallel
from prophy_jax.run.errors import UserError
from prophy_jax.run.metrics import POSITIVE, roc_auc

SIGMAS = (0.2, 0.5, 0.8)  # shares of noise, see `diffusion.flow`; headline numbers are of the first
SAMPLED = (1, 2, 3, 1, 2, 3)  # phenomena in each sampled prompt
MAPPED = (2, 3, 2, 3)  # phenomena in each clip whose routing is shown


# --- Measures, in NumPy ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One category in one clip that shows it."""

    category: int
    label: np.ndarray  # (N,) of this category
    others: np.ndarray  # (N,) largest label of the other categories present, 0 where there is none
    before: np.ndarray  # (S, N) P'_r of this category at step 0
    after: np.ndarray  # (S, N) P'_r of this category after training


def localisation_auc(cases: Sequence[Case], scores: Sequence[np.ndarray]) -> float:
    """AUC of covered against uncovered tokens, pooled over cases; scores are one (N,) per case."""
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


def localisation(cases: Sequence[Case]) -> dict[str, Any]:
    """AUC per category and noise level, before and after training, and their means over categories."""
    rows = []
    for category in sorted({case.category for case in cases}):
        own = [case for case in cases if case.category == category]
        row = {
            "category": PHENOMENA[category],
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
    mean = {key: _mean_rows([row[key] for row in rows]) for key in keys}
    return {"categories": rows, "mean": mean}


def _mean_rows(rows: Sequence[Sequence[float]]) -> list[float]:
    """Column means that leave NaN entries out."""
    table = np.array(rows)
    known = ~np.isnan(table)
    with np.errstate(invalid="ignore"):
        return (np.where(known, table, 0).sum(0) / known.sum(0)).tolist()


def expert_table(rho: np.ndarray, label: np.ndarray, present: np.ndarray) -> dict[str, list[float]]:
    """Mean rho_r over the tokens that each category covers, and over tokens that none covers.

    Args: rho (M, N, E_r), label (M, N, 17), present (M, 17). Categories without such tokens are left out.
    """
    label = label * (present[:, None, :] > 0)
    masks = {name: label[..., e] >= POSITIVE for e, name in enumerate(PHENOMENA)}
    masks["background"] = (label == 0).all(-1) & (present.sum(-1, keepdims=True) > 0)
    return {name: rho[mask].mean(0).tolist() for name, mask in masks.items() if mask.any()}


def semantic_correlation(logits: np.ndarray, category: np.ndarray) -> dict[str, Any]:
    """Pearson correlation, over experts, between the mean logits of the clips of each two categories.

    Args: logits (M, E_s), category (M, 17). Categories that no clip shows are left out.
    """
    present = np.flatnonzero(category.any(0))
    means = np.stack([logits[category[:, e] > 0].mean(0) for e in present])  # (categories, E_s)
    correlation = np.atleast_2d(np.corrcoef(means))
    return {"categories": [PHENOMENA[e] for e in present], "correlation": correlation.tolist()}


def loss_comparison(with_branch: np.ndarray, without: np.ndarray) -> list[dict[str, float]]:
    """Mean losses, their ratio and the paired difference, per noise level and, last, over all of them.

    Args: losses of each clip (M, S). Differences are paired by clip: the noise is the same.
    """
    rows = []
    for name, columns in [(s, [i]) for i, s in enumerate(SIGMAS)] + [("all", slice(None))]:
        a, b = with_branch[:, columns].mean(1), without[:, columns].mean(1)  # (M,)
        error = (a - b).std(ddof=1) / len(a) ** 0.5 if len(a) > 1 else float("nan")
        rows.append(
            {
                "sigma": name,
                "with_branch": float(a.mean()),
                "without_branch": float(b.mean()),
                "ratio": float(a.mean() / b.mean()),
                "difference": float((a - b).mean()),
                "standard_error": float(error),
            }
        )
    return rows


def choose_clips(category: np.ndarray, sizes: Sequence[int]) -> list[int]:
    """Clips with `sizes` phenomena, each time one with the most phenomena not chosen yet.

    category (M, 17). Where no clip has the wanted number, any will do; ties go to the first.
    """
    chosen: list[int] = []
    for size in sizes[: len(category)]:
        new = ~category[chosen].any(0)  # (17,)
        score = (category[:, new] > 0).sum(1) + 100 * (category.sum(1) == size)
        score[chosen] = -1
        chosen.append(int(score.argmax()))
    return chosen


# --- The run ---------------------------------------------------------------------------------------


def check_run(config, workdir: str) -> dict[str, Any]:
    """The manifest of WORKDIR/branch. Raises UserError unless it is a finished run of this model."""
    from prophy_jax import experiment
    from prophy_jax.run import checkpoints

    if not config.branch:
        raise UserError("this configuration has no branch to measure: name one that has")
    finish = f"train it to the end: python -m prophy_jax.train --config=... --workdir={workdir}"
    manifest = checkpoints.read_manifest(os.path.join(workdir, "branch"), finish)
    path = os.path.join(workdir, "config.json")
    if not os.path.exists(path):
        raise UserError(f"{path} is missing: name the --workdir of a run of prophy_jax.train")
    with open(path) as file:
        trained = json.load(file)
    parts = ("backbone", "branch", "objective", "losses", "reduction", "codec", "text_encoder")
    was, own = trained["config"], experiment.config_as_json(config)
    different = experiment.differences({key: was[key] for key in parts}, {key: own[key] for key in parts})
    if different:
        raise UserError(f"{path} is of another configuration ({different}): give that one")
    if config.backbone_params:
        backbone = checkpoints.read_manifest(config.backbone_params, config.backbone_remedy)
        if backbone["sha256"] != trained["references"].get("backbone_sha256"):
            raise UserError(
                f"{config.backbone_params} is not the backbone that {workdir} was trained beside: "
                "name that one with --config.backbone_params=DIR, or train the branch again"
            )
    return manifest


def evaluate(config, workdir: str, out: str) -> dict[str, Any]:
    """Measures the run in `workdir` and writes `out`/metrics.json and `out`/report.html.

    Returns what metrics.json holds. Raises UserError on an unfinished run or missing data.
    """
    from tqdm import tqdm

    from prophy_jax import experiment
    from prophy_jax.data import loader, records
    from prophy_jax.evaluation import report
    from prophy_jax.run import encoders, metrics

    # 1. The run and the clips.
    manifest = check_run(config, workdir)
    run = experiment.build(config)
    data = experiment.check_data(run)
    counts = data["counts"]
    split = "test" if "test" in counts else "val"
    bucket = max(data["buckets"], key=lambda name: data["buckets"][name]["counts"][split])
    latent_shape = tuple(data["buckets"][bucket]["latent_shape"])
    stored = records.open_dataset(config.data.dir, "records", bucket, split)
    backbone = os.path.join(workdir, "backbone")  # there, if the run trained it beside the branch
    backbone = backbone if os.path.exists(backbone) else config.backbone_params
    batch_size = config.batch_size // config.accumulation  # fits the mesh

    with jax.set_mesh(run.mesh):
        after = experiment.load_params(run, backbone, os.path.join(workdir, "branch"))
        before = optim.merge(*experiment.init_params(run))
        os.makedirs(out, exist_ok=True)

        # 2. Every clip at every noise level, through the model at step 0 and now.
        splits = ("val", "test") if split == "test" else ("val",)
        total = sum(-(-counts[name] // batch_size) for name in splits) + 2 * config.samples.steps
        bar = tqdm(total=total, desc="measuring", unit="part", dynamic_ncols=True)
        measure, measured = make_measure(run), {}
        for name in splits:
            parts = []
            for batch in loader.make_loader(
                config.data.dir, name, batch_size, 0, shuffle=False, repeat=False, labels=config.data.labels
            ):
                if batch["latents"].shape[1:] == latent_shape:
                    parts.append(measure(before, after, batch, batch_size))
                    bar.update()
            measured[name] = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        seen = measured[split]
        results, cases = summarise(run, seen)
        results["diffusion"] = {
            name: loss_comparison(m["with_branch"], m["without"]) for name, m in measured.items()
        }

        # 3. Held-out prompts, sampled with the branch and without.
        bar.set_description("sampling")
        chosen = choose_clips(seen["category"], SAMPLED)
        captions = [stored[i]["caption"].decode() for i in range(len(stored))]
        decode = encoders.load_codec(config, run.mesh).decode
        rows = {"real clip": seen["latents"][chosen]}
        generate, noise = sample.make_generator(run.model, config), seen["noise"][chosen]
        text, text_mask = loader.load_empty_text(config.data.dir)
        for name, scale in (("with the branch", 1.0), ("backbone alone", 0.0)):
            rows[name] = generate(
                after, noise, seen["text"][chosen], seen["text_mask"][chosen],
                {"text": text, "text_mask": text_mask}, scale, bar.update,
            )  # fmt: skip
        bar.close()

    # 4. The report.
    clips = [
        (captions[i], {name: decode(np.asarray(latents[row])) for name, latents in rows.items()})
        for row, i in enumerate(chosen)
    ]
    maps = []
    if cases:
        grid = run.model.backbone.grid(seen["latents"].shape[1:])
        for i in choose_clips(seen["alignment_present"], MAPPED):
            maps.append((captions[i], *routing_pictures(decode(seen["latents"][i]), cases[i], grid)))
    curves = {"The branch": metrics.read_metrics(workdir)}
    if config.backbone_params:
        curves["The backbone, before"] = metrics.read_metrics(os.path.dirname(config.backbone_params))
    results = {"split": split, "clips": len(stored), "steps": manifest.get("step"), **results}
    results = _plain(results)
    with open(os.path.join(out, "metrics.json"), "w") as file:
        json.dump(results, file, indent=1)
    path = os.path.join(out, "report.html")
    report.write(path, experiment.config_as_json(config), results, clips, maps, curves)
    return results


def make_measure(run):
    """measure(before, after, batch, size) -> NumPy arrays of the batch's clips, leading B.

    Those of the batch, and: noise (B, T, h, w, 16), with_branch and without (B, S) diffusion losses, and
    where the model has them before and after (B, S, N, 17) P'_r, rho (B, S, N, E_r), semantic_logits
    (B, S, E_s), the same at every noise level.
    """
    model, objective = run.model, run.objective

    @jax.jit
    def look(before, after, batch, noise):
        def at(sigma):
            time = jnp.full((noise.shape[0],), sigma)
            noisy = objective.add_noise(batch["latents"], noise, time)
            inputs = noisy, objective.model_time(time), batch["text"], batch["text_mask"]

            def loss(velocity):
                return objective.per_sample_loss(velocity, batch["latents"], noise, time)

            output, routing_before = model(after, *inputs), model(before, *inputs).routing
            seen = {
                "with_branch": loss(output.velocity),
                "without": loss(model(after, *inputs, scale=0.0).velocity),
                "before": routing_before.alignment,
                "after": output.routing.alignment,
                "rho": output.routing.refinement,
                "semantic_logits": output.routing.semantic_logits,
            }
            return {name: value for name, value in seen.items() if value is not None}

        seen = jax.lax.map(at, jnp.float32(SIGMAS))  # (S, B, ...)
        return jax.tree.map(lambda value: value.swapaxes(0, 1), seen)  # (B, S, ...)

    def measure(before, after, batch, size) -> dict[str, np.ndarray]:
        count = len(batch["id"])
        rows = np.minimum(np.arange(size), count - 1)  # the last clip fills up a smaller batch
        batch = parallel.full_precision(batch)
        inputs = {name: batch[name][rows] for name in ("latents", "text", "text_mask")}
        noise = sample.make_noise(run.config.seed, batch["index"], inputs["latents"].shape[1:])
        noise = np.asarray(noise)
        inputs = parallel.put_batch(inputs | {"noise": noise[rows]}, run.mesh)
        seen = jax.device_get(look(before, after, inputs, inputs["noise"]))
        return batch | {"noise": noise} | {name: value[:count] for name, value in seen.items()}

    return measure


def summarise(run, seen: Mapping[str, np.ndarray]):
    """(results, cases by clip) from what `measure` saw of all clips."""
    results: dict[str, Any] = {
        "sigmas": list(SIGMAS),
        "covered_from": POSITIVE,
        "localisation": None,
        "routers": {},
    }
    cases: list[list[Case]] = []
    if "semantic_logits" in seen:
        logits = seen["semantic_logits"][:, 0]
        results["routers"] |= losses.router_statistics("semantic", jax.nn.softmax(logits))
        if seen["category"].any():
            results["semantic"] = semantic_correlation(logits, seen["category"])
    if "rho" in seen:
        rho, top_k = seen["rho"][:, 0], run.model.branch.refinement.top_k
        results["routers"] |= losses.router_statistics("refinement", rho, top_k)
        if seen["alignment_present"].any():
            label, present = seen["alignment"], seen["alignment_present"]
            results["experts"] = expert_table(rho, label, present)
            cases = [
                find_cases(label[i], present[i], seen["before"][i], seen["after"][i])
                for i in range(len(label))
            ]
            flat = [case for clip in cases for case in clip]
            results["localisation"] = localisation(flat) if flat else None
    return results, cases


def find_cases(label: np.ndarray, present: np.ndarray, before: np.ndarray, after: np.ndarray) -> list[Case]:
    """The cases of one clip: label (N, 17), present (17,), before and after (S, N, 17)."""
    categories = np.flatnonzero(present)
    cases = []
    for e in categories:
        rest = label[:, categories[categories != e]]  # (N, categories - 1)
        others = rest.max(1, initial=0)
        cases.append(Case(int(e), label[:, e], others, before[..., e], after[..., e]))
    return cases


def routing_pictures(frames: np.ndarray, cases: Sequence[Case], grid: tuple[int, int, int]):
    """(frames, tracks) of one clip; a track is (category, its P'_r and its label over the frames, AUC)."""
    tracks = []
    for case in cases:
        heat = [visualize.stretch(case.after[0]), np.minimum(case.label / (2 * POSITIVE), 1)]
        pictures = [
            visualize.overlay(frames, visualize.tokens_to_frames(tokens, grid, frames.shape[:3]))
            for tokens in heat
        ]
        auc = localisation_auc([case], [case.after[0]])
        tracks.append((PHENOMENA[case.category], *pictures, auc))
    return frames, tracks


def _plain(value: Any) -> Any:
    """As JSON takes it: floats with 6 digits, NaN as None."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str | int | None):
        return value
    return float(f"{float(value):.6g}") if np.isfinite(value) else None


def main(config) -> None:
    from absl import flags

    workdir = flags.FLAGS.workdir
    if not workdir:
        raise UserError("name the run to measure: --workdir=DIR")
    out = flags.FLAGS.out or workdir
    evaluate(config, workdir, out)
    print(f"wrote {os.path.join(out, 'metrics.json')} and {os.path.join(out, 'report.html')}")


if __name__ == "__main__":
    from absl import flags

    from prophy_jax.run import cli

    flags.DEFINE_string("workdir", None, "Folder of a finished run.")
    flags.DEFINE_string("out", None, "Folder for metrics.json and report.html; default: the run's.")
    cli.run(main, __doc__)
