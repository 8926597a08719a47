"""Measures a run on held-out clips.

    python -m prophy_jax.evaluate --config=configs/wan.py:demo --workdir=runs/demo [--out=DIR]

Give the configuration, and the overrides, of the training run. Writes OUT/metrics.json and OUT/report.html,
one file that needs nothing else; OUT is WORKDIR unless given. --workdir=DIR/checkpoints/N measures that
checkpoint, to DIR/step_N; so is the last one of a run that has not ended. The clips are those of the test
split, or of the validation split where there is no test split. Any run of prophy_jax.train can be measured:

    diffusion loss   on the validation split too
    clips            sampled from held-out prompts

With parts next to the backbone, both are measured with the parts and without, from the same noise. A part may
have measures of its own, see `prophy_jax.evaluation`. A part that other programs can read, such as LoRA, is
also exported, read again and sampled from the same noise.

--scores measures only what `config.evaluators` say of the first `config.study.prompts` held-out prompts, a
score for each, and writes OUT/scores.json alone. Noise depends on `config.study.seed`, not on `config.seed`.
Without --workdir it measures the backbone alone, that of `config.backbone_params`.

M clips, T h w latent grid.
"""

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from prophy_jax.run import storage
from prophy_jax.run import workdir as folders
from prophy_jax.run.errors import UserError, counted

EXPORTED = "exported and read again"
SAMPLED = (1, 2, 3, 1, 2, 3)  # phenomena in each sampled prompt


def check_run(config: Any, workdir: str) -> None:
    """Raises UserError unless `workdir` is of a run of this model, on this backbone."""
    from prophy_jax.run import checkpoints

    stored = folders.read_run(workdir)
    was, own = (folders.run_identity(one, "model") for one in (stored["config"], config))
    if different := folders.differences(was, own):
        raise UserError(f"{workdir} is of another configuration ({different}): give that one")
    if config.backbone_params:
        remedy = checkpoints.name_folder(config.backbone_remedy, config.backbone_params)
        backbone = checkpoints.read_manifest(config.backbone_params, remedy)
        if backbone["sha256"] != stored["references"].get("backbone_sha256"):
            raise UserError(
                f"{config.backbone_params} is not the backbone that {workdir} started from: "
                "name that one with --config.backbone_params=DIR, or train again"
            )


class Opened(NamedTuple):
    """A run that is measured: its model, where its parameters are, and the clips.

    Attributes:
        layout: Of the parameters, by name of the part.
        places: Folders of those.
        data: The manifest of the records.
        split: "test" or "val", whose clips are measured.
        bucket: That which has most of these.
    """

    mesh: jax.sharding.Mesh
    batch_size: int
    model: Any
    objective: Any
    layout: dict[str, Any]
    places: dict[str, str]
    data: dict[str, Any]
    split: str
    bucket: str


def open_run(config: Any, workdir: str | None) -> Opened:
    """Finds what is measured; without a workdir, the backbone that a run would start from.

    Raises UserError on a run of another configuration, without checkpoints, or on other data.
    """
    from prophy_jax import build
    from prophy_jax.run import checkpoints, optim

    if workdir:
        check_run(config, folders.run_of(workdir))
    batch_size = build.microbatch(config)  # fits the mesh
    mesh = build.build_mesh(config.mesh, batch_size)
    model = build.build_model(config, mesh)
    layout = build.place(model, mesh, config.frozen_dtype, optim.groups_of(config.optimizer))
    places = {"backbone": config.backbone_params}
    if workdir:
        trained, _ = optim.split(layout, optim.groups_of(config.optimizer))
        found = checkpoints.find_parts(workdir, _finish(workdir))
        if missing := sorted(trained.keys() - found.keys()):
            raise UserError(
                f"{workdir} holds {sorted(found)}, and this configuration trains {missing} as well: give the "
                f"settings of its training, or {_finish(workdir)}"
            )
        places |= found
    data = build.check_data(config, model, build.build_losses(config, model))
    split = "test" if "test" in data["counts"] else "val"
    bucket = max(data["buckets"], key=lambda name: data["buckets"][name]["counts"][split])
    objective = build.build_objective(config)
    return Opened(mesh, batch_size, model, objective, layout, places, data, split, bucket)


def _finish(workdir: str) -> str:
    return f"train it to the end: python -m prophy_jax.train --config=... --workdir={folders.run_of(workdir)}"


