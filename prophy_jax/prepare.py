"""Command: makes training records from folders of captioned videos, or from the physics sandbox.

    python -m prophy_jax.prepare --config=configs/wan.py --source=WISA --out=DIR
    python -m prophy_jax.prepare --config=configs/wan.py:demo                     # the sandbox

SOURCE is a folder of WISA-80K, a table of videos and captions, or a folder of videos with a text beside each
(docs/data.md); several may be given, and --val=SOURCE names your own validation clips. `config.data` says
which clips are taken, and into which sizes and lengths (buckets) they are cropped; `config.codec` encodes the
videos and `config.text_encoder` the captions. Without --source it draws the clips of `config.data.sandbox`,
and stores their exact token masks as alignment labels.

Any number of processes may share the work, and any of them may be stopped and started again: those of one job
with --distributed, others with --process=0/4 to --process=3/4, the workers of a Ray cluster with --engine=ray
(docs/launch.md). A clip that cannot be used is skipped, counted and listed.

F frames, H W pixels, T h w latent grid, N tokens, E categories.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

import prophy_jax
from prophy_jax.data import records, taxonomy
from prophy_jax.data.batch import Sizes
from prophy_jax.data.cropped import list_cropped, print_cropped, print_dry_run
from prophy_jax.data.earlier import Earlier
from prophy_jax.data.job import Job, make_shard, parse_process
from prophy_jax.data.recording import NOT_FINITE, Spent, decode_ahead, measure_text, print_spent, record_shard
from prophy_jax.data.sources import statistics
from prophy_jax.data.sources.source import Clip, Source, choose, draw_sandbox, read_sources, split_clips
from prophy_jax.data.sources.video import Bucket, share_kept
from prophy_jax.data.taxonomy import Taxonomy
from prophy_jax.run import cli, engine, storage
from prophy_jax.run.errors import UserError, counted
from prophy_jax.run.workdir import run_identity

PACKAGES = ("numpy", "tensorflow-datasets", "array_record", "av", "pillow", "jax", "pymunk")  # shape the data


def prepare(
    config: ConfigDict,
    sources: Sequence[str | Path] = (),
    out: str | Path | None = None,
    process: tuple[int, int] = (0, 1),
    dry_run: bool = False,
    validation: Sequence[str | Path] = (),
    by: str | None = None,
    devices: int = 1,
) -> dict[str, Any] | None:
    """Makes this process's share of a folder of training records (see `prophy_jax.data.records`).

    Args:
        config: with `data`, `codec` and `text_encoder`.
        sources: folders or files of captioned videos; none draws the sandbox.
        out: the folder to make, or to resume; None is `config.data.dir`.
        process: (i, P), which of how many processes this is.
        dry_run: only list the clips, open some of them, and print statistics.
        validation: further sources, whose clips make the validation split.
        by: the engine that encodes, see `prophy_jax.run.engine`; None is this process.
        devices: of each worker of that engine.

    Returns:
        The manifest, as in `out`/manifest.json; None when other processes are still at work, or on a dry run.

    Raises:
        UserError: the folder is of something else, the sources are not usable, or no clip can be read.
    """
    # 1. What there is, and what is taken.
    if validation and not sources:
        raise UserError("--val names validation clips, but no --source those to train on")
    known, buckets = taxonomy.of(config), list_buckets(config.data)
    source, splits = list_clips(config.data, sources, validation, known)
    if dry_run:
        if sources:
            clips = [clip for clips in splits.values() for clip in clips]
            print_dry_run(source, clips, config.data, buckets, known)
        taken = {split: len(clips) for split, clips in splits.items()}
        print(f"{count_clips(taken)} would be taken; nothing was written")
        return None

    # 2. The encoders, and the folder: everything that can be wrong shows before the first clip.
    out = storage.path(out or config.data.dir)
    storage.require_gs(out, "training data")
    make = functools.partial(Recorder, config, source, buckets, known, out, noted=bool(sources))
    with engine.workers(by, make, devices) as workers:
        facts = workers.ask(Recorder.tell)
        size = config.data.shard
        chunks = {
            split: [clips[first : first + size] for first in range(0, max(len(clips), 1), size)]
            for split, clips in splits.items()
        }
        plan = make_plan(config, splits, facts["hashes"], known)
        if not sources and config.data.sandbox.seed:  # earlier versions noted none
            plan["sandbox_seed"] = config.data.sandbox.seed
        earlier = Earlier(out)
        rows = {
            (split, index): [earlier.row(source, clip) for clip in part]
            for split, parts in chunks.items()
            for index, part in enumerate(parts)
        }
        shards = {split: len(parts) for split, parts in chunks.items()}
        job = Job(out, plan, shards, process, rows if sources else None, inputs=("clips_sha256",))
        if sources and not job.complete():
            earlier.print_changes(row for part in rows.values() for row in part)

        # 3. The shards of this process.
        begin = time.perf_counter()
        with job.share() as mine:
            work = [(split, index, chunks[split][index]) for split, index in mine]
            clips = sum(len(chunk) for _, _, chunk in work)
            spent = workers.share(Recorder.record, work, total=clips)
        print_spent(spent, clips, time.perf_counter() - begin)

        # 4. The last process to be done puts the folder together.
        paths = [storage.resolved(path) for path in (*sources, *validation)]
        manifest = job.finish(
            lambda reports: describe(
                out, config, paths, source, reports, facts["grids"], workers.ask(Recorder.encode_empty), known
            )
        )
    if manifest is not None:
        print_summary(out, manifest)
    return manifest


def list_clips(
    data: ConfigDict,
    paths: Sequence[str | Path],
    validation: Sequence[str | Path] = (),
    known: Taxonomy = taxonomy.WISA,
) -> tuple[Source, dict[str, list[Clip]]]:
    """The source, and split -> clips: `data.subset` of them (0: all), drawn by `data.seed`.

    All clips of the sources `validation` are taken, and are not counted in the subset.
    """
    if not paths:
        if known.names != taxonomy.PHENOMENA:
            raise UserError(
                f"the physics sandbox shows phenomena of WISA-80K, not the categories of {known.where}: name "
                "clips with --source=DIR, or leave --config.data.taxonomy empty"
            )
        source = draw_sandbox(data)
        return source, split_clips(source.clips, 0.0, data.seed)
    source = read_sources(paths, data.categories, validation, known)
    for line in source.report.unused:
        print(f"warning: {line}", file=sys.stderr)
    own = [clip for clip in source.clips if clip.source < len(paths)]
    clips = choose(own, data.subset or None, data.seed)
    clips += [clip for clip in source.clips if clip.source >= len(paths)]
    return source, split_clips(clips, data.val_share, data.seed)


def list_buckets(data: ConfigDict) -> list[Bucket]:
    """The main size of `data`, then its further `buckets`, (frames, height, width) each.

    Raises UserError on a rate that is not above 0, and on what is no size.
    """
    if not 0 < data.fps < math.inf:
        raise UserError(f"config.data.fps is {data.fps}; give frames per second above 0, such as 16")
    main = Bucket(data.frames, data.height, data.width)
    for bucket in (main, *data.buckets):
        size = tuple(bucket) if isinstance(bucket, Sequence) else (bucket,)
        if len(size) != 3 or not all(isinstance(own, int) and own > 0 for own in size):
            raise UserError(
                f"{size} is no size of clips: config.data.frames, height and width must be whole numbers "
                "above 0, and each of config.data.buckets three of them, such as (81, 480, 832)"
            )
    return list(dict.fromkeys([main, *(Bucket(*bucket) for bucket in data.buckets)]))


def list_grids(
    config: ConfigDict, codec: Any, buckets: Sequence[Bucket]
) -> dict[Bucket, tuple[tuple[int, ...], tuple[int, int, int]]]:
    """Bucket -> the shape of its latents (T, h, w, 16), and the backbone's token grid of them.

    Raises UserError on a size that the codec or the backbone cannot take.
    """
    from prophy_jax import build, models

    backbone = models.build(config.backbone)
    return {bucket: build.fit(codec, backbone, bucket) for bucket in buckets}


def make_plan(
    config: ConfigDict, splits, hashes: Mapping[str, str], known: Taxonomy = taxonomy.WISA
) -> dict[str, Any]:
    """All that decides what the records hold, and in which shards; `hashes` are those of the encoders."""
    digest = hashlib.sha256()
    for split, clips in splits.items():
        for clip in clips:
            category = clip.category.tolist()
            digest.update(
                json.dumps([split, clip.id, clip.caption, category, clip.source, clip.video]).encode()
            )
    identity = run_identity(config, "data")
    plan = {
        "data": identity["data"],  # which frames; labels hold for no others
        "shard": config.data.shard,
        "codec": identity["codec"],
        "text_encoder": identity["text_encoder"],
        "clips_sha256": digest.hexdigest(),
        "program": prophy_jax.__version__,
    }
    if known.names != taxonomy.PHENOMENA:  # part of the fingerprint: labels hold for no others
        plan["data"] = {**plan["data"], "categories": list(known.names)}
    return plan | hashes


class Recorder:
    """Makes shards of records: a worker of this command, see `prophy_jax.run.engine`.

    Args:
        config: with `data`, `codec` and `text_encoder`.
        source: of the clips.
        buckets: their sizes.
        known: the categories.
        out: the folder.
        noted: whether shards say what they were made of.

    Raises:
        UserError: weights that do not exist or fit, or videos that cannot be seen from here.
    """

    def __init__(
        self,
        config: ConfigDict,
        source: Source,
        buckets: Sequence[Bucket],
        known: Taxonomy,
        out: storage.AnyPath,
        noted: bool,
    ) -> None:
        import jax

        from prophy_jax.run import encoders, parallel

        for path in source.first_files():
            if not storage.path(path).exists():
                raise UserError(
                    f"{path} cannot be seen on {socket.gethostname()}: put the videos on storage that all "
                    "hosts share, under the same path"
                )
        mesh = parallel.make_mesh({"data": -1, "fsdp": 1, "context": 1}, 0, jax.local_devices())
        self._group = mesh.size
        self._codec = encoders.load_codec(config, mesh)
        self._text_encoder = encoders.load_text_encoder(config)
        self._grids = list_grids(config, self._codec, buckets)
        self._data, self._source, self._buckets, self._known = config.data, source, buckets, known
        self._out, self._noted = out, noted

    def tell(self) -> dict[str, Any]:
        """{"grids": as `list_grids` gives them, "hashes": of the encoders' weights}."""
        parts = {"codec_sha256": self._codec, "text_encoder_sha256": self._text_encoder}
        hashes = {key: part.sha256 for key, part in parts.items() if hasattr(part, "sha256")}
        return {"grids": self._grids, "hashes": hashes}

    def encode_empty(self) -> tuple[np.ndarray, np.ndarray]:
        """Text (1, L, D) and mask (1, L) of the empty prompt."""
        return self._text_encoder([""])

    @functools.cached_property
    def _earlier(self) -> Earlier:
        return Earlier(self._out)

    @functools.cached_property
    def _measured(self) -> tuple[dict[Bucket, Sizes], bool]:
        return measure_text(self._grids, *self.encode_empty(), self._known)

    def record(
        self, shards: Iterable[tuple[str, int, Sequence[Clip]]], tick: Callable[[int], Any]
    ) -> Iterator[dict[str, float]]:
        """Makes shards: (split, index, clips) each. Gives the seconds that each took, and for what.

        Threads decode the next clips, also of the next shard, while the devices encode.
        """
        shards = list(shards)
        clips = [clip for _, _, chunk in shards for clip in chunk]
        decoded = decode_ahead(self._source, clips, self._buckets, self._data, self._group, self._earlier)
        with contextlib.closing(decoded):
            for split, index, chunk in shards:
                spent = Spent()
                with make_shard(self._out, split, index) as shard:
                    own = itertools.islice(spent.waiting(decoded, tick), len(chunk))
                    record_shard(
                        shard, own, self._codec, self._text_encoder, *self._measured, self._group, spent
                    )
                    if self._noted:
                        shard.note(rows=[self._earlier.made[clip.id] for clip in chunk])
                yield spent.close()


def describe(
    out: storage.AnyPath,
    config: ConfigDict,
    paths: list[str],
    source: Source,
    reports: list[dict[str, Any]],
    grids: Mapping[Bucket, tuple],
    empty: tuple[np.ndarray, np.ndarray],
    known: Taxonomy,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Features of every data set, and the manifest, from the reports of all shards; see `Job.finish`.

    Writes `empty`, the encoded empty prompt, and the statistics too.
    """
    skipped = [tuple(entry) for report in reports for entry in report["skipped"]]
    counts = {split: 0 for split in dict.fromkeys(report["split"] for report in reports)}
    buckets: dict[str, dict[str, Any]] = {}
    places = {}
    for report in reports:
        for dataset, size in report["datasets"].items():
            kind, bucket = dataset.split("/")
            if kind == "records":
                counts[report["split"]] += size["count"]
                found = buckets.setdefault(bucket, {"counts": dict.fromkeys(counts, 0), "bytes": 0})
                found["counts"][report["split"]] += size["count"]
                found["bytes"] += size["bytes"]
                places |= dict.fromkeys(report["ids"][dataset], Bucket.parse(bucket))
    if not buckets:
        clips = sum(len(report["skipped"]) for report in reports)
        remedy = ""
        if any(reason == NOT_FINITE for _, reason in skipped):
            remedy = (
                "; --config.codec.dtype=float32, --config.text_encoder.dtype=float32 or other weights "
                "(config.codec_params, config.text_encoder_params) may help"
            )
        raise UserError(
            f"none of the {counted(clips, 'video')} can be used; the first: {skipped[0][1]}{remedy}"
        )

    text, mask = empty
    sizes, padding = measure_text(grids, text, mask, known)
    storage.write_atomically(out / "empty_text.npz", lambda file: np.savez(file, text=text[0], mask=mask[0]))
    rows = [row for report in reports for row in report.get("rows", []) if row["id"] in places]
    shown = {row["id"]: row["shown"] for row in rows if row.get("shown")}
    if paths:
        stats = statistics.summarise(
            source, known, [share_kept(*size, places[name]) for name, size in shown.items()]
        )
        storage.write_atomically(out / "statistics.md", statistics.table(stats))
        storage.write_atomically(out / "statistics.png", lambda file: statistics.picture(stats, file))

    features = {}
    aligned = any(dataset.startswith("alignment/") for report in reports for dataset in report["datasets"])
    for bucket in sorted(buckets):
        own = sizes[Bucket.parse(bucket)]
        buckets[bucket] |= {"latent_shape": list(own.latent_shape), "token_grid": list(own.token_grid)}
        features[f"records/{bucket}"] = records.features("records", own, [] if padding else ["text_mask"])
        if aligned:
            features[f"alignment/{bucket}"] = records.features("alignment", own)
    identity, listing = run_identity(config, "data"), source.report
    moments = sum(np.array(report["moments"]) for report in reports)
    mean = moments[1] / moments[0]
    labels = {
        label: {"clips": count, "first": listing.examples[label]}
        for label, count in listing.unknown_labels.most_common()
    }
    manifest = {
        "sources": paths,
        "counts": counts,
        "categories": list(known.names),
        "stand_in": [report["split"] for report in reports if "stands_in" in report],
        "buckets": {bucket: buckets[bucket] for bucket in sorted(buckets)},
        "video": {key: value for key, value in identity["data"].items() if key != "max_upscale"},
        "max_upscale": identity["data"]["max_upscale"],
        "codec": identity["codec"],
        "text_encoder": identity["text_encoder"],
        "sandbox": config.data.sandbox.to_dict() if not paths else None,
        "text_length": text.shape[1],
        "text_dim": text.shape[2],
        "empty_text_sha256": hashlib.sha256(text.astype("<f4").tobytes()).hexdigest(),
        # The codec normalises; these, measured on all splits, say how well.
        "latent_mean": mean.round(4).tolist(),
        "latent_std": np.sqrt(np.maximum(moments[2] / moments[0] - mean**2, 0)).round(4).tolist(),
        "cropped": list_cropped(shown, places),
        "captions_cut": {name: lost for report in reports for name, lost in report["captions_cut"].items()},
        "records_listed": listing.records,
        "skipped": [*listing.skipped, *skipped],
        "labels_not_understood": labels,
        "unannotated": [name for name in listing.unannotated if name in places],
        "label_not_among_answers": [name for name in listing.label_differs if name in places],
        "versions": records.versions(PACKAGES),
    }
    return features, manifest


def count_clips(counts: Mapping[str, int]) -> str:
    """Such as "3 clips (train 2, val 1)"."""
    listed = ", ".join(f"{split} {number:,}" for split, number in counts.items())
    return f"{counted(sum(counts.values()), 'clip')} ({listed})"


def print_summary(out: storage.AnyPath, manifest: dict[str, Any]) -> None:
    """Prints what was made, and what was left out."""
    counts = manifest["counts"]
    print(f"{out}: {count_clips(counts)}")
    for bucket, found in manifest["buckets"].items():
        clips = counted(sum(found["counts"].values()), "clip")
        print(f"  {bucket}: {clips} of latents {tuple(found['latent_shape'])}")
    for split in manifest["stand_in"]:
        other = "val" if split == "train" else "train"
        print(f"no clip of split {split!r} can be used: it holds the same clips as {other!r}")
    records.print_list("skipped", [f"{name}: {reason}" for name, reason in manifest["skipped"]])
    print_cropped(manifest.get("cropped", ()), manifest["video"], " in manifest.json")
    records.print_list(
        "labels not understood",
        [
            f"{label} in {found['clips']}, first {found['first']}"
            for label, found in manifest["labels_not_understood"].items()
        ],
    )
    records.print_list("clips without a category", manifest["unannotated"])
    if manifest["unannotated"]:
        print(
            "  they train the diffusion loss alone; categories can be proposed from captions: "
            "label --propose (docs/data.md)"
        )
    records.print_list("clips whose label is not among their answers", manifest["label_not_among_answers"])
    records.print_list(
        f"captions cut to {manifest['text_length']} text rows",
        [f"{name}: {counted(lost, 'word')} lost" for name, lost in manifest["captions_cut"].items()],
    )


def main(config: ConfigDict) -> None:
    """The command, with its flags parsed."""
    options = flags.FLAGS
    if options.engine and (options.process or options.distributed):
        raise UserError("--engine shares the work by itself: leave out --process and --distributed")
    if options.process:
        process = parse_process(options.process)
    elif options.dry_run or options.engine:  # the devices are the workers'
        process = (0, 1)
    else:
        import jax

        process = (jax.process_index(), jax.process_count())
    prepare(
        config,
        options.source,
        options.out,
        process,
        options.dry_run,
        options.val,
        options.engine,
        options.devices,
    )


if __name__ == "__main__":
    from prophy_jax import prepare as command  # by the name that workers elsewhere import it by

    # Defined here, so that importing several commands into one program does not define flags twice.
    flags.DEFINE_multi_string(
        "source", [], "Folder or file of captioned videos; may be repeated; without it, the sandbox."
    )
    flags.DEFINE_multi_string(
        "val", [], "Folder or file of your own validation clips; may be repeated; none is drawn then."
    )
    flags.DEFINE_string("out", None, "Folder to write, or to resume; default: config.data.dir.")
    flags.DEFINE_string("process", None, "I/P: which of how many processes this is, such as 0/4.")
    flags.DEFINE_string("engine", None, engine.HELP)
    flags.DEFINE_integer("devices", 1, engine.DEVICES_HELP, lower_bound=1)
    flags.DEFINE_bool(
        "dry_run", False, "Write nothing: only list the clips, open some, and print statistics."
    )
    cli.run(command.main, __doc__, distributed=True)
