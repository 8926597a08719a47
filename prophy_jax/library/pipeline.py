"""A pipeline, from prompts to clips; `prophy_jax.load` makes one.

B prompts, F H W video, T h w latent grid, T' h' w' token grid, N = T' h' w' tokens, E categories, L text
length, D text width.
"""

import dataclasses
import re
import types
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import tqdm

from prophy_jax import build
from prophy_jax.diffusion import generate
from prophy_jax.library.arguments import number, own_words, whole_number
from prophy_jax.library.clips import Clips
from prophy_jax.library.loaded import SETTINGS, Loaded
from prophy_jax.run.errors import NotFinite, UserError, counted


@dataclasses.dataclass(frozen=True, repr=False)
class Prompts:
    """Prompts as the text encoder made them; what `Pipeline.encode` returns and `sample` takes.

    Attributes:
        prompts: As they were given.
        text: (B, L, D) float32.
        text_mask: (B, L) bool, the rows of `text` that hold words or the end token.
        encoder: Tells the text encoder.
    """

    prompts: tuple[str, ...]
    text: np.ndarray
    text_mask: np.ndarray
    encoder: str

    def __len__(self) -> int:
        return len(self.prompts)

    def __repr__(self) -> str:
        return f"Prompts({list(self.prompts)}, text {self.text.shape})"


