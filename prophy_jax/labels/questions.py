"""What the vision-language model is asked: one question for each phenomenon, and a background prompt.

The attention of the answer to a question, less that of the answer to BACKGROUND, is the phenomenon's map. So
each question names the cues by which the phenomenon shows and asks where and how, and BACKGROUND asks for the
video as a whole. A question is only put to clips that show its phenomenon. The paper does not state its
wording; this is ours. Change it here: the manifest of the labels keeps a hash of these texts.
"""

from prophy_jax.data.taxonomy import PHENOMENA

BACKGROUND = "Describe this video in general: the scene as a whole, its setting, its style and its mood."

QUESTIONS = {
    "collision": (
        "A collision happens in this video. Describe where the bodies meet, which bodies they are, and "
        "how they bounce back, stop, break or change direction at the moment of contact."
    ),
    "rigid body motion": (
        "A rigid body moves in this video. Describe which solid body it is, where it moves, and how it "
        "falls, slides, rolls, swings or spins while it keeps its shape."
    ),
    "elastic motion": (
        "Something elastic moves in this video. Describe where it is and how it stretches, is compressed, "
        "bends, bounces or vibrates, and springs back to its shape."
    ),
    "liquid motion": (
        "A liquid moves in this video. Describe where the liquid is and how it flows, pours, drips, "
        "splashes, ripples or makes waves."
    ),
    "gas motion": (
        "A gas moves in this video, seen as smoke, steam, mist, clouds or dust. Describe where it is and "
        "how it rises, drifts, swirls, spreads and thins out."
    ),
    "deformation": (
        "Something is deformed in this video. Describe which object changes its shape, where it is "
        "pressed, bent, twisted, torn, cut or crushed, and what shape it takes."
    ),
    "melting": (
        "Something melts in this video. Describe which solid becomes liquid, where it softens, sags, "
        "shrinks or drips, and where the melt gathers."
    ),
    "solidification": (
        "Something solidifies in this video. Describe which liquid becomes solid, where it freezes, sets, "
        "hardens or forms crystals, and how the solid part grows."
    ),
    "vaporization": (
        "Something vaporizes in this video. Describe which liquid it is, where it boils, bubbles or dries "
        "up, and where its steam or vapor rises."
    ),
    "liquefaction": (
        "Something liquefies in this video. Describe where vapor condenses into droplets, fog or a film "
        "of liquid, or where a gas turns into a liquid, and how the liquid gathers and runs."
    ),
    "explosion": (
        "An explosion happens in this video. Describe where it breaks out and how its flash, fireball, "
        "blast wave, smoke and fragments spread from there."
    ),
    "combustion": (
        "Something burns in this video. Describe where the flames, embers, sparks or glow are, what is on "
        "fire, and how the fire flickers, spreads and gives off smoke."
    ),
    "reflection": (
        "There is a reflection in this video. Describe which mirror, water, glass, metal or other glossy "
        "surface shows it, where on that surface it is, and what is mirrored there."
    ),
    "refraction": (
        "Light is refracted in this video. Describe through which water, glass, lens, crystal or drop it "
        "is seen, and where things look bent, displaced, magnified, upside down or split into colors."
    ),
    "scattering": (
        "Light is scattered in this video. Describe where beams, rays, halos, haze or a glow show in the "
        "air, fog, dust, smoke or murky water, and where the light comes from."
    ),
    "interference and diffraction": (
        "Light shows interference or diffraction in this video. Describe where the iridescent colors, "
        "fringes, rings or bands are, such as on soap bubbles, oil films or discs, and how they change."
    ),
    "unnatural light source": (
        "There is an artificial source of light in this video. Describe which lamp, screen, neon sign, "
        "laser, headlight or spotlight it is, where it is, and what it lights up."
    ),
}
assert tuple(QUESTIONS) == PHENOMENA
