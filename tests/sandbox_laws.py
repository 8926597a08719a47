"""The law of each scene of the sandbox, measured on its ground truth: 0 where it holds."""

from typing import Any

import numpy as np

from prophy_jax.data.sandbox import continua
from prophy_jax.data.sandbox.mechanics import State


def bounce(state: State) -> float:
    """Every impact reverses the velocity and scales it by the restitution."""
    if not state["impacts"]:
        return 0.0
    _, before, after = np.asarray(state["impacts"]).T
    return float(np.max(np.abs(after + state["restitution"] * before) / np.abs(before)))


def hit(state: State) -> float:
    """The impact keeps the momentum, but for gravity, and scales the speed by the restitution."""
    masses, impact = np.asarray(state["masses"]), state["impact"]
    before, after = np.asarray(impact["before"]), np.asarray(impact["after"])
    scale = np.sum(masses * np.abs(before))
    push = masses.sum() * state["gravity"] * impact["step"]
    momentum = abs(np.sum(masses * (after - before)) - push) / scale
    closing, parting = before[0] - before[1], after[1] - after[0]
    return float(max(momentum, abs(parting - state["restitution"] * closing) / closing))


def tumble(state: State) -> float:
    """The angle grows at a constant rate while the centre falls freely."""
    times, y, angle = (np.asarray(state[key]) for key in ("times", "y", "angle"))
    turning = np.max(np.abs(np.diff(angle) / np.diff(times) / state["spin"] - 1))
    falling = np.max(np.abs(np.diff(y, 2) / (times[1] - times[0]) ** 2 / state["gravity"] - 1))
    return float(max(turning, falling))


def spring(state: State) -> float:
    """The block oscillates about its rest point with omega = sqrt(stiffness / mass)."""
    y, times = np.asarray(state["y"]) - state["centre"], np.asarray(state["times"])
    turn = np.sqrt(state["stiffness"] / state["mass"]) * (times[1] - times[0])
    # y(t + d) + y(t - d) = 2 cos(omega d) y(t) holds for every harmonic motion.
    return float(np.max(np.abs(y[2:] + y[:-2] - 2 * np.cos(turn) * y[1:-1])) / np.max(np.abs(y)))


def press(state: State) -> float:
    """The area of the clay, height times width, stays the same."""
    area = np.asarray(state["height"]) * np.asarray(state["width"])
    return float(np.max(np.abs(area / state["area"] - 1)))


def slosh(state: State) -> float:
    """The volume is constant; the tilt swings with omega = pi sqrt(gravity depth) / length."""
    heights, times = np.asarray(state["heights"]), np.asarray(state["times"])
    volume = np.max(np.abs(heights.mean(1) / state["depth"] - 1))
    tilt = heights @ np.cos(np.pi * (np.arange(16) + 0.5) / 16)
    omega = np.pi * np.sqrt(state["gravity"] * state["depth"]) / state["length"]
    expected = tilt[0] * np.cos(omega * times)
    return float(max(volume, np.max(np.abs(tilt - expected)) / abs(tilt[0])))


def smoke(state: State) -> float:
    """The smoke in the air, density integrated, weighs what the chimney has given off."""
    grid = np.arange(-1, 2, 0.01)
    weight = continua.smoke_density(state, grid, grid).sum((1, 2)) * 0.01**2
    age = np.asarray(state["times"])[:, None] - np.asarray(state["births"])
    given = np.sum((age >= 0) * np.asarray(state["masses"]), axis=1)
    return float(np.max(np.abs(weight / given - 1)))


def melt(state: State) -> float:
    """Block and liquid keep one volume, and the melted part grows by power / latent heat."""
    width, height, level = (np.asarray(state[key]) for key in ("width", "height", "level"))
    liquid = level * state["length"] - width * np.minimum(level, height)
    total = np.max(np.abs((width * height + liquid) / state["volume"] - 1))
    rate = np.gradient(liquid, np.asarray(state["times"]))
    return float(max(total, np.max(np.abs(rate / state["power"] - 1))))


def freeze(state: State) -> float:
    """Stefan's law: the square of the ice's thickness grows in proportion to time."""
    squared = np.asarray(state["front"]) ** 2
    return float(np.max(np.abs(squared / (state["rate"] ** 2 * np.asarray(state["elapsed"])) - 1)))


def fire(state: State) -> float:
    """The flame's height goes as power^(2/5) (Heskestad); the fuel lost is the heat released."""
    power, times = np.asarray(state["power"]), np.asarray(state["times"])
    height = np.max(np.abs(np.asarray(state["height"]) / (state["scale"] * power**0.4) - 1))
    released = np.sum((power[1:] + power[:-1]) / 2 * np.diff(times))
    lost = (state["fuel"][0] - state["fuel"][-1]) * state["heat"]
    return float(max(height, abs(lost / released - 1)))


def blast(state: State) -> float:
    """The blast's radius goes as time^(2/5) (Sedov and Taylor)."""
    age = np.asarray(state["times"]) - state["start"]
    radius = np.asarray(state["radius"])[age > 0]
    return float(np.max(np.abs(radius**5 / (state["energy"] * age[age > 0] ** 2) - 1)))


def mirror(state: State) -> float:
    """The image stands as far behind the mirror as the ball before it, right across from it."""
    away = np.asarray(state["y"]) + np.asarray(state["image_y"]) - 2 * state["axis"]
    along = np.asarray(state["x"]) - np.asarray(state["image_x"])
    return float(max(np.max(np.abs(away)), np.max(np.abs(along))))


def beam(state: State) -> float:
    """Snell's law: sin(incidence) = index sin(refraction)."""
    bent = state["index"] * np.sin(np.asarray(state["refraction"]))
    return float(np.max(np.abs(np.sin(np.asarray(state["incidence"])) - bent)))


LAWS = {
    law.__name__: law
    for law in (bounce, hit, tumble, spring, press, slosh, smoke, melt, freeze, fire, blast, mirror, beam)
}


def law_residual(state: dict[str, Any]) -> float:
    """How far one entry of `state["scenes"]` is from its law: relative, 0 where it holds."""
    return LAWS[state["scene"]](state)
