"""The contact sheet of docs/sandbox.md, one PNG.

    python -m prophy_jax.data.sandbox.contact_sheet docs/sandbox.png

Legend: F frames, S frame size in pixels, G = S/8 cells of the masks a side.
"""

import sys
import textwrap

import numpy as np
from PIL import Image, ImageDraw

from prophy_jax.data.sandbox.clip import CELL, SCENES, TIME, make_clip, render_scene, simulate_scene
from prophy_jax.data.sandbox.render import BACKDROPS, backdrop


def write(path: str) -> None:
    """Writes a PNG: for each scene seven frames of a clip, and below them its mask in magenta.

    The last entry is one whole training clip, and below it the stored masks.
    """
    size, frames, zoom, label, blocks, gap = 64, 13, 2, 16, 3, 8
    magenta = np.asarray((1.0, 0.0, 1.0), np.float32)
    third = slice(round(size / 3), round(2 * size / 3))
    entries = []  # of (title, clip, mask), both (F, S, width, ...)
    for number, scene in enumerate(SCENES):
        rng = np.random.default_rng([7, number])
        state = simulate_scene(scene, rng, "middle", np.arange(frames) / 8)
        clip = backdrop(frames, size, number % len(BACKDROPS))
        mask = render_scene(clip, "middle", state)
        entries.append((f"{scene.category}: {scene.name}", clip[:, :, third], mask[:, :, third]))
    whole = make_clip(0, "train", 15, size, frames)
    cells = whole.masks.max(-1)[(np.arange(frames) + TIME - 1) // TIME]  # (F, G, G)
    entries.append((whole.caption, whole.frames / 255, cells.repeat(CELL, 1).repeat(CELL, 2)))

    width, height = 7 * zoom * (third.stop - third.start), label + 2 * zoom * size
    rows = -(-len(SCENES) // blocks)
    sheet = Image.new("RGB", (blocks * (width + gap) + gap, rows * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (title, clip, mask) in enumerate(entries):
        masked = clip + 0.7 * mask[..., None] * (magenta - clip)
        strips = [np.concatenate(list(video[::2]), axis=1) for video in (clip, masked)]
        pixels = np.clip(np.concatenate(strips) * 255 + 0.5, 0, 255).astype(np.uint8)
        x, y = gap + number % blocks * (width + gap), number // blocks * (height + gap)
        scale = zoom if number < len(SCENES) else (sheet.width - gap - x) / pixels.shape[1]
        shape = (int(pixels.shape[1] * scale), int(pixels.shape[0] * scale))
        picture = Image.fromarray(pixels).resize(shape, Image.Resampling.NEAREST)
        title = textwrap.fill(title, 100)
        draw.text((x, y + 2), title, fill="black")
        sheet.paste(picture, (x, y + label * (1 + title.count("\n"))))
    sheet.save(path)


if __name__ == "__main__":
    write(*sys.argv[1:])
