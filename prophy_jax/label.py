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

T h w token grid, N = T h w tokens, E categories, P of a clip, T' H' W' grid of the vision-language model.
"""

import functools
import hashlib
import itertools
import json
import os
import re
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tqdm
from absl import flags
from ml_collections import ConfigDict

import prophy_jax
from prophy_jax.data import records, taxonomy
from prophy_jax.data.batch import Sizes
from prophy_jax.data.job import Job, Shard, make_shard, parse_process, read_clips
from prophy_jax.data.sources import source, video
from prophy_jax.run import cli, engine, hub, storage
from prophy_jax.run.errors import UserError, counted
from prophy_jax.run.workdir import run_identity

if TYPE_CHECKING:
    from prophy_jax.labels.labelling import View
    from prophy_jax.labels.vlm import Reading, Vlm

PACKAGES = ("numpy", "torch", "transformers", "tokenizers", "pillow", "av")  # these shape the labels
PROBED = 8  # clips that must not all be unreadable
SEARCHED = 20  # clips of a part of the data, to find one with a phenomenon


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


def import_labels(
    config: ConfigDict, folder: str | Path, data: str | Path, out: str | Path, only_check: bool = False
) -> dict[str, Any] | None:
    """Makes a folder of labels from files of one's own (see `prophy_jax.labels.own`), once all are right.

    Returns the manifest, None with `only_check`. Prints each wrong file and why. Raises UserError then, and
    on data that do not exist or are of other categories; nothing is written.
    """
    from prophy_jax.labels import own

    # 1. Every file, and what is wrong with it.
    storage.require_gs(out, "labels")
    known, manifest = taxonomy.of(config), records.read_manifest(data)
    known.check(manifest, data)
    sizes = {bucket: Sizes.of(manifest, bucket) for bucket in manifest["buckets"]}
    files = list_files(data, manifest)
    ids = {file: list_ids(data, file) for shards in files.values() for file in shards}
    clips = {name: file.bucket for file, names in ids.items() for name in names}
    found, others = own.find(folder, clips)
    wrong, empty, digest = [], [], hashlib.sha256()
    for name, paths in found.items():
        try:
            if name not in clips:
                raise ValueError(f"{data} has no clip {name!r}; its ids are such as {next(iter(clips))!r}")
            if len(paths) > 1:
                raise ValueError("the clip has another file: " + ", ".join(path.name for path in paths))
            present, _ = own.read(paths[0], sizes[clips[name]].token_grid, known)
            if not present.any():
                empty.append(name)
            digest.update(json.dumps(name).encode() + paths[0].read_bytes())
        except ValueError as error:
            wrong.append(f"{paths[0]}: {error}")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    if wrong:
        raise UserError(
            f"{len(wrong)} of {counted(len(found), 'file')} of {folder} cannot be used, as listed; "
            "nothing was written"
        )
    unlabelled = [name for name in clips if name not in found]
    print(f"{folder}: no fault in {counted(len(found), 'file')}")
    records.print_list("files left out, which are not labels", others, "")
    records.print_list("files that label no category, with shares of 0 alone", empty, "")
    if unlabelled:
        more = "" if len(unlabelled) < 9 else ", ..."
        print(f"clips of {data} without labels: {len(unlabelled)}: {', '.join(unlabelled[:8])}{more}")
    if only_check:
        return None

    # 2. The data set, in the order of the records.
    plan = {
        "data_fingerprint": manifest["fingerprint"],
        "files_sha256": digest.hexdigest(),
        "program": prophy_jax.__version__,
    }
    job = Job(out, plan, {split: len(shards) for split, shards in files.items()})
    features = {f"alignment/{bucket}": records.features("alignment", size) for bucket, size in sizes.items()}
    for split, index in job.missing():
        file = files[split][index]
        size, dataset = sizes[file.bucket], f"alignment/{file.bucket}"
        with job.shard(split, index) as shard:
            for name in ids[file]:
                present, maps = known.multi_hot([]), np.zeros((0, size.tokens), np.float16)
                if name in found:
                    present, maps = own.read(found[name][0], size.token_grid, known)
                shard.write(dataset, features[dataset], {"id": name, "present": present, "maps": maps})
    about = {**plan, "categories": list(known.names), "clips": len(clips), "unlabelled": unlabelled}
    made = job.finish(lambda reports: (features, about))
    print(
        f"{out}: labels of {len(found)} of {counted(len(clips), 'clip')}; "
        f"train with --config.data.side.alignment={out}"
    )
    return made


def propose(
    config: ConfigDict,
    model_folder: str | Path,
    data: str | Path,
    table: str | Path,
    sources: Sequence[str] = (),
    threshold: float = 0.5,
) -> None:
    """Writes a table of the clips of `data` with categories that fit their captions, to be looked through.

    `prophy_jax.prepare --source` reads it; `prophy_jax.labels.propose` explains its columns. A clip that has
    categories keeps them, and is not asked about. Goes on where it was interrupted.

    Args:
        config: with `label`.
        model_folder: a Qwen2.5-VL model, or its name on the hub.
        data: prepared records.
        table: the file to make, in a folder that holds the sources of the records, or the one of them.
        sources: where the sources are now; none: where they were.
        threshold: score from which a category is proposed.

    Raises:
        UserError: no data, no such model, a table that is there already, or in another folder.
    """
    # 1. The clips, in the order of the records, and where a table finds their videos.
    import_labelling(config)
    from prophy_jax.labels import propose as proposing

    table, known, manifest = Path(table), taxonomy.of(config), records.read_manifest(data)
    known.check(manifest, data)
    roots = list_roots(data, manifest, sources)
    folders = [place_below(root, table.absolute().parent) for root in roots]
    if table.suffix.lower() != ".csv":
        raise UserError(f"--propose={table}: name a file that ends in .csv, such as {suggest_table(roots)}")
    if os.path.lexists(table):
        raise UserError(f"{table} exists, and may have been edited: name another file, or remove it")
    if outside := [root for root, folder in zip(roots, folders, strict=True) if folder is None]:
        raise UserError(
            f"--propose={table}: a table must be in a folder that holds its videos, which are in "
            f"{', '.join(map(str, outside))}: name {suggest_table(roots)}"
        )
    if not os.access(table.absolute().parent, os.W_OK):
        raise UserError(
            f"no file can be written beside {table}: make a folder with links to the sources, name these "
            "with --source=DIR, and the table in that folder"
        )
    clips: dict[str, proposing.Captioned] = {}
    files = [file for own in list_files(data, manifest).values() for file in own]
    copies = manifest.get("stand_in", ())  # splits whose clips are those of another
    for file in sorted(files, key=lambda file: file.split in copies):
        stored = records.open_dataset(data, "records", file.bucket, file.split)
        for index in range(file.first, file.first + file.count):
            record = stored[index]
            name, caption, place = (record[key].decode() for key in ("id", "caption", "video"))
            place = f"{folders[int(record['source'])].as_posix()}/{place}".removeprefix("./")
            names = tuple(known.names[e] for e in np.flatnonzero(record["category"]))
            clips.setdefault(name, proposing.Captioned(name, place, file.split, caption, names))
    asked = [clip for clip in clips.values() if not clip.names]
    if not asked:
        raise UserError(f"every clip of {data} has a category already: there is nothing to propose")

    # 2. Each question once, also after an interruption.
    model, described = open_model(model_folder, config, 0)
    identity = {"data": manifest["fingerprint"], "vlm": described["sha256"], "categories": known.names}
    unfinished = proposing.Unfinished(table, {**identity, "question": proposing.QUESTION})
    left = [clip for clip in asked if clip.id not in unfinished.scores]
    with tqdm.tqdm(total=len(left), unit="clip", dynamic_ncols=True, disable=not left) as bar:
        for first in range(0, len(left), config.label.batch):
            batch = left[first : first + config.label.batch]
            scores = proposing.ask(model, [clip.caption for clip in batch], known)
            unfinished.add({clip.id: own for clip, own in zip(batch, scores.tolist(), strict=True)})
            bar.update(len(batch))

    # 3. The table, and what to do with it.
    named = proposing.write(table, list(clips.values()), unfinished.scores, known, threshold)
    unfinished.path.unlink()
    print(
        f"{table}: {counted(len(clips), 'clip')}, {len(asked)} of them without a category; "
        f"{named} got one or more"
    )
    cut = [clip.id for clip in asked if len(clip.caption) > proposing.LONGEST]
    records.print_list(f"asked about the first {proposing.LONGEST} characters of the caption", cut, "")
    skipped = [name for name, _ in manifest.get("skipped", ())]
    records.print_list(f"clips that {data} has skipped, and that are not in the table", skipped)
    print(
        "look through the column 'category' and correct it, then run, with the same --config: "
        f"python -m prophy_jax.prepare --source={table} --out={data}"
    )


def list_roots(data: str | Path, manifest: Mapping[str, Any], moved: Sequence[str]) -> list[Path]:
    """The folder that each source names its videos from. UserError if there is no source, or it is gone."""
    paths = [storage.path(storage.absolute(path)) for path in check_moved(data, manifest, moved)]
    if not paths:
        raise UserError(f"{data} is of the physics sandbox, which knows its categories: nothing to propose")
    if far := [path for path in paths if storage.in_bucket(path)]:
        raise UserError(f"a table is beside its videos on a disk, and {far[0]} is in a bucket: copy it")
    if gone := [path for path in paths if not path.exists()]:
        raise UserError(f"no {gone[0]}, a source of {data}: if it has moved, say where it is: --source=DIR")
    return [path if path.is_dir() else path.parent for path in paths]


def place_below(path: Path, folder: Path) -> Path | None:
    """What `path` is relative to a folder that holds it, as named or when links are followed; or None."""
    for own, above in ((path, folder), (path.resolve(), folder.resolve())):
        if own.is_relative_to(above):
            return own.relative_to(above)
    return None


def suggest_table(roots: Sequence[Path]) -> Path:
    """A name for a table of proposed categories, in the folder that holds all sources."""
    return Path(os.path.commonpath(roots)) / "proposed.csv"


# --- The model -------------------------------------------------------------------------------------


def import_labelling(config: ConfigDict):
    """The module `labels.labelling`. UserError when its packages are missing, or a setting does not exist."""
    try:
        from prophy_jax.labels import labelling
    except ImportError as error:
        raise UserError(
            f'{error}: the labels need more packages: pip install "/path/to/prophy_jax[label]", which is the '
            "folder of this project"
        ) from error
    labelling.check_settings(config.label)
    return labelling


def open_model(folder: str | Path, config: ConfigDict, process: int) -> tuple["Vlm", dict[str, str]]:
    """The model, of a folder or of the hub, and what the manifest says of it. UserError as `vlm.load`."""
    from prophy_jax.labels import vlm

    origin = {}
    if repository := hub.find(str(folder), vlm.PATTERNS):
        folder = repository.fetch(vlm.choose)
        origin = {"name": repository.name, "revision": repository.commit}
    described = vlm.describe(folder) | origin
    device = vlm.choose_device(folder, process)
    print(f"opening {described['name']} on {device}", flush=True)
    return vlm.load(folder, device, config.label.dtype), described


def open_prepared(
    config: ConfigDict, model_folder: str | Path, data: str | Path, sources: Sequence[str]
) -> "PreparedClips":
    """The clips. UserError on whatever can be wrong with them, or with the settings of the labels."""
    import_labelling(config)
    prepared = PreparedClips(data, sources, taxonomy.of(config))
    if not prepared.show_something():
        table = suggest_table(list_roots(data, prepared.manifest, sources))
        raise UserError(
            f"no clip of {data} shows any category, so there is nothing to ask: have categories proposed "
            f"from the captions, with python -m prophy_jax.label --vlm={model_folder} --data={data} "
            f"--propose={table} and the same --config; or give the list of clips a column 'category' with "
            f"names such as {', '.join(prepared.known.names[:3])}, and prepare them again; or take labels of "
            "your own with --import=DIR"
        )
    return prepared


def open_reader(
    config: ConfigDict, model_folder: str | Path, process: int = 0
) -> tuple["Vlm", dict[str, str], "Reading"]:
    """The model, what the manifest says of it, and its attention that is read. UserError as `open_model`."""
    labelling = import_labelling(config)
    model, described = open_model(model_folder, config, process)
    layers = labelling.choose_layers(config.label.layers, model.num_layers)
    return model, described, labelling.make_reading(config.label, layers)


def describe_view(bucket: str, view: "View", model: "Vlm", config: ConfigDict) -> str:
    """Lines that say how large the model's view is and how much memory it will take."""
    settings = config.label
    times, height, width = view.shown
    need = {
        name: f"{size / 2**30:.1f}"
        for name, size in model.memory(view.shown, settings.batch, 4, settings.max_new_tokens).items()
    }
    text = (
        f"{bucket}: {times} x {height} x {width} video tokens, frames of {28 * height}x{28 * width}; for "
        f"{counted(settings.batch, 'clip')} at a time, each with 3 phenomena, about {need['peak']} GiB: "
        f"weights {need['weights']}, keys and values {need['cache']}"
    )
    last = int((times - 1) * model.time_step(view.seconds))
    if last >= max(height, width):
        text += (
            f"\n{bucket}: note: few cells for so long a clip: temporal positions reach {last}, those of the "
            f"text begin at {max(height, width)}; a smaller config.label.cell keeps them apart"
        )
    return text


