"""Video files, read back in tests."""

import os

import numpy as np

from prophy_jax.data.sources import video


def read_video(path: str | os.PathLike) -> tuple[np.ndarray, float]:
    """All frames (F, H, W, 3) uint8 of a file as PyAV decodes them, and its rate."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return np.stack(frames), float(stream.average_rate)


def read_clip(path, frames: int, fps: float, height: int, width: int) -> np.ndarray:
    """What `video.read_clip` reads into one bucket: (F, H, W, 3) uint8."""
    return video.read_clip(path, [video.Bucket(frames, height, width)], fps).frames
