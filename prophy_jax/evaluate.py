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

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from prophy_jax import sample
from prophy_jax.run import optim
from prophy_jax.run.errors import UserError

SAMPLED = (1, 2, 3, 1, 2, 3)  # phenomena in each sampled prompt


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
    from prophy_jax.evaluation import diffusion, pictures, report, routing
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
        measure, measured = diffusion.make_measure(run, {"branch": routing.keep}), {}
        for name in splits:
            parts = []
            for batch in loader.make_loader(
                config.data.dir, name, batch_size, 0, shuffle=False, repeat=False, labels=config.data.labels
            ):
                if batch["latents"].shape[1:] == latent_shape:
                    parts.append(measure(before, after, batch, batch_size))
                    bar.update()
            measured[name] = jax.tree.map(lambda *values: np.concatenate(values), *parts)
        seen = measured[split]
        results = {"sigmas": list(diffusion.SIGMAS)}
        results |= routing.summarise(run.model.branch, seen, seen["branch"])
        results["diffusion"] = {
            name: diffusion.compare(own["loss"], own["loss_without"]) for name, own in measured.items()
        }

        # 3. Held-out prompts, sampled with the branch and without.
        bar.set_description("sampling")
        chosen = pictures.choose_clips(seen["category"], SAMPLED)
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
    grid = run.model.backbone.grid(seen["latents"].shape[1:])
    maps = routing.show(seen, seen["branch"], captions, decode, grid)
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