def hash_questions(known: taxonomy.Taxonomy) -> str:
    """Of all that the model is asked."""
    return hashlib.sha256(json.dumps([known.background, dict(known.questions)]).encode()).hexdigest()


# --- The records and their videos ------------------------------------------------------------------


class RecordFile(NamedTuple):
    """The examples of one file of the records: those of one shard of the labels."""

    bucket: str
    split: str
    index: int  # among the shards of the split
    first: int  # example of the bucket's split
    count: int


def list_files(data: str | Path, manifest: Mapping[str, Any]) -> dict[str, list[RecordFile]]:
    """Split -> files of the records, bucket by bucket."""
    files: dict[str, list[RecordFile]] = {}
    for bucket in manifest["buckets"]:
        splits = records.open_info(data, "records", bucket).splits
        for split in splits:
            own = files.setdefault(split, [])
            lengths = splits[split].shard_lengths
            for first, count in zip(itertools.accumulate(lengths, initial=0), lengths, strict=False):
                own.append(RecordFile(bucket, split, len(own), first, count))
    return files


def list_ids(data: str | Path, file: RecordFile) -> list[str]:
    """Of the clips of one file of the records, in their order."""
    stored = records.open_dataset(data, "records", file.bucket, file.split)
    return [str(stored.read(index)["id"], "utf-8") for index in range(file.first, file.first + file.count)]


