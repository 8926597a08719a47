"""Clips of the physics sandbox as video files with captions, in the two layouts that `prepare` reads.

    python -m prophy_jax.testing.clips DIR

writes DIR/wisa, in WISA-80K's layout and with the quirks of its annotation, and DIR/captioned, a CSV with
videos. Their sizes, rates and lengths differ as those of collected clips do.
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from prophy_jax.data import taxonomy
from prophy_jax.data.sandbox.clip import Clip, make_clip
from prophy_jax.data.sources import video

# width, height, frames, fps: 5 s of 26:15 twice, 4 s of 16:10, 6 s of 3:2.
WISA = ((208, 120, 81, 16),) * 3 + ((208, 120, 153, 30),) * 3
CAPTIONED = ((160, 100, 61, 15), (144, 96, 49, 8)) * 4


def write_clip(path: Path, index: int, width: int, height: int, frames: int, fps: float) -> Clip:
    """Writes training clip `index` of the sandbox to `path`, squeezed to the height."""
    clip = make_clip(0, "train", index, -(-width // 8) * 8, frames, fps)
    path.parent.mkdir(parents=True, exist_ok=True)
    squeezed = [np.asarray(Image.fromarray(frame).resize((width, height))) for frame in clip.frames]
    video.write_mp4(path, np.stack(squeezed), fps)
    return clip


def write_wisa(folder: Path) -> Path:
    """Six clips and their wisa-80k.json. Returns `folder`."""
    records = []
    for index, shape in enumerate(WISA):
        name = f"sandbox_{index}.mp4"
        clip = write_clip(folder / "videos" / name, index, *shape)
        answers = {}
        for question, (group, members) in zip(taxonomy.QUESTIONS, taxonomy.WISA.groups.items(), strict=True):
            shown = [taxonomy.PHENOMENA[e] for e in members if clip.category[e]]
            answers[question] = ", ".join(shown) or f"no obvious phenomenon of {group}."
        label = taxonomy.PHENOMENA[int(clip.category.argmax())].capitalize() + " "
        if index % 3 == 1:
            label = "Solid Objects Appearance"  # which is none of the 17, but stands in WISA-80K
        records.append(
            {"video_name": name, "captions": clip.caption, "label": label, "physical_annotation": answers}
        )
    (folder / "wisa-80k.json").write_text(json.dumps(records, indent=1))
    return folder


def write_captioned(folder: Path) -> Path:
    """Eight clips and their clips.csv. Returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "clips.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "video", "caption", "category"])
        for index, shape in enumerate(CAPTIONED, start=len(WISA)):
            name = f"videos/captioned_{index}.mp4"
            clip = write_clip(folder / name, index, *shape)
            shown = [taxonomy.PHENOMENA[e] for e in np.flatnonzero(clip.category)]
            table.writerow([f"captioned_{index}", name, clip.caption, ", ".join(shown)])
    return folder


if __name__ == "__main__":
    write_wisa(Path(sys.argv[1]) / "wisa")
    write_captioned(Path(sys.argv[1]) / "captioned")
