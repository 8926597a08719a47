"""Bodies of the sandbox: bounce, hit, tumble, spring (Chipmunk, through pymunk) and press.

Each scene is two functions around one state. `simulate` picks the parameters at random and returns
the ground truth as numbers; `draw` paints a station from that state alone and returns the coverage
of the phenomenon. tests/sandbox_laws.py measures the law of each scene on its state. Speeds are
relative to the clip's duration, so that the process fills a clip of any length.

Legend: F frames, S frame size in pixels, w width of one station in pixels. Lengths in frame sides,
x to the right, y down, times in seconds, masses in arbitrary units.
"""

from typing import Any

import numpy as np
import pymunk

from prophy_jax.data.sandbox.render import (
    COLOURS,
    FLOOR,
    GREY,
    Canvas,
    ball,
    box,
    local,
    per_frame,
    shadow,
)

State = dict[str, Any]
SUBSTEPS = 24  # Chipmunk steps between two frames


def pick(rng: np.random.Generator, words: Any) -> str:
    """One of the words, each as likely."""
    words = tuple(words)
    return words[int(rng.integers(len(words)))]


def _space(gravity: float) -> pymunk.Space:
    space = pymunk.Space()
    space.gravity = (0.0, gravity)
    space.collision_slop = 1e-4  # the default, 0.1, is meant for lengths in pixels
    return space


def _floor(space: pymunk.Space) -> None:
    # Thick, so that no ball tunnels through it in one step.
    floor = pymunk.Segment(space.static_body, (-1, FLOOR + 0.5), (2, FLOOR + 0.5), 0.5)
    floor.elasticity = 1.0
    space.add(floor)


def _disc(
    space: pymunk.Space, centre: tuple, velocity: float, radius: float, mass: float, e: float
) -> pymunk.Body:
    body = pymunk.Body(mass, pymunk.moment_for_circle(mass, 0, radius))
    body.position, body.velocity = centre, (0.0, velocity)
    shape = pymunk.Circle(body, radius)
    shape.elasticity = e
    space.add(body, shape)
    return body


