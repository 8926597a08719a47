"""Fluids, heat and light of the sandbox: slosh, smoke, melt, freeze, fire, blast, mirror and beam.

Each phenomenon is `simulate` and `draw`, as in mechanics.py. The simulations are
small exact solutions: modes of linear shallow water, diffusing Gaussian puffs, heat balances, a
blast wave, geometric optics.

Legend: F frames, S frame size in pixels, w width of one station in pixels. Lengths in frame sides,
x to the right, y down, times in seconds.
"""

import numpy as np

from prophy_jax.data.sandbox.mechanics import State, pick
from prophy_jax.data.sandbox.render import (
    COLOURS,
    DARK,
    FLOOR,
    GREY,
    WHITE,
    Canvas,
    ball,
    below,
    blob,
    box,
    fill,
    local,
    per_frame,
    rim,
    shadow,
    tank,
)

TANK = 0.145  # half the inner width of every tank
BED = FLOOR + 0.03  # y of a tank's inner bottom: the tanks stand a little in front of the wall

# Liquid motion: water sloshes in a tank.


def simulate_slosh(rng: np.random.Generator, cx: float, times: np.ndarray) -> State:
    length, depth = 2 * TANK, rng.uniform(0.24, 0.32)
    swings = rng.uniform(0.85, 1.25)  # periods of the first mode in the clip
    speed = 2 * length * swings / times[-1]  # of the waves
    modes = np.arange(1, 4)
    tilt = rng.choice((-1, 1)) * rng.uniform(0.11, 0.14)
    heights = np.array([tilt, *rng.uniform(-0.012, 0.012, 2)])
    centres = (np.arange(16) + 0.5) / 16  # 16 cells across the tank
    shapes = np.cos(np.pi * modes * centres[:, None])  # (16, 3), each of zero mean
    swing = heights * np.cos(np.pi * modes * speed / length * times[:, None])  # (F, 3)
    return {
        "colour": pick(rng, ("blue", "green", "red", "purple")),
        "x": cx,
        "length": length,
        "depth": depth,
        "gravity": speed**2 / depth,
        "times": times,
        "heights": depth + swing @ shapes.T,
    }


def draw_slosh(canvas: Canvas, state: State) -> np.ndarray:
    x, heights = state["x"], np.asarray(state["heights"])
    top = BED - state["depth"] - 0.2
    inside = tank(canvas, x, TANK, top, BED)
    cells = x + state["length"] * ((np.arange(16) + 0.5) / 16 - 0.5)
    surface = np.stack([np.interp(canvas.x, cells, BED - row) for row in heights])
    surface = surface[:, None]  # (F, 1, w)
    liquid = inside * below(canvas, surface)
    fill(canvas, liquid, surface, COLOURS[state["colour"]])
    rim(canvas, x, TANK, top, BED)
    return liquid


# Gas motion: smoke rises from a chimney.


def simulate_smoke(rng: np.random.Generator, cx: float, times: np.ndarray) -> State:
    duration = times[-1]
    rise = rng.uniform(0.36, 0.44) / duration
    births = duration * np.arange(-0.5, 1.0, 0.13)
    return {
        "colour": pick(rng, ("white", "black")),
        "x": cx,
        "mouth": FLOOR - 0.19,
        "rise": rise,
        "diffusion": rng.uniform(0.0005, 0.0007) / duration,
        "spread": 0.044,
        "sway": rng.uniform(0.015, 0.03),
        "phase": rng.uniform(0, 2 * np.pi),
        "births": births,
        "masses": rng.uniform(0.75, 1.25, len(births)),
        "times": times,
    }