def check_moved(data: str | Path, manifest: Mapping[str, Any], moved: Sequence[str]) -> Sequence[str]:
    """Where the sources of the records are now. Raises UserError unless each is named, or none."""
    paths = manifest["sources"]
    if moved and len(moved) != len(paths):
        raise UserError(
            f"{data} has {len(paths)} sources and {len(moved)} are named: name each with --source, in order"
        )
    return moved or paths


class Clip(NamedTuple):
    """A record as the model needs it: frames (F, H, W, 3) uint8, or None and why, or labels made earlier."""

    id: str
    category: np.ndarray  # (E,)
    frames: np.ndarray | None
    problem: str = ""
    labels: tuple[np.ndarray, np.ndarray] | None = None  # present (E,), maps (P, N)


class PreparedClips:
    """Prepared records, and the videos that they were made of.

    Args:
        data: the folder.
        moved: where its sources are now; none: where they were.
        known: the categories, which must be those of the records.

    Raises:
        UserError: no data, data of other categories, or the videos cannot be found.
    """

    def __init__(
        self, data: str | Path, moved: Sequence[str], known: taxonomy.Taxonomy = taxonomy.WISA
    ) -> None:
        self.data = storage.path(data)
        self.known = known
        self.manifest = records.read_manifest(data)
        known.check(self.manifest, data)
        self.fps = self.manifest["video"]["fps"]
        self.sizes = {bucket: Sizes.of(self.manifest, bucket) for bucket in self.manifest["buckets"]}
        self._source = self._open_source(moved)
        self._moved = bool(moved)
        self._arguments = data, moved, known
        self._rows = {(row["split"], row["bucket"], row["index"]): row for row in read_clips(data)}
        self._open: dict[tuple[str, str], Sequence] = {}
        self.files = list_files(data, self.manifest)
        probed = list(self.sample_evenly(PROBED))
        if probed and all(clip.frames is None for _, clip in probed):
            clip = probed[0][1]
            raise UserError(
                f"the videos of {data} cannot be read ({clip.id}: {clip.problem}); if they have moved, say "
                "where: --source=DIR"
            )

    def __reduce__(self) -> tuple:
        """Opened anew where it is unpickled, which finds out whether the videos can be read there."""
        return type(self), self._arguments

    def _open_source(self, moved: Sequence[str]):
        paths = check_moved(self.data, self.manifest, moved)
        if not paths:
            return source.draw_sandbox(
                ConfigDict({**self.manifest["video"], "sandbox": self.manifest["sandbox"]})
            )
        try:
            return source.read_sources(paths, known=self.known)
        except UserError as error:
            raise UserError(f"{error}; if the source has moved, say where it is: --source=DIR") from error

    def list_rows(self) -> dict[tuple[str, int], list[dict[str, Any]]] | None:
        """(split, shard) -> what the labels of each record follow from; None of data that does not tell."""
        frames = json.dumps(self.manifest.get("plan", {}).get("data"), sort_keys=True)
        frames = hashlib.sha256(frames.encode()).hexdigest()[:16]
        rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for file in itertools.chain(*self.files.values()):
            for index in range(file.first, file.first + file.count):
                row = self._rows.get((file.split, file.bucket, index))
                if row is None:
                    return None
                kept = {key: row[key] for key in ("id", "bucket", "sha256", "category")}
                rows.setdefault((file.split, file.index), []).append(kept | {"frames": frames})
        return rows

    def check_contents(self) -> None:
        """Raises UserError if videos are not those that the records were made of, and names their clips."""
        changed = [row["id"] for row in self._rows.values() if self._changed(row, read=not self._moved)]
        if changed:
            names = ", ".join(changed[:10]) + (f" and {len(changed) - 10} more" if len(changed) > 10 else "")
            raise UserError(
                f"{counted(len(changed), 'video')} changed since {self.data} was prepared ({names}): run "
                "prophy_jax.prepare again, which encodes anew what changed, then this command"
            )

    def _changed(self, row: Mapping[str, Any], read: bool) -> bool:
        """Whether a clip has another video now; without `read`, only whether its size tells."""
        clip = source.Clip(row["id"], "", np.zeros(0), row["source"], row["video"])
        if row["bucket"] is None or not row["sha256"]:
            return False
        if not read:
            return self._source.size(clip) not in (None, row["stamp"][0])
        return self._source.content(clip, row).get("sha256", row["sha256"]) != row["sha256"]

    def views(self, config: ConfigDict) -> dict[str, "View"]:
        """How the clips of each bucket are shown to the model."""
        from prophy_jax.labels import labelling

        every, cell = config.label.every, config.label.cell
        lead = self.manifest["codec"].get("lead", 0)
        return {
            bucket: labelling.View.of(
                sizes.token_grid,
                sizes.latent_shape[0],
                video.Bucket.parse(bucket).frames,
                self.fps,
                every,
                cell,
                lead,
            )
            for bucket, sizes in self.sizes.items()
        }

    def read(self, bucket: str, split: str, index: int, earlier: "EarlierLabels | None" = None) -> Clip:
        """The clip of one record, cropped as for the record; without frames if it shows no phenomenon."""
        if (bucket, split) not in self._open:
            self._open[bucket, split] = records.open_dataset(self.data, "records", bucket, split)
        stored = self._open[bucket, split][index]
        name, caption, place = (stored[key].decode() for key in ("id", "caption", "video"))
        category = stored["category"]
        if not category.any():
            return Clip(name, category, None)
        if earlier and (made := earlier.find(name)):
            return Clip(name, category, None, labels=(made["present"], made["maps"]))
        clip = source.Clip(name, caption, category, int(stored["source"]), place, split)
        row = self._rows.get((split, bucket, index))
        if row and self._moved and self._changed(row, read=True):
            return Clip(name, category, None, f"{place} is another video than the one that was prepared")
        try:
            sample = self._source.read(
                clip, [video.Bucket.parse(bucket)], self.fps, self.manifest["max_upscale"]
            )
        except UserError as error:
            return Clip(name, category, None, str(error))
        return Clip(name, category, sample.frames)

    def show_something(self) -> bool:
        """Whether any clip shows a category. Reads records until it finds one."""
        return any(
            np.frombuffer(stored.read(index)["category"], np.float32).any()
            for own in self.files.values()
            for file in own
            for stored in [records.open_dataset(self.data, "records", file.bucket, file.split)]
            for index in range(file.first, file.first + file.count)
        )

    def sample_evenly(self, count: int) -> Iterator[tuple[RecordFile, Clip]]:
        """The first clip with a phenomenon in each of `count` parts of the data; it may be unreadable."""
        examples = [
            (file, file.first + i) for own in self.files.values() for file in own for i in range(file.count)
        ]
        starts = np.unique(np.linspace(0, len(examples), count, endpoint=False).astype(int))
        for begin, end in itertools.pairwise([*starts, len(examples)]):
            for file, index in examples[begin : min(end, begin + SEARCHED)]:
                clip = self.read(file.bucket, file.split, index)
                if clip.category.any():
                    yield file, clip
                    break


