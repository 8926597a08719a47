"""A part: what is trained next to a backbone. And the model: a backbone with its parts.

A part is a frozen dataclass of sizes in a file of this folder, with a function `build` that makes it from the
arguments of a configuration: `config.parts.NAME = dict(module=FILE, ...)`. Its parameters are a tree of their
own, params[NAME], never inside the backbone's. Losses read what its `leave` returns.

Legend: B batch, T h w latent grid, c latent channels, N video tokens, L text length, D text feature width,
C model width.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax

from prophy_jax.models.backbone import Backbone, Params, Stream, Visit, run

Batch = Mapping[str, jax.Array]  # arrays of `prophy_jax.data.batch`, leading B
Scale = float | jax.Array | Mapping[str, float | jax.Array]  # of all parts, or by part; of others 1


class Flow(NamedTuple):
    """One forward pass, as a part sees it."""

    backbone: Backbone  # as all parts adapted it
    params: Params  # of the backbone
    latents: jax.Array  # (B, T, h, w, c), noisy
    t: jax.Array  # (B,), in the units of the backbone
    text: jax.Array  # (B, L, C), text tokens
    stream: Stream
    cond: Any  # of `Backbone.embed`
    read: Any = None  # what this part's `read` returned
    ahead: Any = None  # what this part's `read_ahead` returned
    scale: Any = 1.0  # what the part multiplies all that it adds with
    key: jax.Array | None = None  # for random choices in training; None while sampling


class Part:
    """What is trained next to a backbone. Every method has a default that does nothing.

    Attributes:
        fields: Fields of the batch that `read` takes besides text and text_mask.
        categories: Names of the E maps of `token_maps`; empty: they are not known.
    """

    fields: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()

    def init(self, key: jax.Array, backbone: Backbone, params: Params) -> Params:
        """Draws this part's parameters, fp32. At step 0 the model must be the backbone, bit for bit.

        `params` has those of the backbone and of all parts before this one, by name.
        """
        return {}

    def adapt(self, own: Params, backbone: Backbone, params: Params) -> tuple[Backbone, Params]:
        """Changed layers, for a part that has no place of its own in the flow.

        Args:
            own: Parameters of this part.
            backbone: As the parts before this one adapted it.
            params: Of the backbone and of all parts, likewise.

        Returns:
            The backbone and all parameters as the rest of the pass takes them.
        """
        return backbone, params

    def read(self, params: Params, prompt: Batch) -> Any:
        """What the part makes of the prompt alone; a sampler calls it once per clip.

        Args:
            params: Of this part.
            prompt: text (B, L, D), text_mask (B, L) and `fields`.
        """
        return None

    def read_ahead(
        self, backbone: Backbone, params: Params, text: jax.Array, mask: jax.Array, rows: int | None
    ) -> Any:
        """What its own blocks compute of the text alone, see `Backbone.text_ahead`; for samplers."""
        return None

    def enter(self, params: Params, flow: Flow) -> Flow:
        """Changes the stream or the conditioning before the first block."""
        return flow

    def visits(self, params: Params, flow: Flow) -> tuple[Any, tuple[Visit, ...]]:
        """What the part does between the backbone's blocks.

        Returns:
            What the first visit finds as its carry, and the visits.
        """
        return None, ()

    def leave(self, params: Params, flow: Flow, outs: Sequence[Any]) -> tuple[Stream, Any]:
        """Changes the stream after the last block.

        Args:
            params: Of this part.
            flow: With the stream as it is now.
            outs: For every visit what its `do` gave out, with a leading axis of visits.

        Returns:
            The stream, and what this part's losses and measures read.
        """
        return flow.stream, None

    def token_maps(self, seen: Any) -> jax.Array | None:
        """Maps (B, N, E) to lay over a clip, from what `leave` returned; None where there are none."""
        return None

    def statistics(self, seen: Any) -> dict[str, jax.Array]:
        """Scalars to log, by name, from what `leave` returned; averaged over microbatches."""
        return {}


class Prompt(flax.struct.PyTreeNode):
    """What the model reads of its prompts: the same at every step of a sampler."""

    text: jax.Array  # (B, L, C), text tokens
    read: dict[str, Any]  # by part
    ahead: dict[str, Any]  # of the backbone and of every part; None where nothing was computed ahead


class Output(flax.struct.PyTreeNode):
    """What one forward pass gives."""

    prediction: jax.Array  # (B, T, h, w, c) fp32, the backbone's prediction
    seen: dict[str, Any]  # by part, what its `leave` returned


@dataclasses.dataclass(frozen=True)
class Model:
    """A backbone and the parts next to it. Parameters are {"backbone": ..., **{part: ...}}."""

    backbone: Backbone
    parts: Mapping[str, Part] = dataclasses.field(default_factory=dict)

    def __hash__(self) -> int:  # so that it can be compiled as it is
        return hash((self.backbone, *self.parts.items()))

    def without(self, *names: str) -> "Model":
        """The model without these parts, or without any: a baseline, or the reference of a loss."""
        kept = {name: part for name, part in self.parts.items() if names and name not in names}
        return dataclasses.replace(self, parts=kept)

    def with_backbone(self, **changes: Any) -> "Model":
        """The model with another remat policy or another attention."""
        return dataclasses.replace(self, backbone=dataclasses.replace(self.backbone, **changes))

    def init_part(self, name: str, key: jax.Array, params: Params) -> Params:
        """Parameters of one part at step 0. Parts after the first draw from keys of their own.

        `params` has those of the backbone and of the parts before it.
        """
        place = list(self.parts).index(name)
        key = jax.random.fold_in(key, place) if place else key
        return self.parts[name].init(key, self.backbone, params)

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of the batch that make a prompt."""
        own = (field for part in self.parts.values() for field in part.fields)
        return tuple(dict.fromkeys(("text", "text_mask", *own)))

    def read(self, params: Params, prompt: Batch) -> Prompt:
        """What the model reads of a prompt.

        Args:
            params: Of the backbone and of all parts.
            prompt: text (B, L, D), padded as the backbone was trained on it; text_mask (B, L); and the
                `fields` of the parts.
        """
        backbone, params = self._adapted(params)
        text = backbone.embed_text(params["backbone"], prompt["text"])
        read = {name: part.read(params[name], prompt) for name, part in self.parts.items()}
        return Prompt(text, read, dict.fromkeys(("backbone", *self.parts)))

    def read_ahead(self, params: Params, prompt: Batch, rows: int | None = None) -> Prompt:
        """As `read`, with all that blocks compute of the text alone: for many steps on one prompt.

        `rows` shortens the padding, see `Backbone.text_ahead`.
        """
        read, mask = self.read(params, prompt), prompt["text_mask"]
        backbone, params = self._adapted(params)
        ahead = {"backbone": backbone.text_ahead(params["backbone"]["blocks"], read.text, mask, rows)}
        for name, part in self.parts.items():
            ahead[name] = part.read_ahead(backbone, params[name], read.text, mask, rows)
        return read.replace(ahead=ahead)

    def __call__(
        self,
        params: Params,
        latents: jax.Array,
        t: jax.Array,
        prompt: Batch,
        scale: Scale = 1.0,
        key: jax.Array | None = None,
    ) -> Output:
        """Predicts from noisy latents and a prompt: `read`, then `predict`."""
        return self.predict(params, latents, t, self.read(params, prompt), scale, key)

    def predict(
        self,
        params: Params,
        latents: jax.Array,
        t: jax.Array,
        prompt: Prompt,
        scale: Scale = 1.0,
        key: jax.Array | None = None,
    ) -> Output:
        """Predicts what the backbone was trained to predict, from noisy latents.

        Args:
            params: Of the backbone and of all parts.
            latents: (B, T, h, w, c), noisy, normalised.
            t: (B,), in the units of the backbone (Wan: 0..1000, CogVideoX: 0..999).
            prompt: Of `read` or `read_ahead`, B rows.
            scale: Multiplies what the parts add, all of them or by name; at 0 those that only add are silent.
            key: For random choices of the parts in training.
        """
        backbone, params = self._adapted(params)
        frozen = params["backbone"]
        stream, cond = backbone.embed(frozen, latents, t, prompt.text)
        flow = Flow(backbone, frozen, latents, t, prompt.text, stream, cond, key=key)

        def of(name: str) -> Flow:
            own = scale.get(name, 1.0) if isinstance(scale, Mapping) else scale
            return flow._replace(read=prompt.read[name], ahead=prompt.ahead[name], scale=own)

        for name, part in self.parts.items():
            flow = part.enter(params[name], of(name))
        carry, visits, owners = {}, [], []
        for name, part in self.parts.items():
            carry[name], own = part.visits(params[name], of(name))
            visits += [visit._replace(do=_of_one_part(name, visit)) for visit in own]
            owners += [name] * len(own)
        stream, _, outs = run(
            backbone, frozen["blocks"], flow.stream, flow.cond, visits, carry, prompt.ahead["backbone"]
        )
        flow, seen = flow._replace(stream=stream), {}
        for name, part in self.parts.items():
            mine = [out for out, owner in zip(outs, owners, strict=True) if owner == name]
            stream, seen[name] = part.leave(params[name], of(name), mine)
            flow = flow._replace(stream=stream)
        return Output(backbone.head(frozen, flow.stream, flow.cond), seen)

    def _adapted(self, params: Params) -> tuple[Backbone, Params]:
        """The backbone, and all parameters, as all parts adapted them."""
        backbone = self.backbone
        # Trees of arrays do not keep those of parts that have no parameters.
        params = {**{name: {} for name in self.parts}, **params}
        for name, part in self.parts.items():
            backbone, params = part.adapt(params[name], backbone, params)
        return backbone, params


def _of_one_part(name: str, visit: Visit) -> Any:
    """The visit's `do` on the carries of all parts, of which it sees its own."""

    def do(carries: dict[str, Any], stream: Stream, x: Any) -> tuple[dict[str, Any], Stream, Any]:
        carry, stream, out = visit.do(carries[name], stream, x)
        return {**carries, name: carry}, stream, out

    return do
