"""The word-hash text encoder: determinism, binding of clauses, truncation, the empty prompt."""

import hashlib

import numpy as np

from prophy_jax import models
from prophy_jax.models.text import hash_text

ENCODER = models.build(dict(module="hash_text", dim=256, length=16))


def _row(text: str, word: int) -> np.ndarray:
    return ENCODER([text])[0][0, word]


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_shapes_mask_and_zero_rows():
    text, mask = ENCODER(["A ball, falling!", ""])
    assert text.shape == (2, 16, 256) and text.dtype == np.float32
    assert mask.dtype == bool and mask.sum(axis=1).tolist() == [4, 1]  # words + end token
    assert not text[~mask].any()
    # Every row is scaled to mean square 1; 1e-5 covers float32 rounding.
    np.testing.assert_allclose(np.square(text[mask]).mean(axis=1), 1.0, atol=1e-5)


def test_the_same_bits_everywhere():
    # A constant, not a second run: a change of the encoder makes prepared data sets unreadable.
    text, _ = ENCODER(["A red ball falls, a blue box slides."])
    digest = hashlib.sha256(text.astype("<f4").tobytes()).hexdigest()
    assert digest == "da2c2a1a18ae5145feb09c0e3b3bb17750f50b9ef3184ec90ef92eb7478f5a8d"


def test_case_and_punctuation_do_not_matter_inside_a_clause():
    np.testing.assert_array_equal(ENCODER(["Red (ball)!"])[0], ENCODER(["red ball"])[0])


def test_words_are_nearly_orthogonal_and_near_gaussian():
    rows = np.stack([hash_text._word_vector(f"word{i}", 256) for i in range(200)])
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    off_diagonal = (unit @ unit.T)[~np.eye(200, dtype=bool)]
    # 1/sqrt(256) = 0.0625 is the standard deviation of the cosine of random vectors.
    assert abs(off_diagonal.std() - 0.0625) < 0.005 and abs(off_diagonal.mean()) < 0.005
    z = rows / rows.std()
    assert abs((np.abs(z) < 1).mean() - 0.683) < 0.02  # Gaussian mass within one deviation


def test_context_binds_words_to_their_clause():
    here, swapped = "a red ball falls, a blue box slides", "a blue ball falls, a red box slides"
    ball, ball_swapped = _row(here, 2), _row(swapped, 2)
    assert not np.array_equal(ball, ball_swapped)
    # The colour can be read off the row of "ball".
    red = hash_text._rotate("clause", hash_text._word_vector("red", 256))
    blue = hash_text._rotate("clause", hash_text._word_vector("blue", 256))
    assert _cosine(ball, red) > _cosine(ball, blue) + 0.1
    assert _cosine(ball_swapped, blue) > _cosine(ball_swapped, red) + 0.1


def test_decimal_point_ends_no_clause():
    assert hash_text.split_clauses("Falls 3.5 m; it's wet. Stops,") == [
        ["falls", "3.5", "m"],
        ["it's", "wet"],
        ["stops"],
    ]


def test_truncation_keeps_the_end_token_and_is_counted():
    long = " ".join(f"w{i}" for i in range(20))
    text, mask = ENCODER([long])
    assert mask.all() and ENCODER.words_lost(long) == 5
    assert ENCODER.words_lost("three short words") == 0
    end = hash_text._word_vector("</s>", 256)
    assert _cosine(text[0, -1], end) > 0.9 > 0.2 > _cosine(text[0, -2], end)
    # The lost words leave no trace.
    np.testing.assert_array_equal(text, ENCODER([" ".join(f"w{i}" for i in range(15))])[0])