class EarlierLabels:
    """Labels that a folder holds already, found by what they follow from.

    Args:
        out: the folder; it may be empty, or unfinished.
        rows: those of the labels to be made, of `PreparedClips.list_rows`.
    """

    def __init__(self, out: str | Path, rows: Mapping[tuple[str, int], list[dict[str, Any]]] | None) -> None:
        self._out = out
        self._own = [row for part in (rows or {}).values() for row in part]
        self._by_id = {row["id"]: row for row in self._own}
        self._made: dict[tuple, Mapping[str, Any]] = {}
        self._open = functools.lru_cache(None)(functools.partial(records.open_dataset, out, "alignment"))
        if rows and (storage.path(out) / "manifest.json").exists():
            unreadable = {name for name, _ in records.read_manifest(out).get("unreadable", [])}
            made = [row for row in read_clips(out) if row["index"] is not None]
            self._made = {self._key(row): row for row in made if row["id"] not in unreadable}

    @staticmethod
    def _key(row: Mapping[str, Any]) -> tuple:
        return row["sha256"], row["bucket"], tuple(row["category"]), row["frames"]

    def find(self, clip_id: str) -> Mapping[str, Any] | None:
        """The example {"present", "maps"} of a clip; None if it is to be made."""
        row = self._by_id.get(clip_id)
        was = self._made.get(self._key(row)) if row else None
        if was is None:
            return None
        return self._open(was["bucket"], was["split"])[was["index"]]

    def print_changes(self) -> None:
        """Says which clips of a finished folder are labelled anew."""
        if self._made:
            print(f"{self._out} is brought up to date; the labels of other clips are kept")
            anew = [row["id"] for row in self._own if self._key(row) not in self._made]
            records.print_list("clips labelled anew", anew)


