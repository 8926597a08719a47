"""Command: alignment labels for prepared records, from the attention of a vision-language model.

    python -m prophy_jax.label --vlm=Qwen/Qwen2.5-VL-7B-Instruct --data=DATA_DIR --out=LABELS_DIR

The model is asked where and how each phenomenon of a clip shows (`config.data.taxonomy`). The
attention of the answer onto the video, less that of the answer to a general prompt, becomes the target on
the token grid of the diffusion model (`prophy_jax.labels.targets`). The frames are those that the records
were made of, from the same videos; --source says where these are now. LABELS_DIR holds a data set in the
order of the records.

    --check      labels clips of the physics sandbox, whose masks are exact, and reports for every band of
                 layers and every way of denoising how well the labels find them: ROC AUC, 0.5 is chance.
                 Takes no --data; writes LABELS_DIR-check/check.json.
    --import=DIR takes labels of your own instead, a file for each clip (`prophy_jax.labels.own`), and needs
                 neither model nor videos; with --check it only checks them.
    --preview=N  only draws the labels of N clips, with questions and answers, into LABELS_DIR-preview.
    --propose=FILE.csv   asks which categories the captions of clips without any name, and writes a table to
                 look through; then prepare again with --source=FILE.csv, and label.

`config.label` has the settings, `config.label_check` the clips of --check; --config may name another file.
Any number of processes may share the work (--process=0/4 to --process=3/4), and any of them may be stopped
and started again. Process I takes GPU I modulo the number of GPUs it sees; a model larger than one GPU is
spread over all of them, so show each process its own with CUDA_VISIBLE_DEVICES. With --engine=ray the workers
of a Ray cluster share it, one for each GPU (docs/launch.md). Needs the extra "label".

T h w token grid, N = T h w tokens, P categories of a clip.
"""

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from absl import flags
from ml_collections import ConfigDict

import prophy_jax
from prophy_jax.data import records, taxonomy
from prophy_jax.data.job import Job, parse_process
from prophy_jax.data.sources import video
from prophy_jax.labels import own as own_labels
from prophy_jax.labels import propose
from prophy_jax.labels.earlier import EarlierLabels
from prophy_jax.labels.labeller import Labeller, describe
from prophy_jax.labels.opening import import_labelling, open_model, open_reader
from prophy_jax.labels.prepared import PreparedClips
from prophy_jax.run import cli, engine, storage
from prophy_jax.run.errors import UserError, counted
from prophy_jax.run.workdir import run_identity


def label(
    config: ConfigDict,
    model_folder: str | Path,
    data: str | Path,
    out: str | Path,
    process: tuple[int, int] = (0, 1),
    sources: Sequence[str] = (),
    by: str | None = None,
    devices: int = 1,
) -> dict[str, Any] | None:
    """Makes this process's share of a folder of labels (see `prophy_jax.data.records`).

    Args:
        config: with `label`.
        model_folder: a Qwen2.5-VL model, or its name on the hub.
        data: prepared records.
        out: the folder to make, or to resume.
        process: (i, P), which of how many processes this is.
        sources: where the sources of the records are now; none: where they were.
        by: the engine that asks the model, see `prophy_jax.run.engine`; None is this process.
        devices: of each worker of that engine.

    Returns:
        The manifest, as in `out`/manifest.json; None when other processes still work.

    Raises:
        UserError: no data, no such model, a setting that does not exist, videos that cannot be found, or
            `out` is of other data, another model or other settings.
    """
    # 1. The data and their videos, the model, and the folder: everything that can be wrong shows now.
    storage.require_gs(out, "labels")
    prepared = open_prepared(config, model_folder, data, sources)
    make = functools.partial(Labeller, config, model_folder, prepared, storage.path(out), process[0])
    with engine.workers(by, make, devices) as workers:
        described, reading = workers.ask(Labeller.tell)
        plan = {
            "data_fingerprint": prepared.manifest["fingerprint"],
            **run_identity(config, "labels"),
            "vlm": described,
            "questions_sha256": hash_questions(prepared.known),
            "program": prophy_jax.__version__,
        }
        files = prepared.files
        prepared.check_contents()
        rows = prepared.list_rows()
        shards = {split: len(own) for split, own in files.items()}
        earlier = EarlierLabels(out, rows)
        job = Job(out, plan, shards, process, rows, inputs=("data_fingerprint",))
        if rows and not job.complete():
            earlier.print_changes()

        # 2. The shards of this process.
        with job.share() as shares:
            mine = [files[split][index] for split, index in shares]
            for bucket in dict.fromkeys(file.bucket for file in mine):
                print(workers.ask(Labeller.describe_view, bucket), flush=True)
            workers.share(Labeller.label, mine, total=sum(file.count for file in mine))

    # 3. The last process to finish puts the folder together.
    views = prepared.views(config)
    manifest = job.finish(lambda reports: describe(reports, prepared, views, reading, plan))
    if manifest is not None:
        print_summary(out, manifest)
    return manifest


