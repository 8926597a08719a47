"""What a loss is: a row that says which part it is about, what it reads, and over what it is taken."""

import dataclasses
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import jax

from prophy_jax.models.backbone import Params
from prophy_jax.models.beside.part import Output, Part

Batch = Mapping[str, jax.Array]  # arrays of `prophy_jax.data.batch`, leading B


class Seen(NamedTuple):
    """One forward pass on b clips, as a loss sees it."""

    error: jax.Array  # (b,) fp32, the diffusion loss of each clip
    output: Output
    reference: Output | None = None  # of the model without its parts, no gradient; for losses that ask for it
    part: Any = None  # the part that the loss is about
    of_part: Any = None  # what that part's `leave` returned


def clips(batch: Batch, reduction: str) -> int:
    """How many clips the batch has."""
    return len(batch["latents"])


@dataclasses.dataclass(frozen=True)
class Loss:
    """One row of the table. It has `share`, for what a forward pass gives, or `whole`.

    Attributes:
        part: The class of the part that it is about; None: no part.
        needs: An attribute of that part that must not be None; "": none.
        fields: Fields of the batch that it reads, besides those of the prompt.
        share: (seen, microbatch, count) -> scalar: what a microbatch adds to the loss of the whole batch.
        whole: (part, its parameters, batch, reduction) -> scalar, once over the whole batch: for losses that
            compare clips with each other and need no forward pass. Captions are never dropped there.
        count: (batch, reduction) -> what `share` divides by, of the whole batch: accumulation is exact.
        reduction: "mean" or "sum", where the configuration names none.
        reference: Whether it reads `Seen.reference`.
        misfit: (part, shapes of `fields` of one clip) -> what does not fit together, "" if all does.
        idle: (part, clips of a batch, which of `fields` are zero in all clips) -> that it is constant and
            why, with what that means and what to do; "" if it can teach something.
    """

    part: type[Part] | None = None
    needs: str = ""
    fields: tuple[str, ...] = ()
    share: Callable[[Seen, Batch, Any], jax.Array] | None = None
    whole: Callable[[Any, Params, Batch, str], jax.Array] | None = None
    count: Callable[[Batch, str], Any] = clips
    reduction: str = "sum"
    reference: bool = False
    misfit: Callable[[Any, Mapping[str, tuple[int, ...]]], str] = lambda part, shapes: ""
    idle: Callable[[Any, int, AbstractSet[str]], str] = lambda part, clips, zero: ""
