"""A model with its weights, ready to make clips: what the sample command and `prophy_jax.load` share.

B prompts, at most b at a time; F H W video, T h w latent grid, N video tokens, E categories, L text length,
D text width.
"""

import copy
import dataclasses
import functools
import os
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from prophy_jax import build, models
from prophy_jax.diffusion import generate
from prophy_jax.models.beside.part import Model
from prophy_jax.run import checkpoints, encoders, parallel, storage, workdir
from prophy_jax.run.errors import UserError, counted

SETTINGS = ("solver", "steps", "shift", "guidance", "guidance_schedule", "skip")  # of a sampler
PROGRAMS = 8  # samplers of other settings that are kept compiled


def use_checkpoint(config: Any, folder: str, say: Callable[[str], Any] = print) -> None:
    """Points the configuration at a folder of converted weights, or at one of backbone parameters.

    Sizes are those that the manifests of the folder say. Raises UserError where they are of another kind of
    model than the configuration describes.

    Args:
        config: It is changed.
        folder: Of convert, of backbone parameters, of a run that trained a backbone, or a checkpoint of one.
        say: Is told which sizes were others.
    """
    root = storage.path(folder)
    if (root / "transformer").is_dir():
        config.backbone_params = os.path.join(folder, "transformer")
        config.codec_params = os.path.join(folder, "vae")
        config.text_encoder_params = os.path.join(folder, "text_encoder")
        names: tuple[str, ...] = ("backbone", "codec", "text_encoder")
    else:
        if (root / "checkpoints").is_dir() or (root / "state").is_dir():
            found = checkpoints.find_parts(folder)
            if "backbone" not in found:
                raise UserError(
                    f"--checkpoint={folder} trained no backbone, but {sorted(found)}: name the weights"
                )
            folder = found["backbone"]
        config.backbone_params = folder
        names = ("backbone",)
    for name in names:
        take_sizes(config, name, say)


def take_sizes(config: Any, name: str, say: Callable[[str], Any] = print) -> None:
    """Gives `config.NAME` the sizes that the manifest of its parameters says, and says which were others.

    What is no number, such as how a model counts positions, goes with other settings of the configuration:
    UserError is raised where it differs.
    """
    folder = config[f"{name}_params"]
    if not checkpoints.holds_params(folder):
        return  # reading the parameters says so
    stored = checkpoints.read_manifest(folder, checkpoints.name_folder(config.backbone_remedy, folder)).get(
        "model"
    )
    if not stored:  # of an earlier version
        return
    spec = config[name].to_dict()
    if stored.get("module") != spec["module"]:
        raise UserError(
            f"{folder} is of the model {stored.get('module')!r}, config.{name} of {spec['module']!r}: name "
            "the --config of that model"
        )
    own = dataclasses.asdict(models.build(spec).config)
    try:
        theirs = dataclasses.asdict(models.build(stored).config)
    except (UserError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder}/manifest.json has no usable sizes ({error}): convert or train again"
        ) from error
    if "text_len" in spec:  # Of prompts, and of no weight: what the configuration says counts.
        theirs["text_len"] = own["text_len"]
    other = {key: value for key, value in theirs.items() if value != own[key]}
    kinds = {key: value for key, value in other.items() if isinstance(value, str | bool)}
    if kinds:
        different = workdir.differences({key: own[key] for key in kinds}, kinds)
        raise UserError(f"{folder} is another kind of model ({different}): name its --config=FILE.py:VARIANT")
    if other:
        listed = ", ".join(f"{key} {value}" for key, value in other.items() if not isinstance(value, tuple))
        say(f"config.{name} takes the sizes of {folder}: {listed or ', '.join(other)}")
        kept = {key: value for key, value in spec.items() if key not in own and key != "variant"}
        config[name] = {**kept, **theirs}
    if name == "backbone" and "text_len" in other:
        config.text_encoder.length = theirs["text_len"]


