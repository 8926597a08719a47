"""The losses that a configuration can name, and how a training step adds them up.

A configuration lists the losses that it wants with their weights, `losses = dict(relative=0.1, ...)`; one
that is not listed is not computed. The diffusion loss is always there, with weight 1 unless it is listed.
"""

import dataclasses
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import jax

from prophy_jax import models
from prophy_jax.losses import prophy
from prophy_jax.losses.loss import Batch, Loss, Seen
from prophy_jax.models.backbone import Params
from prophy_jax.models.beside.part import Model, Output
from prophy_jax.run.errors import UserError


def _diffusion(seen: Seen, batch: Batch, count: Any) -> jax.Array:
    return len(seen.error) / count * seen.error.mean()


DIFFUSION = "diffusion"
TABLE: dict[str, Loss] = {DIFFUSION: Loss(share=_diffusion), **prophy.LOSSES}


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The losses of one run.

    Attributes:
        rows: Name -> loss, in the order in which they are added up.
        weights: By name.
        reductions: "mean" or "sum", by name.
        parts: Name of the part that each loss is about; "": no part.
    """

    rows: Mapping[str, Loss]
    weights: Mapping[str, float]
    reductions: Mapping[str, str]
    parts: Mapping[str, str]

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of the batch that the losses read."""
        return tuple(dict.fromkeys(field for loss in self.rows.values() for field in loss.fields))

    @property
    def reference(self) -> bool:
        """Whether the model without its parts must be run too."""
        return any(loss.reference for loss in self.rows.values())

    def check(self, model: Model, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises UserError on a loss whose part does not fit the fields of a clip, of these shapes."""
        for name, loss in self.rows.items():
            if misfit := loss.misfit(model.parts.get(self.parts[name]), shapes):
                raise UserError(
                    f"config.parts.{self.parts[name]} does not fit the data, for loss {name!r}: {misfit}"
                )

    def idle(self, model: Model, clips: int, zero: AbstractSet[str]) -> dict[str, str]:
        """Which losses are constant and why, for `model`; `zero` are the fields that are 0 in all clips."""
        reasons = {
            name: loss.idle(model.parts.get(self.parts[name]), clips, zero)
            for name, loss in self.rows.items()
            if self.weights[name]
        }
        return {name: reason for name, reason in reasons.items() if reason}

    def counts(self, batch: Batch) -> dict[str, Any]:
        """What the losses of a forward pass are divided by, from the whole batch."""
        return {
            name: loss.count(batch, self.reductions[name]) for name, loss in self.rows.items() if loss.share
        }

    def share(
        self,
        model: Model,
        output: Output,
        reference: Output | None,
        error: jax.Array,
        batch: Batch,
        counts: Mapping[str, Any],
    ) -> dict[str, jax.Array]:
        """What the forward pass of a microbatch adds to each loss of the whole batch."""
        terms = {}
        for name, loss in self.rows.items():
            if loss.share:
                part = self.parts[name]
                seen = Seen(error, output, reference, model.parts.get(part), output.seen.get(part))
                terms[name] = loss.share(seen, batch, counts[name])
        return terms

    def whole(self, model: Model, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """The losses that compare the clips of the whole batch with each other."""
        return {
            name: loss.whole(model.parts.get(part), params.get(part, {}), batch, self.reductions[name])
            for (name, loss), part in zip(self.rows.items(), self.parts.values(), strict=True)
            if loss.whole
        }

    def total(self, terms: Mapping[str, jax.Array]) -> Any:
        """The weighted sum."""
        return sum(self.weights[name] * value for name, value in terms.items())


def choose(weights: Mapping[str, float], reductions: Mapping[str, str], model: Model) -> Chosen:
    """The losses that a configuration names, for a model.

    Args:
        weights: `config.losses`.
        reductions: `config.reduction`, "mean" or "sum" by loss.
        model: Has the parts that the losses are about.

    Raises:
        UserError: on an unknown loss or reduction, and on one about a part that the model lacks.
    """
    if unknown := sorted(set(weights) - set(TABLE)):
        raise UserError(f"config.losses names {unknown}; choose from {tuple(TABLE)}")
    rows = {name: loss for name, loss in TABLE.items() if name in weights or name == DIFFUSION}
    reductions = {name: reductions.get(name, loss.reduction) for name, loss in rows.items()}
    for name, reduction in reductions.items():
        if reduction not in ("mean", "sum"):
            raise UserError(f"config.reduction.{name}={reduction!r}: choose mean or sum")
    parts = {name: _find_part(name, loss, model) for name, loss in rows.items()}
    return Chosen(rows, {DIFFUSION: 1.0, **weights}, reductions, parts)


def _find_part(name: str, loss: Loss, model: Model) -> str:
    if loss.part is None:
        return ""
    module = models.file_of(loss.part)
    places = [place for place, part in model.parts.items() if isinstance(part, loss.part)]
    if len(places) != 1:
        found = "no part" if not places else f"several parts ({', '.join(places)})"
        raise UserError(f"config.losses lists {name!r} but config.parts has {found} of module {module!r}")
    if loss.needs and getattr(model.parts[places[0]], loss.needs) is None:
        raise UserError(f"config.losses lists {name!r} but config.parts.{places[0]}.{loss.needs} is absent")
    return places[0]
