"""The sandbox: its laws, masks, captions and determinism."""

import hashlib
import json
import os
import string
import subprocess
import sys

import numpy as np
import pytest

from prophy_jax.data import taxonomy
from prophy_jax.data.sandbox import captions
from prophy_jax.data.sandbox.clip import (
    SCENES,
    SPLITS,
    make_clip,
    reduce_mask,
    render_scene,
    simulate_scene,
)
from prophy_jax.data.sandbox.render import backdrop
from prophy_jax.run.errors import UserError
from tests.sandbox_laws import law_residual

NAMES = [scene.name for scene in SCENES]
# The state keeps 8 digits, which second differences (tumble) enlarge; Chipmunk integrates the
# spring with an error of order (omega h)^2.
TOLERANCE = {"spring": 1e-3, "tumble": 1e-4}
# One number of the state and a factor that must break the law.
BREAK = {
    "bounce": ("restitution", 1.1),
    "hit": ("restitution", 1.1),
    "tumble": ("spin", 1.1),
    "spring": ("stiffness", 1.1),
    "slosh": ("gravity", 1.1),
    "smoke": ("spread", 40),  # wider than the grid that weighs the smoke
    "press": ("area", 1.1),
    "melt": ("power", 1.1),
    "freeze": ("rate", 1.1),
    "blast": ("energy", 1.1),
    "fire": ("heat", 1.1),
    "mirror": ("axis", 1.1),
    "beam": ("index", 1.1),
}


def _simulate(scene, seed: int, frames: int = 13, fps: float = 8):
    return simulate_scene(scene, np.random.default_rng(seed), "middle", np.arange(frames) / fps)


def _render(state, size: int = 64, frames: int = 13):
    clip = backdrop(frames, size, 0)
    return clip, render_scene(clip, "middle", state)


@pytest.mark.parametrize("scene", SCENES, ids=NAMES)
def test_law_holds(scene):
    for seed in range(10):
        for frames, fps in ((13, 8), (5, 8), (49, 16)):
            residual = law_residual(_simulate(scene, seed, frames, fps))
            assert residual < TOLERANCE.get(scene.name, 1e-5), (seed, frames)


@pytest.mark.parametrize("scene", SCENES, ids=NAMES)
def test_law_can_fail(scene):
    state = _simulate(scene, 0)
    key, factor = BREAK[scene.name]
    broken = state | {key: factor * state[key]}
    assert law_residual(broken) > 0.01


def test_balls_bounce_and_collide():
    """The law of an impact must not hold for want of impacts."""
    by_name = dict(zip(NAMES, SCENES, strict=True))
    for seed in range(10):
        assert _simulate(by_name["bounce"], seed)["impacts"]
        assert 0 < _simulate(by_name["hit"], seed)["impact"]["time"] < 1.2


@pytest.mark.parametrize("size", (32, 64))
def test_masks_lie_on_what_the_state_says(size):
    by_name = dict(zip(NAMES, SCENES, strict=True))
    y = (np.arange(size) + 0.5) / size

    state = _simulate(by_name["bounce"], 3)
    _, mask = _render(state, size)
    centre = (mask * y[:, None]).sum((1, 2)) / mask.sum((1, 2))
    np.testing.assert_allclose(centre, state["y"], atol=0.1 / size)  # a tenth of a pixel

    state = _simulate(by_name["slosh"], 3)
    _, mask = _render(state, size)
    area = mask.sum((1, 2)) / size**2
    np.testing.assert_allclose(area / area[0], 1, atol=0.04)  # the soft surface blurs the slope

    state = _simulate(by_name["press"], 3)
    _, mask = _render(state, size)
    area = mask.sum((1, 2)) / size**2
    np.testing.assert_allclose(area, state["area"], rtol=0.06)  # the corners are rounded


def test_mirror_image_is_the_mirrored_ball():
    state = _simulate(dict(zip(NAMES, SCENES, strict=True))["mirror"], 0)
    empty = _render(state | {"y": [-9.0] * 13, "image_y": [9.0] * 13})[0]
    changed = np.abs(_render(state)[0] - empty).sum(-1) > 0.15  # (F, S, S)
    rows = np.where(changed, ((np.arange(64) + 0.5) / 64)[:, None], np.nan)
    for part, y in ((rows[:, :32], state["y"]), (rows[:, 32:], state["image_y"])):
        middle = (np.nanmin(part, (1, 2)) + np.nanmax(part, (1, 2))) / 2
        np.testing.assert_allclose(middle, y, atol=1 / 64)  # a pixel: the extent is in whole rows


