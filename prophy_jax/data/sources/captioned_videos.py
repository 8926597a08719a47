"""Captioned videos as a TFDS data set: captions, categories and where the videos are.

The pixels stay in the video files, as a hundredth of the bytes that they would have as arrays:
`prophy_jax.data.sources.source.Source.read` decodes them.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from prophy_jax.data import taxonomy
from prophy_jax.data.sources.source import CaptionedVideos, read_sources


class Builder(tfds.core.GeneratorBasedBuilder):
    """The clips of a source in its order, as one split "train"; see `build`."""

    name = "captioned_videos"
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, source: CaptionedVideos, **kwargs: Any):
        self._source = source
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Captioned videos with the physical phenomena that they show.",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "caption": tfds.features.Text(),
                    "category": tfds.features.Tensor(shape=(taxonomy.NUM_PHENOMENA,), dtype=np.float32),
                    "source": tfds.features.Scalar(np.int64),  # index of its source
                    "video": tfds.features.Text(),  # where, relative to its source
                    "annotation": tfds.features.Text(),  # its whole record, JSON
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (clip, record) in enumerate(self._source.annotations()):
            yield (
                index,
                {
                    "id": clip.id,
                    "caption": clip.caption,
                    "category": clip.category,
                    "source": clip.source,
                    "video": clip.video,
                    "annotation": json.dumps(record),
                },
            )


def build(
    sources: str | Path | Sequence[str | Path], data_dir: str | Path, categories: str = "answers"
) -> Builder:
    """Writes the data set under `data_dir`, or finds it there, and returns its builder.

    The folder is named by a hash of what it holds, so that a source that changed makes a new one.
    Read it with `builder.as_data_source("train")`.

    Args:
        sources: as `prophy_jax.data.sources.source.read_sources`.
        data_dir: where data sets lie.
        categories: as `read_sources`.

    Raises:
        UserError: as `read_sources`.
    """
    source = read_sources(sources, categories)
    digest = hashlib.sha256()
    for clip, record in source.annotations():
        content = [clip.id, clip.caption, clip.category.tolist(), clip.source, clip.video, record]
        digest.update(json.dumps(content).encode())
    config = tfds.core.BuilderConfig(name=f"sha256-{digest.hexdigest()[:16]}")
    builder = Builder(source, data_dir=data_dir, config=config, file_format="array_record")
    builder.download_and_prepare()
    return builder
