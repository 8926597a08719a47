"""The video codec and the text encoder that a configuration names, with their weights, on host arrays.

    codec.latent_shape(frames, height, width) -> (T, h, w, 16)
    codec.encode(frames (..., F, H, W, 3) uint8) -> latents (..., T, h, w, 16) float32, normalised
    codec.decode(latents (..., T, h, w, 16)) -> frames (..., F, H, W, 3) uint8; raises NotFinite
    encoder(texts) -> (text (B, L, D) float32, mask (B, L) bool of the rows that hold words or the end token);
        raises NotFinite
    encoder.words_lost(text) -> int, words that do not fit into L rows
    codec.sha256, encoder.sha256: hash of the weights, where there are any

Rows of text that are not valid are zero, unless the encoder encodes its padding too (`t5.T5`): then they are
part of the text, and a model reads all L rows.

Models without weights (`linear_codec`, `hash_text`) offer this themselves. Those with weights are pure
functions of a parameter tree; this file gives them their weights, tokenizer, devices and cache.

B clips or texts, F frames, H W pixels, T h w latent grid, L text length, D text width.
"""

import hashlib
import json
import math
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prophy_jax import models
from prophy_jax.models.text import tokenizer as prompts
from prophy_jax.run import checkpoints, parallel, storage
from prophy_jax.run.errors import NotFinite


def load_codec(config, mesh: Mesh) -> Any:
    """The codec of `config.codec`, with the weights of `config.codec_params` if it has any.

    Raises UserError when the weights are missing or do not fit.
    """
    model = models.build(config.codec)
    return VideoCodec(model, config, mesh) if hasattr(model, "init") else model


def load_text_encoder(config, cache: str | None = None) -> Any:
    """The encoder of `config.text_encoder`, with the weights of `config.text_encoder_params` if it has any.

    `cache` is a folder where encoded texts are kept for later runs. Raises UserError when the weights or
    the tokenizer are missing or do not fit.
    """
    model = models.build(config.text_encoder)
    return TextEncoder(model, config, cache) if hasattr(model, "init") else model


def default_cache() -> str:
    """The user's cache folder for encoded texts."""
    return storage.cache_folder("text")


class VideoCodec:
    """A video autoencoder with weights, compiled once per clip size.

    Several clips are split over the mesh axes data and fsdp, the rows of each over context; the rows of a
    single clip over all of them. Every device works on one clip at a time.
    """

    def __init__(self, model: Any, config, mesh: Mesh):
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        layout = parallel.placed(shapes, jax.tree.map(lambda _: parallel.replicated(mesh), shapes))
        remedy = checkpoints.name_folder(config.backbone_remedy, config.codec_params)
        with jax.set_mesh(mesh):  # in a job, that of the caller may have devices of others
            self._params = checkpoints.load_params(config.codec_params, layout, remedy)
        self.sha256 = checkpoints.read_manifest(config.codec_params, "")["sha256"]
        self._mesh = mesh
        self.latent_shape = model.latent_shape

        @jax.jit
        def encode(params, frames):
            return model.encode(params, frames.astype(jnp.float32) / 127.5 - 1)

        @jax.jit
        def decode(params, latents):
            video = jnp.clip(model.decode(params, latents).astype(jnp.float32), -1, 1)
            finite = jnp.isfinite(video).all(axis=(1, 2, 3, 4))
            return jnp.round((video + 1) * 127.5).astype(jnp.uint8), finite

        self._encode, self._decode = encode, decode

    def encode(self, frames: np.ndarray) -> np.ndarray:
        return self._map(self._encode, frames)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        frames, finite = self._map(self._decode, latents)
        if not finite.all():
            raise NotFinite(
                "the video codec makes frames of NaN: config.codec.dtype=float32 or other weights may help",
                np.flatnonzero(~finite),
            )
        return frames

    def _map(self, function: Callable, clips: np.ndarray) -> Any:
        """`function` of every clip of (..., F, H, W, C), an array or several."""
        lead, clips = clips.shape[:-4], np.asarray(clips).reshape(-1, *clips.shape[-4:])
        sizes = self._mesh.shape
        clip_axes: tuple[str, ...] = () if len(clips) == 1 else ("data", "fsdp")
        row_axes = tuple(axis for axis in parallel.AXES if axis not in clip_axes)
        group = math.prod(sizes[axis] for axis in clip_axes)
        if clips.shape[2] % math.prod(sizes[axis] for axis in row_axes):
            row_axes = ()
        sharding = NamedSharding(self._mesh, PartitionSpec(clip_axes, None, row_axes))
        done = []
        for first in range(0, len(clips), group):
            rows = np.minimum(np.arange(first, first + group), len(clips) - 1)  # the last fills up a group
            with jax.set_mesh(self._mesh):
                own = function(self._params, jax.device_put(clips[rows], sharding))
            done.append(jax.device_get(own))

        def whole(*parts: np.ndarray) -> np.ndarray:
            return np.concatenate(parts)[: len(clips)].reshape((*lead, *parts[0].shape[1:]))

        return jax.tree.map(whole, *done)