class Loaded:
    """A model with its weights, of which several may live in a process.

    The video codec is read at once, the backbone and its parts when the first clip is made, the text encoder
    for each call of `encode`, and then freed.

    Args:
        config: With the sizes of the weights, and the parts that `folders` has.
        folders: Part -> folder of its parameters; the backbone's too.
        adapters: (LoRA file, strength) of any number.

    Attributes:
        mesh: Over the devices of this process.
        model: The backbone, its parts, and adapters as `lora_0`, `lora_1`.
        objective: What the backbone was trained with.
        codec: See `prophy_jax.run.encoders`.
        encoder: Tells the text encoder: equal where texts come out equal.
        references: {NAME_sha256} of all that is read.
        ways: Over how many devices a batch is split.

    Raises:
        UserError: weights that do not exist or do not fit.
    """

    def __init__(
        self, config: Any, folders: Mapping[str, str], adapters: Sequence[tuple[str, float]] = ()
    ) -> None:
        self._config, self._folders = config, folders
        self.mesh = build.build_mesh(config.mesh, devices=jax.local_devices())
        model = build.build_model(config, self.mesh)
        self.objective = build.build_objective(config)
        if more := sorted({*model.fields} - {"text", "text_mask"}):
            raise UserError(f"these parts read {more}, which a prompt alone does not have")
        self.ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        self._layout = build.place(model, self.mesh, config.frozen_dtype)
        self.references = build.check_params(config, self._layout, folders)
        self._adapters: dict[str, Any] = {}
        self.model = self._adapted(model, adapters)
        self.codec = encoders.load_codec(config, self.mesh)
        self._encoder = encoders.load_text_encoder(config, encoders.default_cache())
        self.encoder = f"{config.text_encoder.to_dict()} {getattr(self._encoder, 'sha256', '')}"
        for name, part in (("codec", self.codec), ("text_encoder", self._encoder)):
            if hasattr(part, "sha256"):
                self.references[f"{name}_sha256"] = part.sha256
                for folder in folders.values():
                    if folder and checkpoints.holds_params(folder):
                        made_with = checkpoints.read_manifest(folder, "")
                        build.check_same(name, part.sha256, config[workdir.FOLDERS[name]], made_with, folder)
        self._generator = functools.lru_cache(PROGRAMS)(self._make_generator)
        self._observer = functools.lru_cache(PROGRAMS)(
            functools.partial(generate.make_observer, objective=self.objective)
        )

    def _adapted(self, model: Model, adapters: Sequence[tuple[str, float]]) -> Model:
        """The model with adapters; their values go to `_adapters`, and which they are to `references`."""
        from convert import lora

        parts, found = {}, lora.read_all(adapters, model.backbone, self._config.backbone_params)
        for number, (part, own, digest) in enumerate(found):
            name = f"lora_{number}"
            parts[name], self._adapters[name] = part, own
            self.references[f"{name}_sha256"] = (
                digest if part.strength == 1 else f"{digest} times {part.strength:g}"
            )
        return dataclasses.replace(model, parts={**model.parts, **parts})

    @functools.cached_property
    def params(self) -> dict[str, Any]:
        """Parameters of the backbone and of all parts, by name; read at the first use."""
        loaded = build.load_params(self._config, self._layout, self._folders)
        return loaded | jax.device_put(self._adapters, parallel.replicated(self.mesh))

    def check_batch(self, batch: int, guidance: float) -> None:
        """Raises UserError where so many prompts at a time do not divide over the devices."""
        rows = batch * (2 if guidance > 1 else 1)
        if rows % self.ways:
            raise UserError(
                f"--batch={batch}: {counted(rows, 'row')}, with those of guidance, cannot be divided "
                f"over data x fsdp = {self.ways}: name another --batch or fix config.mesh"
            )

    def encode(self, prompts: Sequence[str]) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Words that do not fit, text (B, L, D) float32 and mask (B, L) bool of prompts."""
        encoder = copy.copy(self._encoder)  # the weights are read into the copy, and freed with it
        return [encoder.words_lost(prompt) for prompt in prompts], *encoder(prompts)

    def _make_generator(self, model: Model, settings: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
        return generate.make_generator(model, self.objective, types.SimpleNamespace(**dict(settings)))

    def make_clips(
        self,
        model: Model,
        settings: Mapping[str, Any],
        noise: np.ndarray,
        prompt: Mapping[str, np.ndarray],
        negative: Mapping[str, np.ndarray],
        scale: Mapping[str, float],
        batch: int,
        tick: Callable[[int], Any],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Clips from noise, at most one batch.

        Args:
            model: This one's, or one with fewer parts.
            settings: Of `config.samples`.
            noise: (b, T, h, w, 16).
            prompt: text (b, L, D) and text_mask (b, L).
            negative: The same of one negative prompt, without the axis b.
            scale: Part -> what it multiplies all that it adds with.
            batch: Rows that are computed, b or more: other numbers of rows are other programs.
            tick: Is called with how many more steps are done, each of a clip counting as one.

        Returns:
            Latents (b, T, h, w, 16) float32 and frames (b, F, H, W, 3) uint8.

        Raises:
            NotFinite: with the rows.
        """
        chosen = tuple((key, settings[key]) for key in SETTINGS)
        count = len(noise)
        with jax.set_mesh(self.mesh):
            inputs = self._put({"noise": noise, **prompt}, batch)
            latents = self._generator(model, chosen)(
                self.params,
                inputs.pop("noise"),
                inputs,
                negative,
                scale=scale,
                after_steps=lambda steps: tick(steps * count),
            )
            latents = np.asarray(latents)[:count]
            return latents, self.codec.decode(latents)

    def find_routing(
        self, model: Model, latents: np.ndarray, prompt: Mapping[str, np.ndarray], batch: int
    ) -> tuple[tuple[str, ...], np.ndarray] | None:
        """(names of E categories, maps (b, N, E)) of the first part that routes tokens; None without one.

        Args:
            model: As in `make_clips`.
            latents: (b, T, h, w, 16), clean.
            prompt: text (b, L, D) and text_mask (b, L).
            batch: As in `make_clips`.
        """
        if not self.routes(model, latents.shape[1:]):
            return None
        with jax.set_mesh(self.mesh):
            inputs = self._put({"latents": latents, **prompt}, batch)
            found = self._observer(model)(self.params, inputs.pop("latents"), inputs)
            for name, seen in found.items():
                if (maps := model.parts[name].token_maps(seen)) is not None:
                    return model.parts[name].categories, np.asarray(maps)[: len(latents)]
        return None

    def routes(self, model: Model, latent_shape: Sequence[int]) -> bool:
        """Whether a part routes tokens, of latents (T, h, w, 16); nothing is read or computed."""
        length, width = self._config.text_encoder.length, self.model.backbone.config.text_dim
        text = {"text": ((1, length, width), "float32"), "text_mask": ((1, length), "bool")}
        prompt = {name: jax.ShapeDtypeStruct(*own) for name, own in text.items()}
        latents = jax.ShapeDtypeStruct((1, *latent_shape), "float32")
        seen = jax.eval_shape(self._observer(model), {**self._layout, **self._adapters}, latents, prompt)
        return any(model.parts[name].token_maps(found) is not None for name, found in seen.items())

    def _put(self, inputs: Mapping[str, np.ndarray], batch: int) -> dict[str, jax.Array]:
        """Host arrays of b rows on the devices, as `batch` rows: the last fills up."""
        rows = np.minimum(np.arange(batch), len(next(iter(inputs.values()))) - 1)
        return parallel.put_batch({name: value[rows] for name, value in inputs.items()}, self.mesh)
