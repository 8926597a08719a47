"""`make_clip`: one procedural clip with its caption, category, masks and ground-truth state.

A clip shows one to three phenomena, each at its own station: the left, middle or right third of the
frame. It is a pure function of (seed, split, index, size, frames, fps), equal in every process.

Legend: F frames, S frame size in pixels; cells of the masks: T = (F-1)/4 + 1 in time, G = S/8 a side.
"""

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from prophy_jax.data.sandbox import captions, continua, mechanics
from prophy_jax.data.sandbox.render import BACKDROPS, Canvas, backdrop
from prophy_jax.data.taxonomy import PHENOMENA, multi_hot
from prophy_jax.run.errors import UserError

SPLITS = ("train", "val", "test")
CELL = 8  # pixels a side of a cell of the masks, and
TIME = 4  # frames of one after the first: the finest tokens that models of such clips have


class Scene(NamedTuple):
    """One phenomenon."""

    name: str
    category: str
    simulate: Callable[[np.random.Generator, float, np.ndarray], dict[str, Any]]
    draw: Callable[[Canvas, dict[str, Any]], np.ndarray]


def _scene(module: ModuleType, name: str, category: str) -> Scene:
    """The scene whose functions in `module` end in its name."""
    functions = (getattr(module, f"{what}_{name}") for what in ("simulate", "draw"))
    return Scene(name, category, *functions)


SCENES = (
    _scene(mechanics, "bounce", "collision"),
    _scene(mechanics, "hit", "collision"),
    _scene(mechanics, "tumble", "rigid body motion"),
    _scene(mechanics, "spring", "elastic motion"),
    _scene(continua, "slosh", "liquid motion"),
    _scene(continua, "smoke", "gas motion"),
    _scene(mechanics, "press", "deformation"),
    _scene(continua, "melt", "melting"),
    _scene(continua, "freeze", "solidification"),
    _scene(continua, "blast", "explosion"),
    _scene(continua, "fire", "combustion"),
    _scene(continua, "mirror", "reflection"),
    _scene(continua, "beam", "refraction"),
)
_BY_NAME = {scene.name: scene for scene in SCENES}


@dataclasses.dataclass(frozen=True)
class Clip:
    """One example. `masks[k, i, j, e]` is the mean coverage of category e in cell (k, i, j)."""

    id: str
    frames: np.ndarray  # (F, S, S, 3) uint8
    caption: str
    category: np.ndarray  # (17,) float32 multi-hot
    masks: np.ndarray  # (T, G, G, 17) float16
    # {"fps": float, "scenes": [{"scene", "category", "place", ...}]}, JSON types only
    state: dict[str, Any]


def _plain(value: Any) -> Any:
    """NumPy values as JSON types, floats with 8 significant digits."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.8g}")
    return value.item() if isinstance(value, np.generic) else value


def check_shape(size: int, frames: int, fps: float) -> None:
    """Raises UserError unless the sandbox can draw clips of this shape."""
    if size % CELL or size < 32:
        raise UserError(f"sandbox: frame size {size} must be a multiple of 8, at least 32")
    if frames % TIME != 1 or frames < 5:
        raise UserError(f"sandbox: {frames} frames must be 4n + 1, at least 5")
    if fps <= 0:
        raise UserError(f"sandbox: fps {fps} must be positive")


def reduce_mask(coverage: np.ndarray) -> np.ndarray:
    """(F, S, S) pixel coverage -> (T, G, G) mean per cell, under causal timing.

    Cell 0 of time is frame 0 alone, cell k the frames 4k-3 .. 4k.
    """
    frames, size, _ = coverage.shape
    side = size // CELL
    cells = coverage.reshape(frames, side, CELL, side, CELL).mean((2, 4))  # (F, G, 8, G, 8) -> (F, G, G)
    later = cells[1:].reshape(-1, TIME, side, side).mean(1)  # (T-1, 4, G, G) -> (T-1, G, G)
    return np.concatenate([cells[:1], later])


def simulate_scene(scene: Scene, rng: np.random.Generator, place: str, times: np.ndarray) -> dict[str, Any]:
    """Ground truth of one scene at the (F,) times, JSON types only."""
    centre = (captions.PLACES.index(place) + 0.5) / 3
    truth = scene.simulate(rng, centre, times)
    # Drawing reads the rounded state, so that what is stored is exactly what is shown.
    return _plain({"scene": scene.name, "category": scene.category, "place": place, **truth})


def render_scene(clip: np.ndarray, place: str, state: dict[str, Any]) -> np.ndarray:
    """Draws one scene into clip (F, S, S, 3) float32; returns its pixel coverage (F, S, S)."""
    size = clip.shape[1]
    third = captions.PLACES.index(place)
    columns = slice(round(third * size / 3), round((third + 1) * size / 3))
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    canvas = Canvas(clip[:, :, columns], centres[columns], centres[:, None], 1 / size)
    coverage = np.zeros(clip.shape[:-1], np.float32)
    coverage[:, :, columns] = _BY_NAME[state["scene"]].draw(canvas, state)
    return coverage


def make_clip(seed: int, split: str, index: int, size: int = 64, frames: int = 13, fps: float = 8) -> Clip:
    """Makes clip number `index` of a split ("train", "val" or "test").

    Raises UserError on an unknown split, a size not a multiple of 8 or frames not 4n + 1.
    """
    if split not in SPLITS:
        raise UserError(f"sandbox: unknown split {split!r}; there are {', '.join(SPLITS)}")
    check_shape(size, frames, fps)
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    times = np.arange(frames) / fps
    present = sorted({scene.category for scene in SCENES}, key=PHENOMENA.index)
    count = int(rng.choice((1, 2, 3), p=(0.25, 0.4, 0.35)))
    categories = [present[i] for i in rng.choice(len(present), count, replace=False)]
    places = [captions.PLACES[i] for i in sorted(rng.choice(3, count, replace=False))]

    clip = backdrop(frames, size, int(rng.integers(len(BACKDROPS))))
    side = size // CELL
    masks = np.zeros(((frames - 1) // TIME + 1, side, side, len(PHENOMENA)), np.float16)
    states, clauses = [], []
    for category, place in zip(categories, places, strict=True):
        options = [scene for scene in SCENES if scene.category == category]
        scene = options[int(rng.integers(len(options)))]
        state = simulate_scene(scene, rng, place, times)
        coverage = render_scene(clip, place, state)
        masks[..., PHENOMENA.index(category)] = reduce_mask(np.clip(coverage, 0, 1))
        states.append(state)
        clauses.append(captions.clause(rng, split, scene.name, place, state))
    return Clip(
        id=f"{split}-{index:06d}",
        frames=np.clip(clip * 255 + 0.5, 0, 255).astype(np.uint8),
        caption=captions.caption(clauses),
        category=multi_hot(categories),
        masks=masks,
        state={"fps": fps, "scenes": states},
    )
