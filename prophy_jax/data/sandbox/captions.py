"""English captions of sandbox clips: one clause per phenomenon, "; " between them, "." at the end.

{colour}, {other} and {material} stand for words of the scene's state.
The test split uses wordings that training never shows, made of words that training does show.
"""

import numpy as np

PLACES = ("left", "middle", "right")
WHERE = {"left": "on the left", "middle": "in the middle", "right": "on the right"}

# scene -> (training templates, held-out templates)
TEMPLATES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bounce": (
        (
            "a {colour} ball falls and bounces on the floor",
            "a {colour} ball drops to the floor and bounces up again",
            "a bouncing {colour} ball hits the floor",
        ),
        ("a falling {colour} ball hits the floor and bounces up",),
    ),
    "hit": (
        (
            "a falling {colour} ball collides with a rising {other} ball",
            "a {colour} ball and a {other} ball collide in the air",
            "a {colour} ball drops, hits a {other} ball and bounces back",
        ),
        ("a {colour} ball falls and collides with a {other} ball in the air",),
    ),
    "tumble": (
        (
            "a {colour} block is tossed up and turns in the air",
            "a rigid {colour} block tumbles through the air",
            "a tossed {colour} block spins as it rises and falls",
        ),
        ("a rigid {colour} block spins and tumbles in the air",),
    ),
    "spring": (
        (
            "a {colour} block swings up and down on a spring",
            "a {colour} block hangs from a spring and oscillates",
            "an elastic spring pulls a {colour} block up and down",
        ),
        ("a {colour} block oscillates up and down on an elastic spring",),
    ),
    "press": (
        (
            "a press squeezes {colour} clay flat",
            "soft {colour} clay is squeezed by a press",
            "a press deforms a lump of {colour} clay",
        ),
        ("a lump of soft {colour} clay is squeezed flat by a press",),
    ),
    "slosh": (
        (
            "{colour} liquid sloshes in a glass tank",
            "waves of {colour} liquid swing from side to side in a tank",
            "a tank of {colour} liquid sloshes from side to side",
        ),
        ("{colour} liquid sloshes from side to side in a glass tank",),
    ),
    "smoke": (
        (
            "{colour} smoke rises from a chimney",
            "a chimney gives off {colour} smoke",
            "puffs of {colour} smoke drift up from a chimney",
        ),
        ("a chimney gives off puffs of {colour} smoke that drift up",),
    ),
    "melt": (
        (
            "a block of {material} melts in a warm tray",
            "warm {material} melts and becomes liquid",
            "{material} is melting in a hot tray",
        ),
        ("a block of {material} becomes liquid in a hot tray",),
    ),
    "freeze": (
        (
            "water freezes in a tank from the bottom up",
            "ice grows from the bottom of a cold tank of water",
            "cold water turns to ice in a tank",
        ),
        ("ice grows in cold water as a tank freezes from the bottom up",),
    ),
    "fire": (
        (
            "orange flames burn on logs",
            "a fire burns on logs with orange flames",
            "logs burn in a bright fire",
        ),
        ("bright orange flames burn on logs",),
    ),
    "blast": (
        (
            "a {colour} barrel explodes in a ball of fire",
            "an explosion tears a {colour} barrel apart",
            "a {colour} barrel blows up",
        ),
        ("a {colour} barrel explodes with a bright ball of fire",),
    ),
    "mirror": (
        (
            "a {colour} ball moves over a mirror that reflects it",
            "a mirror shows the reflection of a {colour} ball",
            "a {colour} ball and its reflection move in a mirror",
        ),
        ("a moving {colour} ball shows its reflection in a mirror",),
    ),
    "beam": (
        (
            "a beam of {colour} light bends as it enters glass",
            "a glass block refracts a {colour} beam of light",
            "{colour} light from a moving lamp is bent by a glass block",
        ),
        ("a beam of {colour} light from a moving lamp bends as it enters a glass block",),
    ),
}


def clause(rng: np.random.Generator, split: str, scene: str, place: str, state: dict) -> str:
    """One phenomenon with its place, which stands first or last."""
    templates = TEMPLATES[scene][split == "test"]
    words = templates[int(rng.integers(len(templates)))].format(**state)
    where = WHERE[place]
    return f"{where} {words}" if rng.random() < 0.7 else f"{words} {where}"


def caption(clauses: list[str]) -> str:
    """Joins the clauses of one clip."""
    return "; ".join(clauses) + "."
