"""A text encoder without weights: every word is a fixed random vector, mixed with its context.

It stands in for T5 in demonstrations and tests. Each output row carries the word itself, the other
words of its clause and, weaker, the whole prompt, so that cross-attention, which sees no positions,
can tell "a red ball falls, a blue box slides" from "a blue ball falls, a red box slides".

B batch, L text length, D embedding width, n words of one prompt.
"""

import functools
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# A mean of n random unit vectors has norm 1/sqrt(n): with 2.0 a clause of 4 words weighs as much as the
# word itself.
CLAUSE_WEIGHT = 2.0
PROMPT_WEIGHT = 1.0
_CLAUSE_END = re.compile(r"[;.,](?=\s|$)")  # the point in "3.5" ends no clause
_WORD = re.compile(r"\w+(?:['.]\w+)*")
_END_TOKEN = "</s>"  # not a match of _WORD, so no word of a prompt has its vector


def split_clauses(text: str) -> list[list[str]]:
    """Lower-case words without punctuation, one list per clause that has any."""
    clauses = [_WORD.findall(clause) for clause in _CLAUSE_END.split(text.lower())]
    return [clause for clause in clauses if clause]


@functools.lru_cache(maxsize=65536)
def _word_vector(word: str, dim: int) -> np.ndarray:
    """(D,) float64, near-Gaussian integers: sums of 8 uniform bytes drawn from the word's hash.

    Integers keep every later sum exact, so the encoder gives the same bits on every machine.
    """
    seed = hashlib.sha256(word.encode()).digest()
    stream = np.frombuffer(hashlib.shake_256(seed).digest(8 * dim), np.uint8)
    sums = stream.reshape(dim, 8).sum(axis=1, dtype=np.int64)  # (D * 8,) -> (D, 8) -> (D,)
    vector = (sums - 8 * 255 // 2).astype(np.float64)
    vector.setflags(write=False)  # the cache hands the same array to every caller
    return vector


@functools.lru_cache(maxsize=8)
def _rotation(name: str, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """A fixed random signed permutation, (R v)[i] = sign[i] v[order[i]]: R is orthogonal."""
    keys = np.frombuffer(hashlib.shake_256(name.encode()).digest(9 * dim), np.uint8)
    order = np.argsort(keys[: 8 * dim].view("<u8"), kind="stable")
    sign = np.where(keys[8 * dim :] % 2 == 0, 1.0, -1.0)
    return order, sign


def _rotate(name: str, vector: np.ndarray) -> np.ndarray:
    order, sign = _rotation(name, vector.shape[-1])
    return sign * vector[order]


@dataclass(frozen=True)
class HashText:
    """Word-hash text encoder.

    Row i is, scaled to mean square 1 over its D entries,
    `h(word_i) + 2 R1 mean(h(words of its clause)) + R2 mean(h(all words))`; clauses end at ";", "."
    and ",". One end token closes every prompt: "" is that token alone, the encoded empty prompt.

    Attributes:
        dim: D, the width of a row.
        length: L, the rows of every output; longer prompts lose their last words, not the end.
    """

    dim: int
    length: int

    def words_lost(self, text: str) -> int:
        """How many words of `text` do not fit into `length` rows."""
        return max(0, sum(map(len, split_clauses(text))) - (self.length - 1))

    def _encode_one(self, text: str) -> np.ndarray:
        """One prompt -> (n + 1, D) float32, n + 1 <= L."""
        kept: list[list[np.ndarray]] = []
        room = self.length - 1
        for clause in split_clauses(text):
            if room:
                kept.append([_word_vector(word, self.dim) for word in clause[:room]])
                room -= len(kept[-1])
        rows = []
        for vectors in kept:
            context = CLAUSE_WEIGHT * _rotate("clause", np.sum(vectors, axis=0) / len(vectors))
            rows += [vector + context for vector in vectors]
        rows.append(_word_vector(_END_TOKEN, self.dim))
        if kept:
            words = [vector for vectors in kept for vector in vectors]
            prompt = _rotate("prompt", np.sum(words, axis=0) / len(words))
            rows = [row + PROMPT_WEIGHT * prompt for row in rows]
        # fsum is exactly rounded: the norm does not depend on the order of the additions.
        return np.stack([row * math.sqrt(self.dim / math.fsum(row * row)) for row in rows]).astype(np.float32)

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes prompts.

        Args:
            texts: B prompts; "" is valid.

        Returns:
            text (B, L, D) float32, zero after a prompt's last row, and mask (B, L) bool, True on
            its words and its end token.
        """
        encoded = np.zeros((len(texts), self.length, self.dim), np.float32)
        mask = np.zeros((len(texts), self.length), bool)
        for index, text in enumerate(texts):
            rows = self._encode_one(text)
            encoded[index, : len(rows)] = rows
            mask[index, : len(rows)] = True
        return encoded, mask


def build(dim: int, length: int) -> HashText:
    """The encoder with rows of width `dim` and at most `length - 1` words plus the end token."""
    return HashText(dim=dim, length=length)