def preview(
    config: ConfigDict,
    model_folder: str | Path,
    data: str | Path,
    out: str | Path,
    count: int,
    sources: Sequence[str] = (),
) -> None:
    """Draws the labels of `count` clips from all over the data into the folder `out`: an mp4 and a text each.

    An mp4 shows the clip, and on its right one panel for each phenomenon, its positive labels over the clip.
    Raises UserError as `label` does.
    """
    labelling = import_labelling(config)
    prepared = open_prepared(config, model_folder, data, sources)
    model, _, reading = open_reader(config, model_folder)
    views = prepared.views(config)
    out = storage.path(out)
    out.mkdir(parents=True, exist_ok=True)
    for file, clip in prepared.sample_evenly(count):
        if clip.frames is None:
            print(f"{clip.id} cannot be read: {clip.problem}")
            continue
        view = views[file.bucket]
        [answers] = labelling.ask(model, [clip.frames], [clip.category], view, reading, prepared.known)
        maps = labelling.make_targets(answers, view, config.label)
        names = [prepared.known.names[e] for e in np.flatnonzero(clip.category)]
        path = out / f"{file.split}-{file_name(clip.id)}.mp4"
        video.write_mp4(path, draw(clip.frames, names, maps, view.grid), prepared.fps)
        questions = [*(prepared.known.questions[name] for name in names), prepared.known.background]
        lines = [f"{q}\n    {answer.text}\n" for q, answer in zip(questions, answers, strict=True)]
        storage.write_atomically(path.with_suffix(".txt"), "\n".join(lines))
        print(f"wrote {path}: {', '.join(names)}", flush=True)


def file_name(clip_id: str) -> str:
    """A name for files of a clip: its id, unless that holds what no name should, such as "/", or is long."""
    if re.fullmatch(r"\w[\w.-]{0,99}", clip_id, re.ASCII):
        return clip_id
    digest = hashlib.sha256(clip_id.encode()).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', clip_id)[-60:].strip('_')}-{digest[:8]}"


def draw(
    frames: np.ndarray, names: Sequence[str], maps: np.ndarray, grid: tuple[int, int, int]
) -> np.ndarray:
    """frames (F, H, W, 3), and next to them the positive part of each of maps (P, N) over them, named.

    Full colour is the 99th percentile of a map's positive part: single tokens stand far out. Large clips are
    halved, small ones enlarged, so that the panels are side by side and the names can be read.
    """
    from prophy_jax.evaluation import pictures

    step = 2 if frames.shape[2] >= 2 * pictures.PANEL else 1
    panels = [pictures.enlarge(frames[:, ::step, ::step])]
    for name, tokens in zip(names, maps.astype(np.float32), strict=True):
        full = np.quantile(tokens[tokens > 0], 0.99) if (tokens > 0).any() else 1.0
        heat = pictures.tokens_to_frames(np.clip(tokens / full, 0, 1), grid, frames.shape[:3])
        panel = pictures.enlarge(pictures.overlay(frames, heat)[:, ::step, ::step])
        panels.append(pictures.write_name(panel, name))
    return np.concatenate(panels, 2)  # (F, H', (1 + P) W', 3)


def check(config: ConfigDict, model_folder: str | Path, out: str | Path) -> dict[str, Any]:
    """Measures the labels of the physics sandbox, prints the tables, and writes `out`/check.json.

    Returns what `prophy_jax.labels.check.measure` does. Raises UserError as `label` does.
    """
    labelling = import_labelling(config)
    from prophy_jax.labels import check as checking

    model, described = open_model(model_folder, config, 0)
    labelling.choose_layers(config.label.layers, model.num_layers)  # before the progress bar, if it is wrong
    with tqdm.tqdm(total=config.label_check.clips, unit="clip", dynamic_ncols=True) as bar:
        results = checking.measure(model, config.label, config.label_check, bar.update)
    print(checking.table(results))
    path = storage.path(out) / "check.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    sandbox = config.label_check.to_dict()
    everything = {"vlm": described, **run_identity(config, "labels"), "label_check": sandbox, **results}
    storage.write_atomically(path, json.dumps(everything, indent=1) + "\n")
    print(f"wrote {path}")
    return results


