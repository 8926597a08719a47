"""What a training batch holds: one row of `FIELDS` for each of its arrays.

`prophy_jax.data.records` makes the schema of the files from these rows, `prophy_jax.data.loader` the batches,
and `shapes` says what to compile for. A new field needs a row, and a command that writes it. One that is not
stored as it is in the batch also says what is stored, and how it is read.

T h w latent grid, N tokens, L text length, D text width, n stored rows of one text, E categories, P of them
with a map.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from prophy_jax.data import taxonomy

if TYPE_CHECKING:
    import jax

RECORDS = "records"  # the data set that prepare writes; all others are side data sets
MADE_BY = {  # the command, by data set
    RECORDS: "prophy_jax.prepare",
    "alignment": "prophy_jax.label --vlm=QWEN2.5-VL",
}


def how_to_make(dataset: str, data: str | Path, out: str | Path) -> str:
    """The command line that makes a side data set of `data`, for messages."""
    command = MADE_BY.get(dataset)
    return f"python -m {command} --data={data} --out={out}" if command else "its command"


class Sizes(NamedTuple):
    """What the shapes of one bucket follow from."""

    latent_shape: tuple[int, int, int, int]  # T h w 16
    token_grid: tuple[int, int, int]
    text_length: int
    text_dim: int
    categories: int = len(taxonomy.WISA.names)  # E

    @classmethod
    def of(cls, manifest: Mapping[str, Any], bucket: str) -> "Sizes":
        """Those that the manifest of a folder of records states."""
        found = manifest["buckets"][bucket]
        latents, grid = tuple(found["latent_shape"]), tuple(found["token_grid"])
        categories = len(taxonomy.names_of(manifest))
        return cls(latents, grid, manifest["text_length"], manifest["text_dim"], categories)

    @property
    def tokens(self) -> int:
        """N."""
        return math.prod(self.token_grid)


Arrays = Mapping[str, np.ndarray]  # of one stored example, by column


@dataclasses.dataclass(frozen=True)
class Column:
    """An array of a stored example.

    Attributes:
        shape: None in it: as many rows as the example has.
        dtype: as stored.
        as_bytes: False stores a list of numbers, as TFDS does by default.
        optional: data sets may lack it.
    """

    shape: Callable[[Sizes], tuple[int | None, ...]]
    dtype: Any
    as_bytes: bool = True
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class Field:
    """An array of the batch.

    Attributes:
        shape: of one clip.
        dtype: in the batch.
        stored: the data set that has it: "records", or the name of a side data set.
        columns: what it adds to that data set; None is one column of its own name, shape and dtype.
        fill: (row, arrays) writes the whole row of one clip, from all columns of the data set; None copies
            the column of the same name.
        zero_if_absent: zeros stand for it where the side data set is not given; otherwise that is an error.
    """

    shape: Callable[[Sizes], tuple[int, ...]]
    dtype: Any
    stored: str = RECORDS
    columns: Mapping[str, Column] | None = None
    fill: Callable[[np.ndarray, Arrays], None] | None = None
    zero_if_absent: bool = False


def _fill_text(row: np.ndarray, arrays: Arrays) -> None:
    text = arrays["text"]  # (n, D)
    row[: len(text)] = text
    row[len(text) :] = 0


def _fill_text_mask(row: np.ndarray, arrays: Arrays) -> None:
    count = len(arrays["text"])
    row[:count] = arrays.get("text_mask", True)  # without a mask, every stored row is a word or the end
    row[count:] = False


def _fill_alignment(row: np.ndarray, arrays: Arrays) -> None:
    row[:] = 0
    row[:, arrays["present"] > 0] = arrays["maps"].T  # (P, N) -> (N, P)


def _fill_alignment_present(row: np.ndarray, arrays: Arrays) -> None:
    row[:] = arrays["present"]


def _categories(sizes: Sizes) -> tuple[int, ...]:
    return (sizes.categories,)


FIELDS: dict[str, Field] = {
    # Normalised, as the codec gives them; float16 is 3 digits, for a third of the disk and of the traffic.
    "latents": Field(lambda sizes: sizes.latent_shape, np.float16),
    # Padded as its encoder pads it. Rows that are not stored are zero.
    "text": Field(
        lambda sizes: (sizes.text_length, sizes.text_dim),
        np.float16,
        columns={"text": Column(lambda sizes: (None, sizes.text_dim), np.float16)},
        fill=_fill_text,
    ),
    # Multi-hot, in the order of the taxonomy.
    "category": Field(
        _categories, np.float32, columns={"category": Column(_categories, np.float32, as_bytes=False)}
    ),
    # True on the words and their end.
    "text_mask": Field(
        lambda sizes: (sizes.text_length,),
        np.bool_,
        columns={"text_mask": Column(lambda sizes: (None,), np.uint8, optional=True)},
        fill=_fill_text_mask,
    ),
    # Of every token, how much of each category is there. Stored row i of "maps" is the i-th one present.
    "alignment": Field(
        lambda sizes: (sizes.tokens, sizes.categories),
        np.float16,
        stored="alignment",
        columns={"maps": Column(lambda sizes: (None, sizes.tokens), np.float16)},
        fill=_fill_alignment,
        zero_if_absent=True,
    ),
    # 1 where "alignment" is known.
    "alignment_present": Field(
        _categories,
        np.float32,
        stored="alignment",
        columns={"present": Column(_categories, np.float32, as_bytes=False)},
        fill=_fill_alignment_present,
        zero_if_absent=True,
    ),
}


def own_columns(name: str) -> Mapping[str, Column]:
    """The columns that the field `name` adds to its data set, by name."""
    field = FIELDS[name]
    return {name: Column(field.shape, field.dtype)} if field.columns is None else field.columns


def columns(dataset: str) -> dict[str, Column]:
    """All columns of a data set, by name."""
    owners = [name for name, field in FIELDS.items() if field.stored == dataset]
    return {column: found for name in owners for column, found in own_columns(name).items()}


def shapes(names: Iterable[str], sizes: Sizes, clips: int) -> dict[str, "jax.ShapeDtypeStruct"]:
    """Shape (clips, ...) and dtype of the named arrays of a batch."""
    import jax  # the data are read and written without it

    return {
        name: jax.ShapeDtypeStruct((clips, *FIELDS[name].shape(sizes)), np.dtype(FIELDS[name].dtype))
        for name in names
    }
