"""Training records on disk: what `prophy_jax.prepare` writes and `prophy_jax.data.loader` reads.

    DATA_DIR/manifest.json     what the records are and how they were made
    DATA_DIR/empty_text.npz    the encoded empty prompt (text, mask), for caption dropout
    DATA_DIR/records/          TFDS data set "records": id, caption, latents, text, category
    DATA_DIR/alignment/        TFDS data set "alignment", same order: id, alignment, present;
                               absent when there are no token labels
    DATA_DIR/sandbox/          the drawn clips, same order, when the physics sandbox is the source

All data sets are TFDS in array_record format with one record per group (random access), written
and read without TensorFlow.

F frames, H W pixels, T h w latent grid, G tokens a side, N tokens, L text length, n <= L valid rows
of one text, D text width.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from prophy_jax.data import taxonomy
from prophy_jax.errors import UserError

SCHEMA_VERSION = 1
SPLITS = ("train", "val", "test")
SHARD_BYTES = 1 << 30
PATCH = 2  # latent pixels a side of one token, on every supported backbone
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


def record_features(latent_shape: Sequence[int], text_dim: int) -> tfds.features.FeaturesDict:
    """Features of "records": latents (T, h, w, 16) and text (n, D) float32, category (17,)."""
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "caption": tfds.features.Text(),
            "latents": tfds.features.Tensor(shape=tuple(latent_shape), dtype=np.float32, encoding="bytes"),
            "text": tfds.features.Tensor(shape=(None, text_dim), dtype=np.float32, encoding="bytes"),
            "category": tfds.features.Tensor(shape=(taxonomy.NUM_PHENOMENA,), dtype=np.float32),
        }
    )


def alignment_features(num_tokens: int) -> tfds.features.FeaturesDict:
    """Features of "alignment": alignment (N, 17) and present (17,) float32."""
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "alignment": tfds.features.Tensor(  # mostly zeros: compressed
                shape=(num_tokens, taxonomy.NUM_PHENOMENA), dtype=np.float32, encoding="zlib"
            ),
            "present": tfds.features.Tensor(shape=(taxonomy.NUM_PHENOMENA,), dtype=np.float32),
        }
    )


@contextlib.contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Yields a temporary folder: on success it is renamed to `out`, on failure it is removed.

    Raises:
        UserError: `out` exists, or cannot be created.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} already exists; remove it or choose another --out")
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        message = f"cannot create {partial} ({error.strerror}); choose another --out"
        raise UserError(message) from error
    try:
        yield partial
        if out.exists():  # rename would replace an empty folder made in the meantime
            raise UserError(f"{out} appeared while it was being prepared; choose another --out")
        partial.rename(out)
    except BaseException:  # also on Ctrl-C: never leave half a data set behind
        shutil.rmtree(partial, ignore_errors=True)
        raise


class Writer:
    """Streams the examples of one TFDS data set into `folder`; `close` completes it.

    Attributes:
        counts: split -> number of examples written.
    """

    def __init__(self, folder: Path, name: str, features: tfds.features.FeaturesDict) -> None:
        self.counts: dict[str, int] = {}
        self._folder = folder
        self._name = name
        self._features = features
        self._shards: dict[str, list[list[int]]] = defaultdict(list)  # split -> [examples, bytes]
        self._files: dict[str, array_record_module.ArrayRecordWriter] = {}  # open shard per split
        folder.mkdir(parents=True)

    def _unfinished(self, split: str, shard: int) -> Path:
        return self._folder / f"{split}-{shard:05d}"  # the final name has the number of shards

    def write(self, split: str, example: Mapping[str, Any]) -> None:
        """Appends one example. Raises ValueError when it does not match the features."""
        data = self._features.serialize_example(example)
        shards = self._shards[split]
        if not shards or shards[-1][1] + len(data) > SHARD_BYTES:
            if shards:
                self._files[split].close()
            path = self._unfinished(split, len(shards))
            self._files[split] = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
            shards.append([0, 0])
        self._files[split].write(data)
        shards[-1][0] += 1
        shards[-1][1] += len(data)
        self.counts[split] = self.counts.get(split, 0) + 1

    def close(self) -> None:
        """Closes the shards, gives them their final names and writes the TFDS metadata."""
        template = tfds.core.ShardedFileTemplate(
            data_dir=self._folder,
            dataset_name=self._name,
            filetype_suffix="array_record",
            template=_TEMPLATE,
        )
        infos = []
        for split, shards in self._shards.items():
            self._files[split].close()
            names = template.replace(split=split)
            for index in range(len(shards)):
                final = names.sharded_filepath(shard_index=index, num_shards=len(shards))
                self._unfinished(split, index).rename(final)
            infos.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[examples for examples, _ in shards],
                    num_bytes=sum(size for _, size in shards),
                    filename_template=names,
                )
            )
        tfds.folder_dataset.write_metadata(
            data_dir=self._folder,
            features=self._features,
            split_infos=infos,
            filename_template=template,
            check_data=False,  # the check needs TensorFlow
        )


class Recorder:
    """Encodes clips one by one and writes them as records; as alignment too where masks exist."""

    def __init__(self, folder: Path, codec: Any, text_encoder: Any) -> None:
        self._folder = folder
        self._codec = codec
        self._text_encoder = text_encoder
        self._writers: dict[str, Writer] = {}
        self._latent_shape: tuple[int, ...] = ()
        self._moments = np.zeros((3, 1))  # count, sum, sum of squares, per channel
        self._captions_cut: dict[str, int] = {}  # clip id -> words lost

    def _writer(self, name: str, features: tfds.features.FeaturesDict) -> Writer:
        if name not in self._writers:
            self._writers[name] = Writer(self._folder / name, name, features)
        return self._writers[name]

    def write(
        self,
        split: str,
        clip_id: str,
        caption: str,
        frames: np.ndarray,
        category: np.ndarray,
        masks: np.ndarray | None = None,
    ) -> None:
        """Adds one clip: frames (F, H, W, 3) uint8, category (17,), masks (T, G, G, 17) or None."""
        latents = self._codec.encode(frames)
        self._latent_shape = latents.shape
        text, mask = self._text_encoder([caption])
        lost = self._text_encoder.words_lost(caption)
        if lost:
            self._captions_cut[clip_id] = lost
        features = record_features(latents.shape, text.shape[-1])
        self._writer("records", features).write(
            split,
            {
                "id": clip_id,
                "caption": caption,
                "latents": latents,
                "text": text[0][mask[0]],
                "category": category,
            },
        )
        if split == "train":
            values = latents.reshape(-1, latents.shape[-1]).astype(np.float64)  # (T*h*w, 16)
            sums = [np.full(values.shape[1], len(values)), values.sum(0), np.square(values).sum(0)]
            self._moments = self._moments + np.stack(sums)
        if masks is not None:
            times, height, width, _ = latents.shape
            if masks.shape[:3] != (times, height // PATCH, width // PATCH):
                raise UserError(
                    f"the sandbox has token masks {masks.shape[:3]}, but config.codec gives "
                    f"latents {latents.shape}; choose a codec of stride 4 in time and space"
                )
            alignment = masks.reshape(-1, masks.shape[-1]).astype(np.float32)  # (N, 17)
            features = alignment_features(len(alignment))
            self._writer("alignment", features).write(
                split, {"id": clip_id, "alignment": alignment, "present": category}
            )

    def close(self) -> dict[str, Any]:
        """Completes the data sets and the empty prompt; returns their part of the manifest."""
        for writer in self._writers.values():
            writer.close()
        text, mask = self._text_encoder([""])
        np.savez(self._folder / "empty_text.npz", text=text[0], mask=mask[0])
        times, height, width, _ = self._latent_shape
        count, total, squares = self._moments
        mean = total / count
        deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
        counts = self._writers["records"].counts
        return {
            "counts": {split: counts[split] for split in SPLITS if split in counts},
            "latent_shape": list(self._latent_shape),
            "num_tokens": times * (height // PATCH) * (width // PATCH),
            "text_length": text.shape[1],
            "text_dim": text.shape[2],
            "empty_text_sha256": hashlib.sha256(text.astype("<f4").tobytes()).hexdigest(),
            # The codec normalises; these, measured on the training split, say how well.
            "latent_mean": mean.round(4).tolist(),
            "latent_std": deviation.round(4).tolist(),
            "captions_cut": self._captions_cut,
        }


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes DATA_DIR/manifest.json with the schema version first."""
    text = json.dumps({"schema_version": SCHEMA_VERSION, **manifest}, indent=2)
    (folder / "manifest.json").write_text(text + "\n", encoding="utf-8")


def read_manifest(data_dir: str | Path) -> dict[str, Any]:
    """The manifest of `data_dir`; UserError when it is absent, damaged or of another schema."""
    path = Path(data_dir) / "manifest.json"
    if not path.is_file():
        raise UserError(
            f"no training data at {data_dir}; make it with: "
            f"python -m prophy_jax.prepare --config=... --out={data_dir}"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged; prepare the data again") from error
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {version}, this program reads version {SCHEMA_VERSION}; "
            "prepare the data again"
        )
    return manifest


def open_source(data_dir: str | Path, name: str, split: str) -> Sequence[Mapping[str, Any]]:
    """The random-access examples of one split of data set `name`, such as "records".

    Raises:
        UserError: the split does not exist or one of its files is missing.
    """
    folder = Path(data_dir) / name
    builder = tfds.builder_from_directory(folder)
    if split not in builder.info.splits:
        raise UserError(f"{folder} has no split {split!r}; it has {sorted(builder.info.splits)}")
    for path in builder.info.splits[split].filepaths:
        if not path.exists():
            raise UserError(f"{path} is missing; prepare the data again")
    return builder.as_data_source(split)
