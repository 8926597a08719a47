"""Anti-aliased drawing for the sandbox: signed distances, soft coverage, paint and light.

Legend: F frames, S frame size in pixels, w width of one station in pixels.
Lengths are in frame sides, x to the right, y down, so a drawing does not depend on S. Quantities
that change with time are (F,) arrays; a shape is a coverage array (F, S, w) in [0, 1].
"""

import dataclasses
from typing import Any

import numpy as np

FLOOR = 0.84  # y of the floor line
COLOURS = {
    "red": (0.90, 0.20, 0.18),
    "yellow": (0.96, 0.80, 0.18),
    "green": (0.22, 0.72, 0.32),
    "blue": (0.18, 0.42, 0.92),
    "purple": (0.62, 0.26, 0.82),
}
WHITE, GREY, DARK = (0.95, 0.96, 0.98), (0.62, 0.64, 0.68), (0.16, 0.17, 0.20)
# Wall at the top, wall at the floor line, floor: muted, so that every named colour stands out.
BACKDROPS = (
    ((0.26, 0.31, 0.40), (0.46, 0.52, 0.58), (0.36, 0.33, 0.32)),
    ((0.34, 0.30, 0.38), (0.54, 0.49, 0.54), (0.33, 0.35, 0.38)),
    ((0.24, 0.34, 0.35), (0.47, 0.56, 0.54), (0.38, 0.35, 0.30)),
)
EDGE = 1.6  # width of an anti-aliased edge in pixels: softer than a box filter, and easier to code


@dataclasses.dataclass(frozen=True)
class Canvas:
    """One station: a writable view of the clip's pixels and their coordinates in frame sides."""

    rgb: np.ndarray  # (F, S, w, 3) float32
    x: np.ndarray  # (w,)
    y: np.ndarray  # (S, 1)
    pixel: float

    def paint(self, colour: Any, coverage: np.ndarray) -> None:
        """Lays `colour`, a triple or (F, S, w, 3), over the station."""
        self.rgb[:] += coverage[..., None] * (np.asarray(colour, np.float32) - self.rgb)

    def light(self, colour: Any, intensity: np.ndarray) -> None:
        """Adds light by the screen rule, which never exceeds white."""
        light = np.clip(intensity[..., None] * np.asarray(colour, np.float32), 0, 1)
        self.rgb[:] += light * (1 - self.rgb)

    def cover(self, distance: np.ndarray) -> np.ndarray:
        """Coverage of the region where the signed `distance` is negative."""
        coverage = np.clip(0.5 - distance / (EDGE * self.pixel), 0, 1).astype(np.float32)
        return np.broadcast_to(coverage, self.rgb.shape[:-1])


def backdrop(frames: int, size: int, choice: int) -> np.ndarray:
    """(F, S, S, 3) float32: a wall with a vertical gradient and a floor."""
    top, bottom, floor = np.asarray(BACKDROPS[choice], np.float32)
    y = ((np.arange(size, dtype=np.float32) + 0.5) / size)[:, None]
    wall = top + (bottom - top) * np.minimum(y / FLOOR, 1)
    ground = floor * (0.85 + 0.9 * np.maximum(y - FLOOR, 0))
    share = np.clip(0.5 + (y - FLOOR) * size / 2, 0, 1)
    column = wall + share * (ground - wall)
    return np.broadcast_to(column[None, :, None], (frames, size, size, 3)).copy()


def per_frame(values: Any) -> np.ndarray:
    """(F,) or a number -> (F, 1, 1), to meet (S, w) coordinates."""
    return np.asarray(values, np.float32).reshape(-1, 1, 1)