def read_ahead(
    reader: ThreadPoolExecutor,
    prepared: PreparedClips,
    file: RecordFile,
    batch: int,
    earlier: EarlierLabels | None = None,
) -> Iterator[list[Clip]]:
    """Yields the clips of a file in order, `batch` at a time, with the next ones being read meanwhile."""

    def read(first: int) -> list[Clip]:
        stop = min(first + batch, file.first + file.count)
        return [prepared.read(file.bucket, file.split, index, earlier) for index in range(first, stop)]

    firsts = range(file.first, file.first + file.count, batch)
    reading = (reader.submit(read, first) for first in firsts)
    for this, _ in itertools.pairwise(itertools.chain(reading, [None])):  # the next one is submitted by now
        yield this.result()


# --- Clips to labels -------------------------------------------------------------------------------


class Labeller:
    """Makes shards of labels: a worker of this command, see `prophy_jax.run.engine`.

    Args:
        config: with `label`.
        model_folder: a Qwen2.5-VL model, or its name on the hub.
        prepared: the clips.
        out: the folder.
        process: the GPU to take, see `vlm.choose_device`.

    Raises:
        UserError: as `open_reader` does.
    """

    def __init__(
        self,
        config: ConfigDict,
        model_folder: str | Path,
        prepared: PreparedClips,
        out: storage.AnyPath,
        process: int,
    ) -> None:
        self._model, self._described, self._reading = open_reader(config, model_folder, process)
        self._config, self._prepared, self._out = config, prepared, out
        self._views = prepared.views(config)

    def tell(self) -> tuple[dict[str, str], "Reading"]:
        """What the manifest says of the model, and its attention that is read."""
        return self._described, self._reading

    def describe_view(self, bucket: str) -> str:
        """See the function of this name."""
        return describe_view(bucket, self._views[bucket], self._model, self._config)

    @functools.cached_property
    def _rows(self) -> dict[tuple[str, int], list[dict[str, Any]]] | None:
        return self._prepared.list_rows()

    @functools.cached_property
    def _earlier(self) -> EarlierLabels:
        return EarlierLabels(self._out, self._rows)

    def label(self, files: Iterable[RecordFile], tick: Callable[[int], Any]) -> Iterator[None]:
        """Makes the labels of files of the records. A thread reads the next clips while the model answers."""
        prepared, config = self._prepared, self._config
        with ThreadPoolExecutor(1) as reader:
            for file in files:
                batches = read_ahead(reader, prepared, file, config.label.batch, self._earlier)
                with make_shard(self._out, file.split, file.index) as shard:
                    sizes, view = prepared.sizes[file.bucket], self._views[file.bucket]
                    label_shard(
                        shard,
                        self._model,
                        batches,
                        file.bucket,
                        sizes,
                        view,
                        self._reading,
                        prepared.known,
                        config,
                        tick,
                    )
                    if self._rows:
                        shard.note(rows=self._rows[file.split, file.index])
                yield


