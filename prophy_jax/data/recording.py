"""Clips to records: decoded in threads, encoded, and written shard by shard.

F frames, H W pixels, T h w latent grid, N tokens, E categories.
"""

import collections
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from prophy_jax.data import records
from prophy_jax.data.batch import Sizes
from prophy_jax.data.earlier import Earlier
from prophy_jax.data.job import Shard
from prophy_jax.data.sources.source import Clip, Sample, Source
from prophy_jax.data.sources.video import Bucket
from prophy_jax.data.taxonomy import Taxonomy
from prophy_jax.run.errors import NotFinite, UserError, counted, shortage

NOT_FINITE = "the encoder gave values that are not finite"  # why a clip is skipped
READING, ENCODING, WHOLE = "reading videos", "encoding", "in all"  # what time goes to
THREADS = 8  # that decode; FFmpeg decodes each video with several threads of its own


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
            if shortage(error):
                raise
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