def _run(space: pymunk.Space, bodies: list, times: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns the trace ((F-1) SUBSTEPS + 1, bodies, 3) of y, velocity, angle; and the step."""
    step = float(times[1] - times[0]) / SUBSTEPS
    trace = [[(b.position.y, b.velocity.y, b.angle) for b in bodies]]
    for _ in range((len(times) - 1) * SUBSTEPS):
        space.step(step)
        trace.append([(b.position.y, b.velocity.y, b.angle) for b in bodies])
    return np.asarray(trace), step


# Collision, first kind: a ball falls and bounces on the floor.


def simulate_bounce(rng: np.random.Generator, cx: float, times: np.ndarray) -> State:
    gravity = rng.uniform(3.4, 4.8) / times[-1] ** 2
    radius, restitution = rng.uniform(0.085, 0.105), rng.uniform(0.65, 0.9)
    space = _space(gravity)
    _floor(space)
    body = _disc(space, (cx, rng.uniform(0.26, 0.36)), 0.0, radius, 1.0, restitution)
    trace, step = _run(space, [body], times)
    y, velocity = trace[:, 0, 0], trace[:, 0, 1]
    change = np.diff(velocity)
    hits = [k for k in np.flatnonzero(change < -0.5 / times[-1])]
    return {
        "colour": pick(rng, COLOURS),
        "radius": radius,
        "gravity": gravity,
        "restitution": restitution,
        "x": cx,
        "y": y[::SUBSTEPS],
        "velocity": velocity[::SUBSTEPS],
        "impacts": [[(k + 1) * step, velocity[k], velocity[k + 1]] for k in hits],
    }


def draw_bounce(canvas: Canvas, state: State) -> np.ndarray:
    y, radius = np.asarray(state["y"]), state["radius"]
    shadow(canvas, state["x"], radius, FLOOR - radius - y)
    return ball(canvas, state["x"], y, radius, COLOURS[state["colour"]])


# Collision, second kind: two balls meet in mid-air.


def simulate_hit(rng: np.random.Generator, cx: float, times: np.ndarray) -> State:
    duration = times[-1]
    gravity = rng.uniform(0.8, 1.4) / duration**2
    radii = rng.uniform(0.075, 0.1, size=2)
    masses = 100 * radii**2
    start = np.array([rng.uniform(0.12, 0.16), FLOOR - radii[1] - 0.01])
    fall = rng.uniform(0.25, 0.45) / duration
    meeting = rng.uniform(0.35, 0.5) * duration
    # Both fall by the same gravity, so the gap closes at a constant rate until the meeting.
    rise = fall - (start[1] - start[0] - radii.sum()) / meeting
    restitution = rng.uniform(0.7, 0.95)
    space = _space(gravity)
    _floor(space)
    # Chipmunk multiplies the elasticities of the two shapes.
    e = np.sqrt(restitution)
    bodies = [_disc(space, (cx, start[i]), (fall, rise)[i], radii[i], masses[i], e) for i in range(2)]
    trace, step = _run(space, bodies, times)
    y, velocity = trace[..., 0], trace[..., 1]
    k = int(np.argmax(np.diff(velocity[:, 1]) > 0.3 / duration))  # the lower ball is struck down
    first = pick(rng, COLOURS)
    return {
        "colour": first,
        "other": pick(rng, [c for c in COLOURS if c != first]),
        "radii": radii,
        "masses": masses,
        "gravity": gravity,
        "restitution": restitution,
        "x": cx,
        "y": y[::SUBSTEPS],
        "velocity": velocity[::SUBSTEPS],
        "impact": {
            "time": (k + 1) * step,
            "step": step,
            "before": velocity[k],
            "after": velocity[k + 1],
        },
    }


def draw_hit(canvas: Canvas, state: State) -> np.ndarray:
    y = np.asarray(state["y"])  # (F, 2)
    shadow(canvas, state["x"], state["radii"][1], FLOOR - state["radii"][1] - y[:, 1])
    upper = ball(canvas, state["x"], y[:, 0], state["radii"][0], COLOURS[state["colour"]])
    lower = ball(canvas, state["x"], y[:, 1], state["radii"][1], COLOURS[state["other"]])
    return np.maximum(upper, lower)


# Rigid body motion: a tossed block turns in the air.


def simulate_tumble(rng: np.random.Generator, cx: float, times: np.ndarray) -> State:
    duration, rise = times[-1], rng.uniform(0.28, 0.36)
    gravity = 8 * rise / duration**2
    half = np.array([rng.uniform(0.095, 0.11), rng.uniform(0.055, 0.07)])
    space = _space(gravity)
    body = pymunk.Body(1.0, pymunk.moment_for_box(1.0, tuple(2 * half)))
    body.position, body.velocity = (cx, FLOOR - 0.14), (0.0, -4 * rise / duration)
    body.angle = rng.uniform(-0.3, 0.3)
    body.angular_velocity = rng.choice((-1, 1)) * rng.uniform(0.35, 0.6) * 2 * np.pi / duration
    space.add(body)
    spin = body.angular_velocity
    trace, _ = _run(space, [body], times)
    return {
        "colour": pick(rng, COLOURS),
        "half": half,
        "gravity": gravity,
        "spin": spin,
        "times": times,
        "x": cx,
        "y": trace[::SUBSTEPS, 0, 0],
        "angle": trace[::SUBSTEPS, 0, 2],
    }


def draw_tumble(canvas: Canvas, state: State) -> np.ndarray:
    x, y, angle = state["x"], np.asarray(state["y"]), np.asarray(state["angle"])
    half_x, half_y = state["half"]
    shadow(canvas, x, half_x, FLOOR - 0.1 - y)
    coverage = box(canvas, x, y, half_x, half_y, angle)
    # One end is pale, so that the turning shows even after half a turn.
    u, _ = local(canvas, x, y, angle)
    pale = canvas.cover(-u)[..., None]
    colour = np.asarray(COLOURS[state["colour"]], np.float32)
    canvas.paint(colour + pale * (0.7 * (0.97 - colour)), coverage)
    return coverage


# Elastic motion: a block hangs on a spring.


def simulate_spring(rng: np.random.Generator, cx: float, times: np.ndarray) -> State:
    duration = times[-1]
    omega = 2 * np.pi * rng.uniform(0.75, 1.1) / duration
    gravity, anchor = 1.0 / duration**2, 0.05
    centre, swing = rng.uniform(0.43, 0.47), rng.choice((-1, 1)) * rng.uniform(0.13, 0.17)
    space = _space(gravity)
    body = pymunk.Body(1.0, 1.0)
    body.position = (cx, centre + swing)
    length = centre - anchor - gravity / omega**2
    spring = pymunk.DampedSpring(
        body, space.static_body, (0, 0), (cx, anchor), length, stiffness=omega**2, damping=0.0
    )
    space.add(body, spring)
    trace, _ = _run(space, [body], times)
    return {
        "colour": pick(rng, COLOURS),
        "half": rng.uniform(0.085, 0.1),
        "anchor": anchor,
        "stiffness": omega**2,
        "mass": 1.0,
        "centre": centre,
        "times": times,
        "x": cx,
        "y": trace[::SUBSTEPS, 0, 0],
    }


def draw_spring(canvas: Canvas, state: State) -> np.ndarray:
    x, y, half, anchor = state["x"], np.asarray(state["y"]), state["half"], state["anchor"]
    shadow(canvas, x, half, FLOOR - half - y)
    top, bottom = anchor, y - half
    along = (canvas.y - top) / per_frame(bottom - top)  # 0 at the anchor, 1 at the block
    coil = box(canvas, x, (top + bottom) / 2, 0.042, (bottom - top) / 2, corner=0.01)
    bands = 0.5 + 0.5 * np.cos(2 * np.pi * 3 * along)
    canvas.paint((0.30 + 0.5 * bands)[..., None] * np.ones(3, np.float32), coil)
    canvas.paint(GREY, box(canvas, x, anchor - 0.02, 0.11, 0.03))
    block = box(canvas, x, y, half, half)
    light = (1.05 - 2.0 * (canvas.y - per_frame(y)))[..., None]
    canvas.paint(light * np.asarray(COLOURS[state["colour"]], np.float32), block)
    return np.maximum(block, coil)


# Deformation: a press squeezes clay, which stays squeezed.


def simulate_press(rng: np.random.Generator, cx: float, times: np.ndarray) -> State:
    tall, wide = rng.uniform(0.25, 0.29), rng.uniform(0.16, 0.18)
    squeezed = rng.uniform(0.14, 0.17)
    phase = times / times[-1]
    start, turn = FLOOR - tall - 0.16, rng.uniform(0.72, 0.82)
    down = (1 - np.cos(np.pi * np.minimum(phase / turn, 1))) / 2
    back = np.maximum(phase - turn, 0) / (1 - turn)
    plate = start + down * (FLOOR - squeezed - start) - 0.12 * back
    # The clay is plastic: it never springs back.
    height = np.minimum.accumulate(np.minimum(FLOOR - plate, tall))
    return {
        "colour": pick(rng, COLOURS),
        "x": cx,
        "area": tall * wide,
        "plate": plate,
        "height": height,
        "width": tall * wide / height,
    }


def draw_press(canvas: Canvas, state: State) -> np.ndarray:
    x, plate = state["x"], np.asarray(state["plate"])
    height, width = np.asarray(state["height"]), np.asarray(state["width"])
    shadow(canvas, x, width / 2, 0.0)
    clay = box(canvas, x, FLOOR - height / 2, width / 2, height / 2, corner=0.03)
    light = (1.1 - 0.45 * (canvas.y - FLOOR + per_frame(height)) / per_frame(height))[..., None]
    canvas.paint(light * np.asarray(COLOURS[state["colour"]], np.float32), clay)
    canvas.paint((0.50, 0.52, 0.56), box(canvas, x, plate / 2 - 0.05, 0.035, plate / 2, corner=0.0))
    canvas.paint((0.74, 0.76, 0.80), box(canvas, x, plate - 0.035, 0.15, 0.035, corner=0.015))
    return clay
