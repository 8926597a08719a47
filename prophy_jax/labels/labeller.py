"""A worker that makes the labels of files of the records, and what is said of them when all are made.

N tokens, E categories, P of a clip.
"""

import functools
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from prophy_jax.data import records, taxonomy
from prophy_jax.data.batch import Sizes
from prophy_jax.data.job import Shard, make_shard
from prophy_jax.labels.earlier import EarlierLabels
from prophy_jax.labels.opening import describe_view, open_reader
from prophy_jax.labels.prepared import Clip, PreparedClips, RecordFile, read_ahead
from prophy_jax.run import storage

if TYPE_CHECKING:
    from prophy_jax.labels.labelling import View
    from prophy_jax.labels.vlm import Reading, Vlm

PACKAGES = ("numpy", "torch", "transformers", "tokenizers", "pillow", "av")  # these shape the labels


class Labeller:
    """Makes shards of labels: a worker, see `prophy_jax.run.engine`.

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