def smoke_density(state: State, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Density (F, Y, X) of the puffs at coordinates x (X,), y (Y,): its integral is the mass."""
    births = np.asarray(state["births"], np.float32)
    age = np.asarray(state["times"], np.float32)[:, None] - births  # (F, P)
    mass = np.asarray(state["masses"], np.float32) * (age >= 0)
    age = np.maximum(age, 0)
    cy = state["mouth"] - state["rise"] * age
    reach = state["mouth"] - cy
    sway = state["sway"] * np.minimum(reach / 0.2, 1)
    cx = state["x"] + sway * np.sin(14 * reach + state["phase"])
    variance = state["spread"] ** 2 + 2 * state["diffusion"] * age
    across = np.exp(-0.5 * (x - cx[..., None]) ** 2 / variance[..., None])  # (F, P, X)
    down = np.exp(-0.5 * (y - cy[..., None]) ** 2 / variance[..., None])  # (F, P, Y)
    weight = mass / (2 * np.pi * variance)
    return np.swapaxes(down * weight[..., None], 1, 2) @ across


def draw_smoke(canvas: Canvas, state: State) -> np.ndarray:
    density = smoke_density(state, canvas.x, canvas.y[:, 0])
    opacity = 1 - np.exp(-density / 105)
    x, mouth = state["x"], state["mouth"]
    canvas.paint(WHITE if state["colour"] == "white" else (0.10, 0.10, 0.12), opacity)
    middle, half = (mouth + BED) / 2, (BED - mouth) / 2
    shadow(canvas, x, 0.1, 0.0)
    pipe = box(canvas, x, middle, 0.07, half, corner=0.01)
    collar = box(canvas, x, mouth + 0.02, 0.088, 0.025, corner=0.01)
    canvas.paint((0.60, 0.34, 0.26), pipe)
    canvas.paint((0.72, 0.44, 0.34), collar)
    return opacity * (1 - np.maximum(pipe, collar))


# Melting: a warm tray melts a block.

MATERIALS = {
    "butter": (0.97, 0.84, 0.36),
    "wax": (0.86, 0.24, 0.26),
    "ice": (0.84, 0.93, 0.99),
}


def simulate_melt(rng: np.random.Generator, cx: float, times: np.ndarray) -> State:
    slim = rng.uniform(2.0, 2.4)  # height over width of the block, which keeps its shape
    volume = slim * rng.uniform(0.15, 0.16) ** 2
    melted = 0.04 + rng.uniform(0.75, 0.9) * times / times[-1]
    width = np.sqrt(volume * (1 - melted) / slim)
    height = slim * width
    # The block stands on the bottom; the liquid fills the tray around it and then over it.
    around = volume * melted / (2 * TANK - width)
    level = np.where(around <= height, around, volume / (2 * TANK))
    return {
        "material": pick(rng, MATERIALS),
        "x": cx,
        "length": 2 * TANK,
        "volume": volume,
        "width": width,
        "height": height,
        "level": level,
        "power": (melted[-1] - melted[0]) * volume / times[-1],  # latent heat per volume = 1
        "times": times,
    }


def draw_melt(canvas: Canvas, state: State) -> np.ndarray:
    x, width, height = state["x"], np.asarray(state["width"]), np.asarray(state["height"])
    colour = np.asarray(MATERIALS[state["material"]], np.float32)
    top, surface = BED - 0.2, per_frame(BED - np.asarray(state["level"]))
    canvas.paint((0.96, 0.40, 0.16), box(canvas, x, BED + 0.045, TANK, 0.03, corner=0.02))
    inside = tank(canvas, x, TANK, top, BED)
    liquid = inside * below(canvas, surface)
    wet = (0.30, 0.58, 0.92) if state["material"] == "ice" else 0.78 * colour
    fill(canvas, liquid, surface, wet)
    block = box(canvas, x, BED - height / 2, width / 2, height / 2, corner=width / 6)
    u, v = local(canvas, x, BED - height / 2)
    light = np.clip(1.08 - 0.8 * u - 0.5 * v, 0.85, 1.2)[..., None]
    canvas.paint(np.minimum(light * colour, 1), block)
    rim(canvas, x, TANK, top, BED)
    return np.maximum(block, liquid)


# Solidification: a tank freezes from its cold bottom upwards.


def simulate_freeze(rng: np.random.Generator, cx: float, times: np.ndarray) -> State:
    level = rng.uniform(0.36, 0.44)
    elapsed = times + 0.03 * times[-1]  # it has begun to freeze before the clip
    rate = level * rng.uniform(0.75, 0.95) / np.sqrt(elapsed[-1])
    return {
        "x": cx,
        "level": level,
        "rate": rate,
        "elapsed": elapsed,
        "front": rate * np.sqrt(elapsed),
    }


def draw_freeze(canvas: Canvas, state: State) -> np.ndarray:
    x, level, front = state["x"], state["level"], np.asarray(state["front"])
    top = BED - level - 0.08
    inside = tank(canvas, x, TANK, top, BED)
    fill(canvas, inside * below(canvas, per_frame(BED - level)), BED - level, COLOURS["blue"])
    ice = inside * below(canvas, per_frame(BED - front))
    canvas.paint((0.90, 0.96, 1.0), ice)
    rim(canvas, x, TANK, top, BED)
    canvas.paint((0.30, 0.36, 0.62), box(canvas, x, BED + 0.045, TANK + 0.01, 0.035, corner=0.02))
    return ice


# Combustion: flames burn on logs.


def simulate_fire(rng: np.random.Generator, cx: float, times: np.ndarray) -> State:
    phase = times / times[-1]
    start, beat, offset = rng.uniform(0.25, 0.45), rng.uniform(2.2, 3.2), rng.uniform(0, 2 * np.pi)
    grown = start + (1 - start) * np.clip(phase / 0.6, 0, 1)
    power = grown * (1 + 0.22 * np.sin(2 * np.pi * beat * phase + offset))
    burnt = np.concatenate([[0], np.cumsum((power[1:] + power[:-1]) / 2 * np.diff(times))])
    share = rng.uniform(0.5, 0.7)  # of the fuel burns within the clip
    return {
        "x": cx,
        "times": times,
        "power": power,
        "heat": burnt[-1] / share,  # released by all the fuel
        "fuel": 1 - share * burnt / burnt[-1],
        "scale": 0.5 / 1.22**0.4,
        "height": 0.5 / 1.22**0.4 * power**0.4,
        "lean": np.sin(2 * np.pi * rng.uniform(1.2, 1.8) * phase + rng.uniform(0, 2 * np.pi)),
    }


def _tongue(
    canvas: Canvas, x: float, base: float, height: np.ndarray, half: float, lean: np.ndarray
) -> np.ndarray:
    """A flame: a drop, widest at a third of its height, whose tip leans."""
    up = (base - canvas.y) / per_frame(height)  # 0 at the base, 1 at the tip
    middle = x + 0.05 * per_frame(lean) * np.clip(up, 0, 1) ** 1.5
    width = half * np.sqrt(np.clip((up + 0.25) * 2.2, 0, 1)) * np.clip(1 - up, 0, 1) ** 0.75
    distance = np.maximum(np.abs(canvas.x - middle) - width, (up - 1) * per_frame(height))
    distance = np.maximum(distance, canvas.y - base - 0.03)
    return np.clip(0.5 - distance / (3 * canvas.pixel), 0, 1).astype(np.float32)


def draw_fire(canvas: Canvas, state: State) -> np.ndarray:
    x, height = state["x"], np.asarray(state["height"])
    lean, fuel = np.asarray(state["lean"]), np.asarray(state["fuel"])
    base = FLOOR - 0.03
    halo = blob(canvas, x, base - height / 3, 0.065, 0.08 + height / 3)
    canvas.light((1.0, 0.50, 0.15), 0.45 * halo)
    shadow(canvas, x, 0.14, 0.0)
    # Logs char as the fuel goes.
    wood = (0.15 + 0.85 * per_frame(fuel))[..., None] * np.asarray((0.52, 0.32, 0.18), np.float32)
    for side in (-1, 1):
        log = box(canvas, x + side * 0.01, FLOOR + 0.01, 0.135, 0.034, side * 0.28, corner=0.03)
        canvas.paint(wood, log)
    outer = _tongue(canvas, x, base, height, 0.115, lean)
    canvas.paint((0.95, 0.36, 0.08), 0.95 * outer)
    canvas.paint((1.0, 0.66, 0.12), 0.95 * _tongue(canvas, x, base, 0.72 * height, 0.08, lean))
    canvas.paint((1.0, 0.93, 0.55), 0.95 * _tongue(canvas, x, base, 0.42 * height, 0.048, lean))
    return outer


# Explosion: a barrel blows up.


def simulate_blast(rng: np.random.Generator, cx: float, times: np.ndarray) -> State:
    duration = times[-1]
    start = rng.uniform(0.08, 0.2) * duration
    full = rng.uniform(0.145, 0.155)
    age = np.maximum(times - start, 0)
    energy = full**5 / (duration - start) ** 2  # over the density of the air
    return {
        "colour": pick(rng, ("red", "green", "blue")),
        "x": cx,
        "y": FLOOR - 0.15,
        "phase": rng.uniform(0, 2 * np.pi),
        "start": start,
        "energy": energy,
        "times": times,
        "radius": (energy * age**2) ** 0.2,
        "heat": np.exp(-2.2 * age / duration) * (age > 0),
    }


def draw_blast(canvas: Canvas, state: State) -> np.ndarray:
    x, y, times = state["x"], state["y"], np.asarray(state["times"])
    radius, heat = np.asarray(state["radius"]), per_frame(state["heat"])
    whole = per_frame(times < state["start"])
    colour = np.asarray(COLOURS[state["colour"]], np.float32)
    shadow(canvas, x, 0.09, 0.0)
    body = whole * box(canvas, x, FLOOR - 0.09, 0.085, 0.115, corner=0.03)
    u, v = local(canvas, x, FLOOR - 0.09)
    canvas.paint((1 - 2.5 * np.abs(u + 0.02))[..., None] * colour, body)
    canvas.paint(GREY, whole * box(canvas, x, FLOOR - 0.09, 0.088, 0.018, corner=0.01))
    canvas.light((1.0, 0.62, 0.25), heat * 0.8 * blob(canvas, x, y, 0.065, 0.16))
    # A ball of fire, hot inside, that ends as smoke.
    u, v = local(canvas, x, y)
    around, phase = np.arctan2(v, u), state["phase"]
    lobes = 1 + 0.07 * np.sin(4 * around + phase) + 0.06 * np.sin(7 * around - phase)  # of mean 1
    away = np.hypot(u, v) / np.maximum(per_frame(radius) * lobes, 1e-3)
    ball_of_fire = np.clip((1 - away) * per_frame(radius) / (3 * canvas.pixel) + 0.3, 0, 1)
    ball_of_fire = ball_of_fire * per_frame(radius > 0)
    glow = np.clip(1.7 * heat * (1.15 - 0.6 * away**2), 0, 1)
    stops = ((0.20, 0.17, 0.16), (0.85, 0.24, 0.06), (1.0, 0.72, 0.18), (1.0, 0.97, 0.80))
    pixels = np.stack(
        [np.interp(glow, (0, 0.4, 0.75, 1), channel) for channel in zip(*stops, strict=True)],
        axis=-1,
    )
    canvas.paint(pixels, ball_of_fire)
    return np.asarray(ball_of_fire, np.float32)


# Reflection: a ball moves over a mirror.


def simulate_mirror(rng: np.random.Generator, cx: float, times: np.ndarray) -> State:
    phase = 2 * np.pi * (rng.uniform(0.8, 1.3) * times / times[-1] + rng.uniform())
    axis, radius = 0.50, rng.uniform(0.082, 0.092)
    y = axis - radius - 0.14 + 0.105 * np.cos(phase)
    return {
        "colour": pick(rng, COLOURS),
        "radius": radius,
        "axis": axis,
        "x": cx + 0.045 * np.sin(phase),
        "y": y,
        "image_x": cx + 0.045 * np.sin(phase),
        "image_y": 2 * axis - y,
        "centre": cx,
    }


def draw_mirror(canvas: Canvas, state: State) -> np.ndarray:
    centre, axis, radius = state["centre"], state["axis"], state["radius"]
    colour = np.asarray(COLOURS[state["colour"]], np.float32)
    bottom = 2 * axis - 0.06
    middle, half = (axis + bottom) / 2, (bottom - axis) / 2
    panel = box(canvas, centre, middle, 0.16, half, corner=0.015)
    sheen = (0.78 - 0.35 * (canvas.y - axis))[..., None]
    canvas.paint(sheen * np.asarray((0.86, 0.96, 1.0), np.float32), panel)
    inside = Canvas(canvas.rgb.copy(), canvas.x, canvas.y, canvas.pixel)
    image = ball(inside, state["image_x"], state["image_y"], radius, 0.9 * colour, flip=-1.0)
    canvas.paint(inside.rgb, 0.85 * panel * image)
    canvas.paint(WHITE, box(canvas, centre, axis, 0.16, 0.014, corner=0.01))
    ball(canvas, state["x"], state["y"], radius, colour)
    return panel


# Refraction: a beam of light bends as it enters glass.


def simulate_beam(rng: np.random.Generator, cx: float, times: np.ndarray) -> State:
    index = rng.uniform(1.45, 1.95)
    swing = rng.choice((-1, 1)) * np.radians(rng.uniform(31, 36))
    incidence = swing * np.cos(np.pi * rng.uniform(0.9, 1.1) * times / times[-1])
    return {
        "colour": pick(rng, ("red", "green", "yellow", "purple")),
        "x": cx,
        "surface": 0.50,
        "index": index,
        "incidence": incidence,
        "refraction": np.arcsin(np.sin(incidence) / index),
    }


def _ray(canvas: Canvas, x: float, y: float, angle: np.ndarray, spread: float) -> np.ndarray:
    """A soft beam through (x, y) that leans by `angle` from the vertical."""
    u, _ = local(canvas, x, y, -np.asarray(angle))
    return np.exp(-0.5 * (u / spread) ** 2)


def draw_beam(canvas: Canvas, state: State) -> np.ndarray:
    x, surface, bottom = state["x"], state["surface"], FLOOR + 0.05
    incidence, refraction = np.asarray(state["incidence"]), np.asarray(state["refraction"])
    colour = np.asarray(COLOURS[state["colour"]], np.float32)
    shadow(canvas, x, 0.15, 0.0)
    block = box(canvas, x, (surface + bottom) / 2, 0.155, (bottom - surface) / 2)
    canvas.paint((0.62, 0.82, 0.90), 0.5 * block)
    glass = below(canvas, np.float32(surface))
    reach = 0.23  # from the lamp to the glass
    lamp_x, lamp_y = x - reach * np.sin(incidence), surface - reach * np.cos(incidence)
    _, v = local(canvas, x, surface, -incidence)
    air = _ray(canvas, x, surface, incidence, 0.026) * (1 - glass) * canvas.cover(-v - reach)
    bent = _ray(canvas, x, surface, refraction, 0.026) * glass * block
    beam = air + bent
    canvas.paint(colour + 0.25 * (1 - colour), np.minimum(1.1 * beam, 1))
    lamp = box(canvas, lamp_x, lamp_y, 0.042, 0.055, -incidence)
    canvas.paint(DARK, lamp)
    return np.asarray(beam * (1 - lamp), np.float32)