class TextEncoder:
    """A text encoder with weights and a tokenizer.

    The weights are read when a text comes that is not in the cache, and are split over all devices. They are
    freed with the object.
    """

    def __init__(self, model: Any, config, cache: str | None):
        folder = config.text_encoder_params
        self._remedy = checkpoints.name_folder(config.backbone_remedy, folder)
        self.sha256 = checkpoints.read_manifest(folder, self._remedy)["sha256"]
        tokenizer = storage.fetched(os.path.join(folder, "tokenizer"))
        self._model, self._folder = model, folder
        self._tokenizer = prompts.load_tokenizer(tokenizer, model.config.vocab_size)
        self._params: Any = None
        self._cache = None
        if cache is not None:
            spec = json.dumps(config.text_encoder.to_dict(), sort_keys=True)
            digest = hashlib.sha256(f"{self.sha256} {spec}".encode())
            for file in sorted(tokenizer.iterdir()):
                digest.update(file.read_bytes())
            self._cache = Path(cache) / digest.hexdigest()[:16]

    def words_lost(self, text: str) -> int:
        return len(self._tokenizer.lost(text, self._model.length).split())

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        texts = [prompts.clean(text) for text in texts]
        rows = {text: self._recall(text) for text in dict.fromkeys(texts)}
        for text in [text for text, known in rows.items() if known is None]:
            rows[text] = self._encode(text)
            if np.isfinite(rows[text]).all():
                self._remember(text, rows[text])
        if wrong := [index for index, text in enumerate(texts) if not np.isfinite(rows[text]).all()]:
            raise NotFinite(
                f"the text encoder {self._folder} makes NaN or infinity of a prompt: "
                "config.text_encoder.dtype=float32 or other weights may help",
                wrong,
            )
        _, mask = self._tokenizer(texts, self._model.length)
        text = np.zeros((*mask.shape, self._model.config.d_model), np.float32)
        for index, key in enumerate(texts):
            text[index, : len(rows[key])] = rows[key]
        return text, mask

    def _encode(self, text: str) -> np.ndarray:
        """The rows (n, D) float32, without the zero rows at the end.

        Of one text: in a batch, its last bits would depend on the others. With its hundreds of rows it keeps
        a device busy.
        """
        if self._params is None:
            self._load()
        ids, mask = self._tokenizer([text], self._model.length)
        encoded = np.asarray(self._run(self._params, ids, mask)[0], np.float32)  # (L, D)
        return encoded[: mask.sum()] if self._model.padding == "zeros" else encoded

    def _load(self) -> None:
        devices = jax.local_devices()
        mesh = parallel.make_mesh({"data": 1, "fsdp": -1, "context": 1}, len(devices), devices)
        shapes = jax.eval_shape(self._model.init, jax.random.key(0))
        layout = parallel.placed(shapes, parallel.shard_largest(shapes, mesh), self._model.dtype)
        self._params = checkpoints.load_params(self._folder, layout, self._remedy)
        # On a CPU, XLA of jax 0.10 would hoist the conversion of all blocks to fp32 out of the scan over
        # them: 19 GB for UMT5-XXL.
        hoisting = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
        self._run = jax.jit(
            self._model,
            out_shardings=parallel.replicated(mesh),
            compiler_options=hoisting if jax.default_backend() == "cpu" else None,
        )

    def _file(self, text: str) -> Path:
        return self._cache / f"{hashlib.sha256(text.encode()).hexdigest()}.npz"  # with a CRC-32

    def _recall(self, text: str) -> np.ndarray | None:
        if self._cache is None or not self._file(text).exists():
            return None
        try:
            with np.load(self._file(text)) as stored:
                return stored["rows"]
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):  # damaged: it is encoded again
            return None

    def _remember(self, text: str, rows: np.ndarray) -> None:
        if self._cache is None:
            return
        self._cache.mkdir(parents=True, exist_ok=True)
        storage.write_atomically(self._file(text), lambda file: np.savez(file, rows=rows))