def local(canvas: Canvas, cx: Any, cy: Any, angle: Any = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates seen from a body at (cx, cy) that has turned by `angle` radians."""
    dx, dy = canvas.x - per_frame(cx), canvas.y - per_frame(cy)
    cos, sin = np.cos(per_frame(angle)), np.sin(per_frame(angle))
    return cos * dx + sin * dy, cos * dy - sin * dx


def disc(canvas: Canvas, cx: Any, cy: Any, radius: Any) -> np.ndarray:
    """Coverage of a disc."""
    u, v = local(canvas, cx, cy)
    return canvas.cover(np.hypot(u, v) - per_frame(radius))


def box(
    canvas: Canvas, cx: Any, cy: Any, half_x: Any, half_y: Any, angle: Any = 0.0, corner: Any = 0.02
) -> np.ndarray:
    """A rectangle with rounded corners."""
    u, v = local(canvas, cx, cy, angle)
    du = np.abs(u) - per_frame(half_x) + per_frame(corner)
    dv = np.abs(v) - per_frame(half_y) + per_frame(corner)
    outside = np.hypot(np.maximum(du, 0), np.maximum(dv, 0))
    return canvas.cover(outside + np.minimum(np.maximum(du, dv), 0) - per_frame(corner))


def below(canvas: Canvas, surface: np.ndarray) -> np.ndarray:
    """Everything under the curve y = `surface`, which broadcasts to (F, 1, w)."""
    return canvas.cover(np.asarray(surface, np.float32) - canvas.y)


def blob(canvas: Canvas, cx: Any, cy: Any, spread_x: Any, spread_y: Any) -> np.ndarray:
    """A Gaussian with peak 1."""
    u, v = local(canvas, cx, cy)
    return np.exp(-0.5 * ((u / per_frame(spread_x)) ** 2 + (v / per_frame(spread_y)) ** 2))


def ball(canvas: Canvas, cx: Any, cy: Any, radius: float, colour: Any, flip: float = 1.0) -> np.ndarray:
    """Paints a ball lit from the upper left (`flip=-1`: its image in a horizontal mirror)."""
    u, v = local(canvas, cx, cy)
    from_light = ((u + 0.35 * radius) ** 2 + (flip * v + 0.35 * radius) ** 2) / radius**2
    shade = (1.06 - 0.22 * np.minimum(from_light, 3))[..., None] * np.asarray(colour, np.float32)
    shade += 0.35 * np.exp(-2.5 * from_light)[..., None]
    coverage = disc(canvas, cx, cy, radius)
    canvas.paint(shade, coverage)
    return coverage


def shadow(canvas: Canvas, cx: Any, half_width: Any, height: Any) -> None:
    """Darkens the floor under a body that floats `height` above it."""
    height = np.maximum(np.asarray(height, np.float32), 0)
    strength = per_frame(0.5 / (1 + 6 * height))
    spread = np.asarray(half_width, np.float32) * (0.7 + 0.4 * height)
    canvas.paint((0.08, 0.08, 0.10), strength * blob(canvas, cx, FLOOR + 0.025, spread, 0.022))


def tank(canvas: Canvas, cx: float, half_width: float, top: float, bottom: float) -> np.ndarray:
    """Paints the back of an open glass tank; returns the coverage of its inside. See `rim`."""
    middle, half = (top + bottom) / 2, (bottom - top) / 2
    inside = box(canvas, cx, middle, half_width, half)
    canvas.paint((0.80, 0.87, 0.92), 0.28 * inside)
    return inside


def fill(canvas: Canvas, coverage: np.ndarray, surface: Any, colour: Any) -> None:
    """Paints a liquid that darkens with depth and has a bright surface at y = `surface`."""
    depth = np.maximum(canvas.y - np.asarray(surface, np.float32), 0)
    shade = 1.05 - 1.1 * np.minimum(depth, 0.4)
    bright = 0.35 * np.exp(-depth / 0.03)
    pixels = shade[..., None] * np.asarray(colour, np.float32) + bright[..., None]
    canvas.paint(pixels, 0.92 * coverage)


def rim(canvas: Canvas, cx: float, half_width: float, top: float, bottom: float) -> None:
    """Paints the front of the glass tank: two walls and a bottom."""
    wall, middle, half = 0.014, (top + bottom) / 2, (bottom - top) / 2
    for side in (-1, 1):
        x = cx + side * half_width
        canvas.paint(WHITE, 0.75 * box(canvas, x, middle, wall, half, corner=0.01))
    canvas.paint(WHITE, 0.75 * box(canvas, cx, bottom, half_width + wall, wall, corner=0.01))