def label_shard(
    shard: Shard,
    model: "Vlm",
    batches: Iterator[list[Clip]],
    bucket: str,
    sizes: Sizes,
    view: "View",
    reading: "Reading",
    known: taxonomy.Taxonomy,
    config: ConfigDict,
    tick: Callable[[int], Any],
) -> None:
    """Asks about the clips of one shard and writes their labels; a clip without a video gets none."""
    from prophy_jax.labels import labelling

    features = records.features("alignment", sizes)
    nothing = known.multi_hot([]), np.zeros((0, sizes.tokens), np.float16)
    unreadable, questions, begin = [], 0, time.perf_counter()
    for clips in batches:
        shown = [clip for clip in clips if clip.frames is not None]
        frames, categories = [clip.frames for clip in shown], [clip.category for clip in shown]
        answers = labelling.ask(model, frames, categories, view, reading, known)
        labels = {
            clip.id: (clip.category, labelling.make_targets(own, view, config.label))
            for clip, own in zip(shown, answers, strict=True)
        }
        labels |= {clip.id: clip.labels for clip in clips if clip.labels is not None}
        for clip in clips:
            present, maps = labels.get(clip.id, nothing)
            example = {"id": clip.id, "present": present, "maps": maps}
            shard.write(f"alignment/{bucket}", features, example)
        unreadable += [[clip.id, clip.problem] for clip in clips if clip.problem]
        questions += sum(map(len, answers))
        tick(len(clips))
    seconds = round(time.perf_counter() - begin, 3)
    shard.note(unreadable=unreadable, questions=questions, seconds=seconds, peak_bytes=peak_bytes())