def test_reduce_mask_follows_causal_timing():
    coverage = np.zeros((13, 64, 64), np.float32)
    coverage[5, 8:16, 16:24] = 1  # frame 5 is the first of latent 2
    tokens = reduce_mask(coverage)
    assert tokens.shape == (4, 8, 8)
    assert tokens[2, 1, 2] == 0.25 and tokens.sum() == 0.25
    coverage[0, :4, :8] = 1
    assert reduce_mask(coverage)[0, 0, 0] == 0.5


@pytest.mark.parametrize("size, frames", ((32, 5), (48, 9), (64, 13), (64, 17)))
def test_clip_fields(size, frames):
    seen = set()
    for index in range(12):
        clip = make_clip(1, "train", index, size, frames)
        side, times = size // 8, (frames - 1) // 4 + 1
        assert clip.id == f"train-{index:06d}"
        assert clip.frames.shape == (frames, size, size, 3) and clip.frames.dtype == np.uint8
        assert clip.masks.shape == (times, side, side, 17) and clip.masks.dtype == np.float16
        assert clip.masks.min() >= 0 and clip.masks.max() <= 1
        present = clip.masks.any((0, 1, 2))
        np.testing.assert_array_equal(present, clip.category > 0)
        assert json.loads(json.dumps(clip.state)) == clip.state
        assert 1 <= len(clip.state["scenes"]) <= 3
        seen.add(len(clip.state["scenes"]))
        assert np.abs(np.diff(clip.frames.astype(int), axis=0)).max() > 60  # something moves
    assert seen == {1, 2, 3}


def test_phenomena_stay_in_the_place_that_the_caption_names():
    for index in range(20):
        clip = make_clip(2, "val", index)
        places = [state["place"] for state in clip.state["scenes"]]
        clauses = clip.caption.rstrip(".").split("; ")
        assert len(set(places)) == len(places) == len(clauses)
        for state, words in zip(clip.state["scenes"], clauses, strict=True):
            assert captions.WHERE[state["place"]] in words
            # Mean column of the mask, in thirds of the frame.
            mask = clip.masks[..., taxonomy.WISA.index[state["category"]]].astype(np.float64)
            columns = (np.arange(8) + 0.5) / 8
            third = 3 * (mask.sum((0, 1)) * columns).sum() / mask.sum()
            assert int(third) == captions.PLACES.index(state["place"])
        for third, place in enumerate(captions.PLACES):
            columns = clip.frames[:, :, round(third * 64 / 3) : round((third + 1) * 64 / 3)]
            empty = np.all(columns == columns[:1, :, :1])
            assert empty == (place not in places)


def test_all_groups_are_covered():
    present = {taxonomy.WISA.index[scene.category] for scene in SCENES}
    assert len(present) == 12
    assert all(present & set(group) for group in taxonomy.WISA.groups.values())
    shown = sum(make_clip(0, "train", index, 32, 5).category for index in range(120))
    assert set(np.flatnonzero(shown)) == present


def test_held_out_wordings_use_training_words():
    assert set(captions.TEMPLATES) == set(NAMES)
    words = [set(), set()]
    for pair in captions.TEMPLATES.values():
        assert not set(pair[0]) & set(pair[1])
        for known, templates in zip(words, pair, strict=True):
            known.update(w.strip(string.punctuation) for t in templates for w in t.split())
    assert words[1] <= words[0], words[1] - words[0]


def _digest(split: str, index: int) -> str:
    clip = make_clip(3, split, index)
    whole = clip.frames.tobytes() + clip.masks.tobytes() + repr((clip.caption, clip.state)).encode()
    return hashlib.sha256(whole).hexdigest()


def test_same_clip_in_another_process():
    code = "from tests.sandbox_test import _digest; print(_digest('test', 7))"
    environment = os.environ | {"PYTHONHASHSEED": "123"}
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    output = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
        env=environment,
    )
    assert output.stdout.strip() == _digest("test", 7)


def test_clips_and_splits_differ():
    digests = {_digest(split, index) for split in SPLITS for index in range(5)}
    assert len(digests) == 15


@pytest.mark.parametrize("arguments", [("dev", 0), ("train", 0, 60), ("train", 0, 16), ("train", 0, 64, 12)])
def test_bad_requests_raise(arguments):
    with pytest.raises(UserError, match="sandbox"):
        make_clip(0, *arguments)
