"""Prompts: cleaning, and the tokens that a T5 text encoder reads.

B batch, L text length.
"""

import dataclasses
import html
import importlib.util
import json
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from prophy_jax.run.errors import UserError

PAD_ID, END_ID = 0, 1  # of every T5 tokenizer
# The rows of an embedding are the tokenizer's tokens and a few more. T5 has 32 thousand, UMT5 256 thousand.
_LEAST_SHARE = 0.9
_REMEDY = "give the tokenizer folder that came with the text encoder"


def clean(text: str) -> str:
    """The prompt as Wan2.1 encodes it (Wan2.1 reference code, diffusers).

    Repairs wrongly decoded text, resolves HTML entities, also doubly escaped ones, and turns every run of
    white space into one space, none at the ends. Case and punctuation stay, except for what `ftfy` fixes:
    full-width letters and punctuation become plain, curly quotes straight. The CogVideoX reference code
    cleans nothing: plain prompts are the same to both.
    """
    import ftfy  # here: the benchmarks import this file and run without ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Prompts to token ids; see `load_tokenizer`."""

    backend: Any  # a transformers tokenizer, backed by the tokenizers library

    def __call__(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Cleans and tokenizes prompts.

        Args:
            texts: B prompts; "" is valid and becomes the end token alone.
            length: L. A longer prompt loses its last tokens, never the end token.

        Returns:
            ids (B, L) int32, zero after the end token, and mask (B, L) bool, True up to it.
        """
        if not texts:
            return np.zeros((0, length), np.int32), np.zeros((0, length), bool)
        encoded = self.backend(
            [clean(text) for text in texts],
            padding="max_length",
            max_length=length,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="np",
        )
        return encoded["input_ids"].astype(np.int32), encoded["attention_mask"].astype(bool)

    def lost(self, text: str, length: int) -> str:
        """The end of the cleaned prompt that does not fit into `length` tokens; "" if all of it does."""
        text = clean(text)
        encoded = self.backend(text, add_special_tokens=False, return_offsets_mapping=True)
        cut = encoded["offset_mapping"][length - 1 :]  # one place is the end token's
        return text[cut[0][0] :].strip() if cut else ""


def load_tokenizer(folder: str | os.PathLike, vocab_size: int) -> Tokenizer:
    """Reads a T5 tokenizer from local files.

    Args:
        folder: Holds `tokenizer.json` or `spiece.model`, and `tokenizer_config.json`: `google/umt5-xxl`
            of the official Wan2.1 files, `tokenizer` of the diffusers ones, CogVideoX's too.
        vocab_size: Rows of the text encoder's embedding.

    Raises:
        UserError: when files are missing or damaged, or when the tokenizer is not a T5 one or does not
            belong to an encoder of this size.
    """
    folder = os.fspath(folder)
    _check_files(folder)
    backend = _load(folder)
    pad, empty = backend.pad_token_id, backend("").input_ids
    if (pad, backend.eos_token_id, empty) != (PAD_ID, END_ID, [END_ID]):
        raise UserError(
            f"{folder} is no T5 tokenizer: it pads with {pad} and turns an empty prompt into {empty}, "
            f"T5 pads with {PAD_ID} and gives [{END_ID}]; {_REMEDY}"
        )
    if not _LEAST_SHARE * vocab_size <= len(backend) <= vocab_size:
        raise UserError(
            f"the tokenizer {folder} has {len(backend)} tokens, the text encoder {vocab_size} rows: "
            f"they are of different models; {_REMEDY}"
        )
    return Tokenizer(backend)


def _check_files(folder: str) -> None:
    def present(name: str) -> bool:
        return os.path.isfile(os.path.join(folder, name))

    if not present("tokenizer.json") and not present("spiece.model"):
        raise UserError(f"{folder} holds neither tokenizer.json nor spiece.model: {_REMEDY}")
    if not present("tokenizer_config.json"):
        raise UserError(f"{folder} holds no tokenizer_config.json: {_REMEDY}")
    if not present("tokenizer.json") and importlib.util.find_spec("sentencepiece") is None:
        raise UserError(
            f"{folder} holds spiece.model but no tokenizer.json: reading it takes one more package, "
            "pip install sentencepiece protobuf"
        )
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if present(name):
            path = os.path.join(folder, name)
            try:
                with open(path, encoding="utf-8") as file:
                    json.load(file)
            except (OSError, ValueError, RecursionError) as error:
                raise UserError(f"{path} is damaged ({error}): download it again") from error


def _load(folder: str) -> Any:
    # Without these, transformers says that it found no PyTorch, which is not needed here, and tokenizers
    # warns on stderr about every process that forks after a batch of prompts.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers  # takes seconds, and only real text encoders need it

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        backend = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    # The tokenizers library raises bare Exceptions, and transformers asks for another package after a
    # damaged spiece.model: neither message helps.
    except Exception as error:
        raise UserError(
            f"transformers cannot read the tokenizer in {folder}: download its files again"
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    backend.model_max_length = int(1e30)  # the caller gives the length: no warning about another one
    return backend