def peak_bytes() -> int:
    """Most memory this process has held: of the GPUs where there are some, otherwise of the host."""
    import torch

    if torch.cuda.is_available():
        return max(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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


# --- What was made ---------------------------------------------------------------------------------


def describe(
    reports: list[dict[str, Any]],
    prepared: PreparedClips,
    views: Mapping[str, "View"],
    reading: "Reading",
    plan,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Features of every data set, and the manifest, from the reports of all shards; see `Job.finish`."""
    clips = sum(size["count"] for report in reports for size in report["datasets"].values())
    features = {
        f"alignment/{bucket}": records.features("alignment", sizes)
        for bucket, sizes in prepared.sizes.items()
    }
    manifest = {
        **plan,
        "categories": list(prepared.known.names),
        "layers": list(reading.layers),
        "buckets": {
            bucket: {
                "token_grid": list(view.grid),
                "vlm_grid": list(view.shown),
                "frames": view.frames,
                "seconds_per_cell": view.seconds,
            }
            for bucket, view in views.items()
        },
        "clips": clips,
        "questions": sum(report["questions"] for report in reports),
        "unreadable": [tuple(entry) for report in reports for entry in report["unreadable"]],
        "seconds_per_clip": sum(report["seconds"] for report in reports) / max(clips, 1),
        "peak_bytes": max(report["peak_bytes"] for report in reports),
        "versions": records.versions(PACKAGES),
    }
    return features, manifest


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
        propose(config, options.vlm, data, options.propose, options.source, options.threshold)
        return
    if not out and not (own and options.check):
        raise UserError("name the folder to write: --out=DIR")
    if own:
        import_labels(config, own, data, out, options.check)
    elif options.check:
        check(config, options.vlm, f"{out}-check")
    elif options.preview:
        preview(config, options.vlm, data, f"{out}-preview", options.preview, options.source)
    else:
        process = parse_process(options.process)
        label(config, options.vlm, data, out, process, options.source, options.engine, options.devices)


if __name__ == "__main__":
    from prophy_jax import label as command  # by the name that workers elsewhere import it by

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
    cli.run(command.main, __doc__, default="configs/wan.py")