class Pipeline:
    """A model that makes clips from prompts; `load` makes one. It never changes.

    Attributes:
        scale: Part -> what it multiplies all that it adds with. LoRA files are `lora_0`, `lora_1` and so on.
        config: Where the defaults of `sample` are from: `config.samples` and `config.data`.
    """

    def __init__(
        self, loaded: Loaded, config: Any, scale: Mapping[str, float], negatives: dict[str, Any]
    ) -> None:
        self._loaded, self._negatives = loaded, negatives
        self.config, self.scale = config, types.MappingProxyType(dict(scale))
        changed = {
            name: dataclasses.replace(cast(Any, part), strength=scale[name])
            for name, part in loaded.model.parts.items()
            if hasattr(part, "strength") and part.strength != scale[name]
        }
        whole = loaded.model
        self.model = dataclasses.replace(whole, parts={**whole.parts, **changed}) if changed else whole

    def __repr__(self) -> str:
        parts = ", ".join(f"{name} x {scale:g}" for name, scale in self.scale.items()) or "no parts"
        return f"Pipeline({self.config.backbone.module}, {self.config.backbone_params}, {parts})"

    @property
    def params(self) -> dict[str, Any]:
        """Parameters of the backbone and of all parts, by name, as `model` takes them; read at first use."""
        with own_words():
            return dict(self._loaded.params)

    def with_scale(self, scale: float | None = None, /, **parts: float) -> "Pipeline":
        """A pipeline with other strengths of its parts; it shares all weights with this one.

        Args:
            scale: Of all parts; 1 is as trained, 0 silences them.
            **parts: Of one part each. `lora` is all LoRA files, where no part has this name.

        Raises:
            UserError: a part that is not there, or a scale that is not a finite number.
        """
        if scale is None and not parts:
            raise UserError("with_scale takes a number for all parts, or one by name, such as branch=0.5")
        given: dict[str, Any] = {} if scale is None else dict.fromkeys(self.scale, scale)
        for name, own in parts.items():
            files = [one for one in self.scale if re.fullmatch(r"lora_\d+", one)]
            names = files if name == "lora" and name not in self.scale and files else [name]
            given |= dict.fromkeys(names, own)
        if not self.scale:
            raise UserError("this pipeline has no part to scale: load one with branch= or lora=")
        if unknown := sorted(given.keys() - self.scale.keys()):
            raise UserError(f"this pipeline has no part {unknown[0]!r}; it has {', '.join(self.scale)}")
        given = {name: number(f"the scale of {name}", own) for name, own in given.items()}
        return Pipeline(self._loaded, self.config, {**self.scale, **given}, self._negatives)

    @own_words()
    def encode(self, prompts: str | Sequence[str]) -> Prompts:
        """Prompts for `sample`, which encodes them itself where it gets strings.

        The text encoder is read for a prompt that is not in the cache of earlier ones on this machine, and is
        freed at the end: encode all prompts at once. Words that do not fit are dropped with a warning.

        Args:
            prompts: One, or a sequence of B.

        Raises:
            UserError: a prompt that is empty or not a string.
        """
        prompts = (prompts,) if isinstance(prompts, str) else prompts
        if not isinstance(prompts, Sequence) or not prompts:
            raise UserError(f"prompts={prompts!r}: give a prompt, or a list of prompts")
        for prompt in prompts:
            if not isinstance(prompt, str) or not prompt.strip():
                raise UserError(
                    f"the prompt {prompt!r} is {'empty' if isinstance(prompt, str) else 'no text'}: write one"
                )
        default = self.config.samples.negative_prompt
        asked = [default] if default not in self._negatives else []
        all_lost, text, mask = self._loaded.encode([*prompts, *asked])
        for prompt, lost in zip(prompts, all_lost, strict=False):
            if lost:
                words = " ".join(prompt.split()[-lost:])
                warnings.warn(
                    f"no room for the end of a prompt, {counted(lost, 'word')} lost: {words}", stacklevel=3
                )
        if asked:
            self._negatives[default] = {"text": text[-1], "text_mask": mask[-1]}
        count = len(prompts)
        return Prompts(tuple(prompts), text[:count], mask[:count], self._loaded.encoder)

    @own_words()
    def sample(
        self,
        prompts: str | Sequence[str] | Prompts,
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        size: tuple[int, int, int] | None = None,
        shift: float | None = None,
        solver: str | None = None,
        negative_prompt: str | None = None,
        noise: np.ndarray | None = None,
        batch: int | None = None,
        progress: bool = False,
    ) -> Clips:
        """Makes a clip of each prompt. What is None is as `config.samples` and `config.data` say.

        The same seed, prompt and settings give the same clip as `python -m prophy_jax.sample`, bit for bit.

        Args:
            prompts: One, a sequence of B, or what `encode` returned.
            seed: Of the noise; prompt i has noise of its own.
            steps: Solver steps.
            guidance: How far a clip is driven from that of the negative prompt; at 1 or less, not at all.
            size: (frames, height, width), in pixels.
            shift: Of the noise levels that the steps visit.
            solver: Such as "unipc" or "ddim".
            negative_prompt: What guidance drives away from; may be "".
            noise: (B, T, h, w, 16) to start from, in place of that of `seed`.
            batch: Prompts at a time; by default one per device.
            progress: Shows a bar.

        Raises:
            UserError: what does not fit.
            NotFinite: (a UserError) numbers became NaN or infinite; `rows` are the clips.
        """
        text = prompts if isinstance(prompts, Prompts) else self.encode(prompts)
        if text.encoder != self._loaded.encoder:
            raise UserError("these prompts are of another text encoder: encode them with this pipeline")
        given = {
            "steps": None if steps is None else whole_number("steps", steps, 1),
            "guidance": None if guidance is None else number("guidance", guidance),
            "shift": None if shift is None else number("shift", shift),
            "solver": solver,
            "negative_prompt": negative_prompt,
        }
        settings = self.config.samples.to_dict() | {key: own for key, own in given.items() if own is not None}
        generate.make_tables(self._loaded.objective, types.SimpleNamespace(**settings))
        seed = whole_number("seed", seed, 0, 2**32 - 1)
        batch = self._loaded.ways if batch is None else whole_number("batch", batch, 1)
        self._loaded.check_batch(batch, settings["guidance"])
        data = self.config.data
        shape, grid = self._fit((data.frames, data.height, data.width) if size is None else size)
        noise = None if noise is None else _check_noise(noise, (len(text), *shape))
        negative = self._find_negative(settings["negative_prompt"])
        rows = [slice(first, first + batch) for first in range(0, len(text), batch)]
        made = []
        with tqdm.tqdm(total=len(text) * settings["steps"], unit="step", disable=not progress) as bar:
            for own in rows:
                indices = np.arange(len(text))[own]
                started = generate.make_noise(seed, indices, shape) if noise is None else noise[own]
                prompt = {"text": text.text[own], "text_mask": text.text_mask[own]}
                try:
                    clips = self._loaded.make_clips(
                        self.model,
                        settings,
                        np.asarray(started),
                        prompt,
                        negative,
                        dict(self.scale),
                        batch,
                        bar.update,
                    )
                except NotFinite as error:
                    failed = [int(own.start + row) for row in error.rows if row < len(indices)]
                    named = ", ".join(repr(text.prompts[row]) for row in failed)
                    raise NotFinite(f"{named}: {error}", failed) from error
                made.append(clips)
        latents, frames = (np.concatenate(each) for each in zip(*made, strict=True))

        def look() -> tuple[tuple[str, ...], np.ndarray] | None:
            names: tuple[str, ...] = ()
            parts = []
            for own in rows:
                words = {"text": text.text[own], "text_mask": text.text_mask[own]}
                found = self._loaded.find_routing(self.model, latents[own], words, batch)
                if found is None:
                    return None
                names = found[0]
                parts.append(found[1])
            maps = np.concatenate(parts)  # (B, N, E)
            return names, maps.reshape(len(maps), *grid, -1)

        how = {key: settings[key] for key in SETTINGS}
        how["shift"] = settings["shift"] or self._loaded.objective.shift
        how |= {"seed": seed, "size": tuple(frames.shape[1:4]), "scale": dict(self.scale)}
        how["negative_prompt"] = settings["negative_prompt"]
        return Clips(frames, latents, text.prompts, data.fps, how, look)

    def _fit(self, size: Any) -> tuple[tuple[int, ...], tuple[int, int, int]]:
        """Latents (T, h, w, 16) and token grid (T', h', w') of clips of (frames, height, width)."""
        if not isinstance(size, Sequence) or isinstance(size, str) or len(size) != 3:
            raise UserError(f"size={size!r}: give (frames, height, width), such as (81, 480, 832)")
        sides = [whole_number("size", side, 1) for side in size]
        return build.fit(self._loaded.codec, self._loaded.model.backbone, sides)

    def _find_negative(self, prompt: Any) -> dict[str, np.ndarray]:
        """Text (L, D) and mask (L,) of a negative prompt, encoded once."""
        if not isinstance(prompt, str):
            raise UserError(f'negative_prompt={prompt!r} is no text: give one, or "" for none')
        if prompt not in self._negatives:
            _, text, mask = self._loaded.encode([prompt])
            self._negatives[prompt] = {"text": text[0], "text_mask": mask[0]}
        return self._negatives[prompt]


def _check_noise(noise: Any, shape: tuple[int, ...]) -> np.ndarray:
    try:
        noise = np.asarray(noise, np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"noise is no array of numbers ({error}): give one of shape {shape}") from error
    if noise.shape != shape:
        raise UserError(f"noise is {noise.shape}; these prompts and this size take {shape}")
    if not np.isfinite(noise).all():
        raise UserError("noise holds NaN or infinity: draw it from a standard normal distribution")
    return noise