def exported(model: Any, places: Mapping[str, str]) -> tuple[Any, dict[str, Any]]:
    """The model with the parts that other programs can read as it is after export and reading them again.

    Adapters of another part than the backbone are not among them.

    Returns the model, and the parameters of these parts; {} where there are none.
    """
    from convert import export
    from prophy_jax import models
    from prophy_jax.run import checkpoints

    parts, params = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, part in model.parts.items():
            read = export.READERS.get(models.file_of(type(part)))
            stored = checkpoints.read_manifest(places[name], "")["shapes"]
            alone = all(path.startswith("backbone/") for path in stored)  # no other program has the parts
            if read and alone and models.file_of(type(model.backbone)) in export.FORMS:
                [file] = export.export(
                    places[name], export.FORMATS[0], os.path.join(folder, name), quiet=True
                )
                parts[name], params[name] = read(str(file), model.backbone)
    return dataclasses.replace(model, parts={**model.parts, **parts}), params


def evaluate(config: Any, workdir: str, out: str) -> dict[str, Any]:
    """Measures the run in `workdir` and writes `out`/metrics.json and `out`/report.html.

    A run that is not finished, or WORKDIR/checkpoints/N in place of a run, is measured as it was saved then.
    Returns what metrics.json holds. Raises UserError on a run without checkpoints, or missing data.
    """
    from tqdm import tqdm

    from prophy_jax import build, evaluation
    from prophy_jax.data import loader, records
    from prophy_jax.diffusion import generate
    from prophy_jax.evaluation import diffusion, pictures, report
    from prophy_jax.run import checkpoints, encoders, metrics, optim

    # 1. The run and the clips.
    run = folders.run_of(workdir)
    opened = open_run(config, workdir)
    mesh, batch_size, model, objective, layout, places, data, split, bucket = opened
    trained, _ = optim.split(layout, optim.groups_of(config.optimizer))
    steps = [checkpoints.read_manifest(places[name], _finish(workdir)).get("step") for name in trained]
    latent_shape = tuple(data["buckets"][bucket]["latent_shape"])
    stored = records.open_dataset(config.data.dir, "records", bucket, split)
    captions = [stored[i]["caption"].decode() for i in range(len(stored))]
    own, added = evaluation.measures(config.parts or {}), evaluation.name_parts(model.parts)

    with jax.set_mesh(mesh):
        after = build.load_params(config, layout, places)
        before = build.init_params(config, model, layout) if own else None
        storage.path(out).mkdir(parents=True, exist_ok=True)

        # 2. Every clip at every noise level; for the measures of parts, also through the model at step 0.
        splits = ("val", "test") if split == "test" else ("val",)
        samplers = {f"with {added}" if added else "generated": model}
        samplers |= {"backbone alone": model.without()} if added else {}
        again, values = exported(model, places)
        samplers |= {EXPORTED: again} if values else {}
        passes = sum(-(-data["counts"][name] // batch_size) for name in splits)
        total = passes + len(samplers) * config.samples.steps
        bar = tqdm(total=total, desc="measuring", unit="part", dynamic_ncols=True)
        keep = {name: measures.keep for name, measures in own.items()}
        read = [field for measures in own.values() for field in measures.FIELDS]
        fields = tuple(dict.fromkeys(("latents", "category", *model.fields, *read)))
        measure, measured = diffusion.make_measure(model, objective, mesh, config.seed, keep), {}
        for name in splits:
            found = []
            for batch in loader.read_once(config.data, name, batch_size, fields):
                if batch["latents"].shape[1:] == latent_shape:
                    found.append(measure(before, after, batch, batch_size))
                    bar.update()
            measured[name] = jax.tree.map(lambda *values: np.concatenate(values), *found)
        clips = measured[split]
        results = {"split": split, "clips": len(stored), "steps": max(steps), "sigmas": diffusion.SIGMAS}
        for name, measures in own.items():
            results |= measures.summarise(model.parts[name], clips, clips[name])
        results["diffusion"] = {
            name: diffusion.compare(all_of["loss"], all_of.get("loss_without"))
            for name, all_of in measured.items()
        }

        # 3. Held-out prompts, sampled.
        bar.set_description("sampling")
        decode = encoders.load_codec(config, mesh).decode
        chosen = pictures.choose_clips(clips["category"], SAMPLED)
        prompt = {name: clips[name][chosen] for name in model.fields}
        negative = loader.load_empty_text(config.data.dir)
        rows = {"real clip": clips["latents"][chosen]}
        for name, one in samplers.items():
            sample = generate.make_generator(one, objective, config.samples)
            params = after | values if name == EXPORTED else after
            rows[name] = sample(params, clips["noise"][chosen], prompt, negative, after_steps=bar.update)
        bar.close()
        if values:
            trained, alone, again = (np.asarray(rows[name]) for name in samplers)
            apart, changed = (float(np.abs(one - trained).max()) for one in (again, alone))
            results["exported"] = {
                "parts": sorted(values),
                "latents_differ_by": apart,
                "backbone_alone_differs_by": changed,
            }
            print(
                f"{', '.join(values)}, exported and read again: latents differ by at most {apart:.1e} "
                f"from those of the trained parts, and those of the backbone alone by {changed:.1e}"
            )

    # 4. The report.
    versions = {name: [decode(latents) for latents in np.asarray(rows[name])] for name in rows}
    sampled = [
        (captions[i], {name: versions[name][row] for name in versions}) for row, i in enumerate(chosen)
    ]
    grid = model.backbone.grid(latent_shape)
    shown = {
        name: measures.show(model.parts[name], clips, clips[name], captions, decode, grid)
        for name, measures in own.items()
    }
    curves = {(added or "the backbone").capitalize(): metrics.read_metrics(run)}
    if config.backbone_params:
        curves["The backbone, before"] = metrics.read_metrics(os.path.dirname(config.backbone_params))
    results = _plain(results)
    storage.write_atomically(os.path.join(out, "metrics.json"), json.dumps(results, indent=1))
    path = os.path.join(out, "report.html")
    # That of the run, but for how these clips were sampled.
    about = json.loads(json.dumps(folders.read_run(run)["config"]))  # of which a page may ask for any key
    about["samples"] = folders.config_as_json(config)["samples"]
    report.write(path, about, results, sampled, shown, curves)
    return results


def score(config: Any, workdir: str | None, out: str) -> dict[str, Any]:
    """Measures what `config.evaluators` say of the run in `workdir`, and writes `out`/scores.json.

    Without a run it is the backbone alone.

    Returns what it holds, see `evaluation.scores`. Raises UserError as `evaluate` does, before it writes.
    """
    from prophy_jax import build
    from prophy_jax.evaluation import scores
    from prophy_jax.run import checksums

    if not workdir:
        build.named(config, "backbone", config.backbone_params)
    scores.build_evaluators(config)
    opened = open_run(config, workdir)
    model, layout = opened.model, opened.layout
    if not workdir:
        model, layout = model.without(), {"backbone": layout["backbone"]}
    with jax.set_mesh(opened.mesh):
        params = build.load_params(config, layout, opened.places)
        found = scores.score(
            config, model, opened.objective, params, opened.mesh, opened.bucket, opened.split
        )
    found = {"split": opened.split, "settings": scores.settings(config), **found}
    storage.path(out).mkdir(parents=True, exist_ok=True)
    path = os.path.join(out, "scores.json")
    storage.write_atomically(path, json.dumps(checksums.sealed(found), indent=1))
    return found


def _plain(value: Any) -> Any:
    """JSON types: floats have 6 digits, NaN becomes None."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str | int | None):
        return value
    return float(f"{float(value):.6g}") if np.isfinite(value) else None


def main(config: Any) -> None:
    """The command, with its flags parsed."""
    workdir = flags.FLAGS.workdir
    if not workdir and not (flags.FLAGS.scores and flags.FLAGS.out):
        raise UserError("name the run to measure: --workdir=DIR")
    out = flags.FLAGS.out or re.sub(r"/checkpoints/(\d+)/?$", r"/step_\1", workdir or "")
    if flags.FLAGS.scores:
        found = score(config, workdir, out)
        for name, values in found["scores"].items():
            known = [value for value in values if value is not None]
            mean = f"mean {np.mean(known):.6g}" if known else "not measured"
            print(f"{name}: {mean}, of {counted(len(known), 'prompt')}")
        print(f"wrote {os.path.join(out, 'scores.json')}")
        return
    evaluate(config, workdir, out)
    print(f"wrote {os.path.join(out, 'metrics.json')} and {os.path.join(out, 'report.html')}")


if __name__ == "__main__":
    from prophy_jax.run import cli

    flags.DEFINE_string("workdir", None, "Folder of the run, or of a checkpoint of it.")
    flags.DEFINE_string("out", None, "Folder to write metrics.json and report.html to; default: the run's.")
    flags.DEFINE_bool(
        "scores", False, "Only what config.evaluators say of held-out prompts: OUT/scores.json."
    )
    cli.run(main, __doc__)
