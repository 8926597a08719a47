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

import collections
import concurrent.futures
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
from prophy_jax.data.job import Job, Shard, make_shard, parse_process, read_clips
from prophy_jax.data.sources import statistics
from prophy_jax.data.sources.source import (
    Clip,
    Sample,
    Source,
    choose,
    draw_sandbox,
    read_sources,
    split_clips,
)
from prophy_jax.data.sources.video import Bucket, choose_size, share_kept
from prophy_jax.data.taxonomy import Taxonomy
from prophy_jax.run import cli, engine, storage
from prophy_jax.run.errors import NotFinite, UserError, counted
from prophy_jax.run.workdir import run_identity

PACKAGES = ("numpy", "tensorflow-datasets", "array_record", "av", "pillow", "jax", "pymunk")  # shape the data
KEPT = 0.6  # clips that keep less of their picture are listed
NOT_FINITE = "the encoder gave values that are not finite"  # why a clip is skipped
OPENED = 200  # clips that a dry run looks into
READING, ENCODING, WHOLE = "reading videos", "encoding", "in all"  # what time goes to
THREADS = 8  # that decode; FFmpeg decodes each video with several threads of its own


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
            print_dry_run(source, [clip for clips in splits.values() for clip in clips], config.data, known)
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


class Earlier:
    """What a folder holds already, by the content of its clips; see `prophy_jax.data.job.read_clips`.

    Attributes:
        made: id -> row of each clip that `read` was asked for.
    """

    def __init__(self, out: storage.AnyPath) -> None:
        self._out = out
        self._rows = read_clips(out)
        self._finished = (out / "manifest.json").exists()
        seen = [*self._rows, *read_clips(out, working=True)]
        self._by_place = {(row["source"], row["video"]): row for row in seen}
        self._by_content = {row["sha256"]: row for row in self._rows if self._finished and row["sha256"]}
        self._open = functools.lru_cache(None)(functools.partial(records.open_dataset, out, "records"))
        self.made: dict[str, dict[str, Any]] = {}

    def row(self, source: Source, clip: Clip, read: bool = False) -> dict[str, Any]:
        """What a clip's record is made of. Without `read` the content of a new clip is left open."""
        known = self._by_place.get((clip.source, clip.video))
        content = source.content(clip, known) if known or read else {}
        return {
            "id": clip.id,
            "source": clip.source,
            "video": clip.video,
            "caption": hashlib.sha256(clip.caption.encode()).hexdigest()[:16],
            "category": [int(e) for e in np.flatnonzero(clip.category)],
            "sha256": content.get("sha256"),
            "stamp": content.get("stamp"),
        }

    def read(self, source: Source, clip: Clip) -> Sample | str | None:
        """The clip as it was encoded earlier, or why it was skipped; None if it must be read."""
        row = self.made[clip.id] = self.row(source, clip, read=True)
        was = self._by_content.get(row["sha256"])
        if was is None or was["bucket"] is None:
            return None
        row["shown"] = was.get("shown")
        stored = self._open(was["bucket"], was["split"])[was["index"]]
        text = stored["text"], stored.get("text_mask")
        same = stored["caption"].decode() == clip.caption
        return Sample(
            None, Bucket.parse(was["bucket"]), latents=stored["latents"], text=text if same else None
        )

    def print_changes(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Says which clips differ from those of a finished folder."""
        if not self._finished or not self._rows:
            return
        was, now = {row["id"]: row for row in self._rows}, {row["id"]: row for row in rows}
        both = now.keys() & was.keys()

        def differ(key: str) -> list[str]:
            return [name for name in now if name in both and now[name][key] not in (None, was[name][key])]

        print(f"{self._out} is brought up to date; what is not listed here is kept")
        records.print_list("clips added", [name for name in now if name not in both])
        records.print_list("clips removed", [name for name in was if name not in both])
        records.print_list("videos replaced", differ("sha256"))
        moved = [name for name in now if name in both and now[name]["sha256"] is None]
        records.print_list("videos moved, encoded anew only if their content has changed", moved)
        records.print_list("captions changed", differ("caption"))
        records.print_list("categories changed", differ("category"))


# --- Clips to records ------------------------------------------------------------------------------


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
    def _earlier(self) -> "Earlier":
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


def decode_ahead(
    source: Source,
    clips: Sequence[Clip],
    buckets: Sequence[Bucket],
    data,
    devices: int,
    earlier: Earlier | None = None,
) -> Iterator[tuple[Clip, Sample | str]]:
    """Gives (clip, sample, or why there is none) in order, decoding in threads ahead of the reader.

    At most THREADS + 2 `devices` decoded clips wait at a time. `close` ends the threads. What `earlier` has
    of the same content is taken from there.
    """
    import grain

    def read(clip: Clip) -> tuple[Clip, Sample | str]:
        try:
            if earlier and (taken := earlier.read(source, clip)):
                return clip, taken
            sample = source.read(clip, buckets, data.fps, data.max_upscale)
            if earlier:
                earlier.made[clip.id]["shown"] = sample.shown
            return clip, sample
        except UserError as error:
            return clip, str(error)

    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=THREADS + 2 * devices)
    return iter(grain.MapDataset.source(clips).map(read).to_iter_dataset(options))


def measure_text(
    grids: Mapping[Bucket, tuple], text: np.ndarray, mask: np.ndarray, known: Taxonomy
) -> tuple[dict[Bucket, Sizes], bool]:
    """Bucket -> sizes, and whether the rows behind the words are not zero: part of the text then.

    `text` (1, L, D) and `mask` (1, L) are of the empty prompt.
    """
    sizes = {bucket: Sizes(*shapes, *text.shape[1:], len(known.names)) for bucket, shapes in grids.items()}
    return sizes, bool(text[~mask].any())


def record_shard(
    shard: Shard,
    clips: Iterable,
    codec: Any,
    text_encoder: Any,
    sizes: Mapping[Bucket, Sizes],
    padding: bool,
    group: int,
    spent: "Spent",
) -> None:
    """Encodes the clips of one shard, `group` of a bucket at a time, and writes their records.

    How they are grouped depends on the shard alone, so that its bytes do too. `sizes` and `padding` are those
    of `measure_text`.
    """
    waiting: dict[Bucket, list] = collections.defaultdict(list)
    channels = next(iter(sizes.values())).latent_shape[-1]
    moments = np.zeros((3, channels))  # count, sum, sum of squares, per channel
    skipped, captions_cut = [], {}

    def flush(bucket: Bucket) -> None:
        nonlocal moments
        batch = waiting.pop(bucket)
        with spent.on(ENCODING):
            latents = [sample.latents for _, sample in batch]
            if fresh := [row for row, own in enumerate(latents) if own is None]:
                frames = np.stack([batch[row][1].frames for row in fresh])
                encoded = codec.encode(frames)  # (b, T, h, w, 16)
                for row, own in zip(fresh, encoded, strict=True):
                    latents[row] = own
            captions = [sample.caption or clip.caption for clip, sample in batch]
            wrong: list[int] = []  # rows of captions that the encoder makes NaN or infinity of
            if any(sample.text is None for _, sample in batch):
                try:
                    text, mask = text_encoder(captions)
                except NotFinite as error:
                    wrong = error.rows
                    text, mask = text_encoder(["" if n in wrong else own for n, own in enumerate(captions)])
        for row, (clip, sample) in enumerate(batch):
            written = None
            if sample.text is not None:
                rows = sample.text
            else:
                rows = (text[row], mask[row]) if padding else (text[row][mask[row]], None)
            if sample.text is not None or row not in wrong:
                written = write_record(shard, clip, sample, captions[row], latents[row], *rows, sizes[bucket])
            if written is None:
                skipped.append([clip.id, NOT_FINITE])
                continue
            moments = moments + written
            if lost := text_encoder.words_lost(captions[row]):
                captions_cut[clip.id] = lost

    for clip, sample in clips:
        if isinstance(sample, str):
            skipped.append([clip.id, sample])
            continue
        waiting[sample.bucket].append((clip, sample))
        if len(waiting[sample.bucket]) == group:
            flush(sample.bucket)
    for bucket in list(waiting):
        flush(bucket)
    shard.note(skipped=skipped, captions_cut=captions_cut, moments=moments.tolist())


def write_record(
    shard: Shard,
    clip: Clip,
    sample: Sample,
    caption: str,
    latents: np.ndarray,
    text: np.ndarray,
    text_mask: np.ndarray | None,
    sizes: Sizes,
) -> np.ndarray | None:
    """Writes one clip; alignment too where it has masks. Returns count, sum and sum of squares (3, 16).

    text (n, D); text_mask (n,) where its rows are not all words. Where a number is not finite in float16,
    nothing is written, and None is returned.
    """
    with np.errstate(over="ignore"):
        stored = latents.astype(np.float16), text.astype(np.float16)
    if not all(np.isfinite(array).all() for array in stored):
        return None
    category = clip.category if sample.category is None else sample.category
    shard.write(
        f"records/{sample.bucket}",
        records.features("records", sizes, [] if text_mask is not None else ["text_mask"]),
        {
            "id": clip.id,
            "caption": caption,
            "source": clip.source,
            "video": clip.video,
            "latents": stored[0],
            "text": stored[1],
            "category": category,
        }
        | ({} if text_mask is None else {"text_mask": text_mask.astype(np.uint8)}),
    )
    if sample.masks is not None:
        masks = mean_over_tokens(sample.masks, sizes.token_grid)
        shard.write(
            f"alignment/{sample.bucket}",
            records.features("alignment", sizes),
            {"id": clip.id, "present": category, "maps": masks.T[category > 0].astype(np.float16)},
        )
    values = latents.reshape(-1, latents.shape[-1]).astype(np.float64)  # (T*h*w, 16)
    return np.stack([np.full(values.shape[1], len(values)), values.sum(0), np.square(values).sum(0)])


def mean_over_tokens(masks: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """Masks (T, G, G, E) -> (N, E), the mean over what each token of the grid covers."""
    if any(own % tokens for own, tokens in zip(masks.shape, grid, strict=False)):
        raise UserError(
            f"the sandbox has masks of {masks.shape[:3]} cells, no multiple of the backbone's tokens {grid}; "
            "choose a codec of stride 4 in time and space, and patches of at least (1, 2, 2)"
        )
    t, h, w = (own // tokens for own, tokens in zip(masks.shape, grid, strict=False))
    cells = masks.reshape(grid[0], t, grid[1], h, grid[2], w, -1)  # (T', t, H', h, W', w, E)
    return cells.mean((1, 3, 5), np.float32).reshape(-1, masks.shape[-1])  # (T', H', W', E) -> (N, E)


class Spent:
    """The seconds that something takes, in all (WHOLE) and for what."""

    def __init__(self) -> None:
        self._seconds = {READING: 0.0, ENCODING: 0.0}
        self._start = time.perf_counter()

    def waiting(self, decoded: Iterator, tick: Callable[[int], Any]) -> Iterator:
        """The items of `decoded`, with tick(1) for each."""
        while True:
            with self.on(READING):
                item = next(decoded, None)
            if item is None:
                return
            tick(1)
            yield item

    @contextlib.contextmanager
    def on(self, what: str) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self._seconds[what] += time.perf_counter() - before

    def close(self) -> dict[str, float]:
        return {**self._seconds, WHOLE: time.perf_counter() - self._start}


def print_spent(spent: Sequence[Mapping[str, float]], clips: int, seconds: float) -> None:
    """Says how long `clips` clips took, and for what; `spent` is of their shards."""
    if clips:
        whole = sum(own[WHOLE] for own in spent)
        reading, encoding = (sum(own[what] for own in spent) / whole for what in (READING, ENCODING))
        share = f"{reading:.0%} of the time went to {READING}, {encoding:.0%} to {ENCODING}"
        print(f"{counted(clips, 'clip')} in {seconds:.0f} s, {seconds / clips:.2f} s each: {share}")


# --- How much of the pictures is kept --------------------------------------------------------------


def list_cropped(shown: Mapping[str, tuple[int, int]], places: Mapping[str, Bucket]) -> list[list]:
    """[id, (height, width) shown, bucket] of clips that keep less than KEPT of their picture, worst first."""
    kept = {name: share_kept(*size, places[name]) for name, size in shown.items()}
    worst = sorted((share, name) for name, share in kept.items() if share < KEPT)
    return [[name, list(shown[name]), str(places[name])] for _, name in worst]


def print_cropped(cropped: Sequence[Sequence], data: Mapping[str, Any], where: str) -> None:
    """Prints what `list_cropped` gave, and what to do about it; `data` is that of the configuration."""
    lines, aspects = [], []
    for name, (height, width), bucket in cropped:
        kept = share_kept(height, width, Bucket.parse(bucket))
        lines.append(f"{name}: {kept:.0%}, shown as {height} x {width} (H x W), cropped to {bucket}")
        aspects.append(height / width)
    records.print_list(f"warning: clips that keep less than {KEPT:.0%} of their picture", lines, where)
    if not lines:
        return
    main = Bucket(*(data[key] for key in ("frames", "height", "width")))
    others = [Bucket(*bucket) for bucket in data.get("buckets", ())]
    # The main size, turned, if that suits them; else their median shape of about as many pixels.
    aspect, area = sorted(aspects)[len(aspects) // 2], main.height * main.width
    own = Bucket(main.frames, main.width, main.height)
    if share_kept(aspect, 1, own) < 0.9:
        sides = (max(16, 16 * round(math.sqrt(area * ratio) / 16)) for ratio in (aspect, 1 / aspect))
        own = Bucket(main.frames, *sides)
    buckets = f"--config.data.buckets='{tuple(map(tuple, dict.fromkeys((*others, own))))}'"
    print(f"  if the model takes other sizes, give them a bucket of their own: {buckets}")


def print_dry_run(source: Source, clips: Sequence[Clip], data: ConfigDict, known: Taxonomy) -> None:
    """Prints statistics, what is skipped, and how some clips, spread over all, would be cropped."""
    chosen = clips[:: -(-len(clips) // OPENED)] if clips else []
    buckets, sizes, places, unusable = list_buckets(data), {}, {}, []

    def look(clip: Clip) -> tuple[int, int] | str | None:
        try:
            return source.shown(clip)
        except UserError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        for clip, shown in zip(chosen, threads.map(look, chosen), strict=True):
            if isinstance(shown, str):
                unusable.append(f"{clip.id}: {shown}")
            elif shown and (size := choose_size(*shown, buckets, data.max_upscale)):
                sizes[clip.id], places[clip.id] = shown, Bucket(data.frames, *size)
            elif shown:
                unusable.append(f"{clip.id}: too small: {shown[0]} x {shown[1]} pixels (H x W)")
    kept = [share_kept(*shown, places[name]) for name, shown in sizes.items()]
    print(statistics.table(statistics.summarise(source, known, kept)))
    print(f"opened {counted(len(chosen), 'clip')}")
    records.print_list("of these cannot be used", unusable, "")
    print_cropped(list_cropped(sizes, places), data, "")
    records.print_list("skipped", [f"{name}: {reason}" for name, reason in source.report.skipped], "")


# --- What was made ---------------------------------------------------------------------------------


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
        print(f"no clip of split {split!r} can be used: clips of the other stand in, so that they overlap")
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