def open_prepared(
    config: ConfigDict, model_folder: str | Path, data: str | Path, sources: Sequence[str]
) -> PreparedClips:
    """The clips. UserError on whatever can be wrong with them, or with the settings of the labels."""
    import_labelling(config)
    prepared = PreparedClips(data, sources, taxonomy.of(config))
    if not prepared.show_something():
        table = propose.suggest_table(propose.list_roots(data, prepared.manifest, sources))
        raise UserError(
            f"no clip of {data} shows any category, so there is nothing to ask: have categories proposed "
            f"from the captions, with python -m prophy_jax.label --vlm={model_folder} --data={data} "
            f"--propose={table} and the same --config; or give the list of clips a column 'category' with "
            f"names such as {', '.join(prepared.known.names[:3])}, and prepare them again; or take labels of "
            "your own with --import=DIR"
        )
    return prepared


def hash_questions(known: taxonomy.Taxonomy) -> str:
    """Of all that the model is asked."""
    return hashlib.sha256(json.dumps([known.background, dict(known.questions)]).encode()).hexdigest()


def print_summary(out: str | Path, manifest: Mapping[str, Any]) -> None:
    """Prints what was made, and what was left out."""
    clips, questions = counted(manifest["clips"], "clip"), counted(manifest["questions"], "question")
    print(
        f"{out}: labels of {clips}, {questions} asked, {manifest['seconds_per_clip']:.2f} s per clip, "
        f"{manifest['peak_bytes'] / 2**30:.1f} GiB at most"
    )
    unreadable = [f"{name}: {problem}" for name, problem in manifest["unreadable"]]
    records.print_list("without labels, their videos cannot be read", unreadable)


def main(config: ConfigDict) -> None:
    """The command, with its flags parsed."""
    options = flags.FLAGS
    own = options["import"].value
    if not options.vlm and not own:
        raise UserError(
            "name the folder of a Qwen2.5-VL model: --vlm=DIR, or its name on the hub: --vlm=ORG/NAME, or "
            "the folder of labels of your own: --import=DIR"
        )
    if "label" not in config:
        raise UserError("this configuration has no config.label: name one that has, such as configs/wan.py")
    data, out = options.data or config.data.dir, options.out or config.data.side.alignment
    works = ["--check"] if options.check and not own else []
    works += [f"--{name}" for name in ("import", "propose", "preview") if options[name].value]
    if len(works) > 1:
        raise UserError(f"{' and '.join(works)} cannot be given together: run one after the other")
    if options.engine and works:
        raise UserError(f"{works[0]} is the work of one process: leave out --engine")
    if options.engine and options.process != "0/1":
        raise UserError("--engine shares the work by itself: leave out --process")
    if options.propose:
        if options.process != "0/1":
            raise UserError("--propose is the work of one process: leave out --process")
        propose.propose(config, options.vlm, data, options.propose, options.source, options.threshold)
        return
    if not out and not (own and options.check):
        raise UserError("name the folder to write: --out=DIR")
    if own:
        own_labels.import_labels(config, own, data, out, options.check)
    elif options.check:
        check(config, options.vlm, f"{out}-check")
    elif options.preview:
        preview(config, options.vlm, data, f"{out}-preview", options.preview, options.source)
    else:
        process = parse_process(options.process)
        label(config, options.vlm, data, out, process, options.source, options.engine, options.devices)


if __name__ == "__main__":
    # Defined here, so that importing several commands into one program does not define flags twice.
    flags.DEFINE_string(
        "vlm",
        None,
        "Folder of a Qwen2.5-VL model, or ORG/NAME[@REVISION] of the Hugging Face hub, which is fetched.",
    )
    flags.DEFINE_string("data", None, "Folder of prepared records; default: config.data.dir.")
    flags.DEFINE_string("out", None, "Folder to write, or to resume; default: config.data.side.alignment.")
    flags.DEFINE_multi_string(
        "source", [], "Folder or file where a source of the records is now, one for each; default: as it was."
    )
    flags.DEFINE_string("process", "0/1", "I/P: which of how many processes this is, such as 0/4.")
    flags.DEFINE_string("engine", None, engine.HELP)
    flags.DEFINE_integer("devices", 1, engine.DEVICES_HELP, lower_bound=1)
    flags.DEFINE_integer("preview", 0, "Draw the labels of so many clips instead.", lower_bound=0)
    flags.DEFINE_bool(
        "check",
        False,
        "Measure the labels of the physics sandbox instead; with --import, only check the files.",
    )
    flags.DEFINE_string(
        "propose", None, "Write a table of categories that fit the captions instead, to prepare from again."
    )
    flags.DEFINE_float(
        "threshold", 0.5, "Score of a category to be proposed.", lower_bound=0.0, upper_bound=1.0
    )
    flags.DEFINE_string("import", None, "Folder of labels of your own, ID.npz for each clip.")
    cli.run(main, __doc__, default="configs/wan.py")
