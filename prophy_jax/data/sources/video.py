"""Video files in and out, through PyAV (FFmpeg in a wheel).

Decoding streams: `read_bucket` keeps only the frames it returns and stops at the last one it needs.

A bucket is a shape that clips are cropped and resized to; training batches hold one bucket each.

Legend: F frames, H W pixels. Frames are uint8 RGB (F,H,W,3), upright (rotation metadata applied),
whatever the bit depth and the chroma format of the file. Rates are frames per second. A video is a
path, or a seekable binary file with a `name`, such as a member of a zip file held in memory.
"""

import contextlib
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from prophy_jax.run.errors import UserError
from prophy_jax.run.workdir import replacing

Video = str | os.PathLike | BinaryIO


class Bucket(NamedTuple):
    """A shape of training clips; as text "81x480x832"."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return "x".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> "Bucket":
        """Raises UserError unless `text` is three positive numbers, such as "81x480x832"."""
        try:
            bucket = cls(*map(int, text.split("x")))
        except (TypeError, ValueError):
            bucket = None
        if bucket is None or min(bucket) < 1:
            raise UserError(f"bucket {text!r} is not FRAMESxHEIGHTxWIDTH, such as 81x480x832")
        return bucket


def center_crop_resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes (F,H,W,3) to cover (height, width) at its own aspect ratio, and crops the centre.

    Both happen in one antialiased pass of Pillow's bicubic filter over the largest centred window
    of the target's aspect ratio.

    Returns:
        uint8 (F,height,width,3).
    """
    source_height, source_width = frames.shape[1:3]
    scale = min(source_height / height, source_width / width)  # source pixels per target pixel
    left = (source_width - scale * width) / 2
    top = (source_height - scale * height) / 2
    box = (left, top, left + scale * width, top + scale * height)
    resized = [
        np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC, box))
        for frame in frames
    ]
    return np.stack(resized)


def choose_size(
    height: int, width: int, buckets: Sequence[Bucket], max_upscale: float = math.inf
) -> tuple[int, int] | None:
    """The (height, width) of the buckets that suits an upright clip of height x width pixels best.

    It is the one whose aspect ratio differs from the clip's by the smallest factor, among those that
    the clip covers when enlarged by at most `max_upscale`; of equally good ones the largest, then the
    one listed first. None if there is no such bucket.
    """

    def rank(size: tuple[int, int]) -> tuple[Fraction, int]:
        ratio = Fraction(size[0] * width, size[1] * height)
        return max(ratio, 1 / ratio), -size[0] * size[1]  # exact, so that equal aspects are equal

    sizes = [(bucket.height, bucket.width) for bucket in buckets]
    covered = [size for size in sizes if max(size[0] / height, size[1] / width) <= max_upscale]
    return min(covered, key=rank, default=None)


def read_bucket(
    video: Video, buckets: Sequence[Bucket], fps: float, max_upscale: float = math.inf
) -> tuple[np.ndarray, Bucket]:
    """Reads a clip into the bucket that suits it best; decodes no more than it needs.

    `choose_size` takes the height and width. Of the buckets of that size it is the one with most
    frames that the clip fills at `fps`, from its first frame on. Each frame is the nearest one by
    presentation time, of two equally near ones the later; `center_crop_resize` shapes it.

    Args:
        video: a path, or a seekable binary file with a `name`.
        buckets: one or more.
        fps: frames per second of the result.
        max_upscale: the largest factor that the clip may be enlarged by.

    Returns:
        uint8 (F,H,W,3) and its bucket (F,H,W).

    Raises:
        UserError: "too small: ...", "too short: ...", no such file, not a video, no video stream, no
            frames, damaged or cut short; always naming the file. Only formats with an index, such as MP4,
            show a clean cut; a cut Matroska file gives the frames it still holds.
    """
    name = _name(video)
    clip: list[np.ndarray] = []
    with _open_video(video) as (rate, frames):
        first = next(frames, None)
        if first is None:
            raise UserError(f"{name}: the video holds no frames")
        upright = _to_rgb(first[1]).shape[:2]
        size = choose_size(*upright, buckets, max_upscale)
        if size is None:
            raise UserError(
                f"{name}: too small: {upright[0]}x{upright[1]} pixels would have to be enlarged more "
                f"than {max_upscale:g} times for every bucket ({', '.join(map(str, buckets))})"
            )
        lengths = sorted(bucket.frames for bucket in buckets if (bucket.height, bucket.width) == size)
        wanted = [Fraction(k) / Fraction(fps) for k in range(lengths[-1])]  # seconds

        last_time, last_frame, found = None, None, 0
        for time, frame in itertools.chain([first], frames):
            found += 1
            while len(clip) < len(wanted) and wanted[len(clip)] <= time:
                target = wanted[len(clip)]
                earlier = last_frame is not None and target - last_time < time - target
                clip.append(_prepare(last_frame if earlier else frame, *size))
            last_time, last_frame = time, frame
            if len(clip) == len(wanted):
                return np.stack(clip), Bucket(len(clip), *size)
        # Past the last frame, it stays the nearest for half a frame.
        while len(clip) < len(wanted) and wanted[len(clip)] - last_time < 1 / (2 * rate):
            clip.append(_prepare(last_frame, *size))
    filled = [length for length in lengths if length <= len(clip)]
    if not filled:
        raise UserError(
            f"{name}: too short: {lengths[0]} frames at {fps:g} fps needed, "
            f"{len(clip)} found ({found} frames at {float(rate):g} fps)"
        )
    return np.stack(clip[: filled[-1]]), Bucket(filled[-1], *size)


def write_mp4(path: str | os.PathLike, frames: np.ndarray, fps: float) -> None:
    """Writes uint8 RGB frames (F,H,W,3) as H.264 (yuv420p, BT.709, visually lossless).

    yuv420p needs even sizes: an odd height or width is padded by repeating its last row or column.
    The file appears under its name only when it is complete, replacing an older one.

    Raises:
        UserError: the file cannot be written.
        ValueError: frames of another shape or dtype, or none.
    """
    av = _import_av()
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"frames must be uint8 (F,H,W,3), got {frames.dtype} {frames.shape}")
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")

    try:
        # "faststart" puts the index first, so that a browser can play before it has all.
        options = {"movflags": "faststart"}
        with (
            replacing(path) as partial,
            av.open(str(partial), "w", format="mp4", options=options) as container,
        ):
            rate = Fraction(fps).limit_denominator(1001)  # 29.97 is 30000/1001
            stream = container.add_stream("libx264", rate=rate, options={"crf": "18"})
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            _tag_bt709(stream.codec_context)
            for array in frames:
                frame = av.VideoFrame.from_ndarray(array, format="rgb24")
                frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def _tag_bt709(context) -> None:
    """Labels a codec context BT.709 with limited range; untagged files are guessed by size."""
    context.colorspace = context.color_primaries = context.color_trc = 1
    context.color_range = 1


def _import_av():
    try:
        import av
    except ImportError as error:
        raise UserError("reading and writing video needs PyAV: pip install av") from error
    return av


def _name(video: Video) -> str:
    return str(video.name if hasattr(video, "read") else video)


def _size(video: Video) -> int:
    """Bytes. Leaves the position of an open file at its end."""
    return video.seek(0, os.SEEK_END) if hasattr(video, "read") else os.path.getsize(video)


@contextlib.contextmanager
def _open_video(video: Video) -> Iterator[tuple[Fraction, Iterator]]:
    """Yields the average rate and an iterator of (seconds after the first frame, PyAV frame)."""
    av = _import_av()
    name, is_file = _name(video), hasattr(video, "read")
    if not is_file and not Path(video).is_file():
        raise UserError(f"{name}: no such video file")
    try:
        with av.open(video if is_file else name) as container:
            if not container.streams.video:
                raise UserError(f"{name}: the file has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = stream.average_rate or stream.guessed_rate
            if not rate:
                raise UserError(f"{name}: the video holds no frames or no frame rate")
            yield rate, _frames(video, container, stream, rate)
    except av.error.FFmpegError as error:
        raise UserError(
            f"{name}: cannot be decoded; it is empty, damaged, cut short or not a video ({error.strerror})"
        ) from error


def _frames(video: Video, container, stream, rate: Fraction) -> Iterator:
    """Pairs each frame with its exact time; a raw stream without times counts frames instead."""
    start = None
    for index, frame in enumerate(container.decode(stream)):
        if frame.pts is None:
            yield index / rate, frame
            continue
        time = frame.pts * frame.time_base
        start = time if start is None else start
        yield time - start, frame
    # FFmpeg often ends a shortened file without an error, but its index still points past the end.
    size = _size(video)
    if any(entry.pos + entry.size > size for entry in stream.index_entries):
        raise UserError(f"{_name(video)}: the video is cut short: its index continues after the file ends")


def _to_rgb(frame) -> np.ndarray:
    """uint8 (H,W,3), upright. FFmpeg gives the rotation counterclockwise, as np.rot90 takes it."""
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))


def _prepare(frame, height: int, width: int) -> np.ndarray:
    return center_crop_resize(_to_rgb(frame)[None], height, width)[0]
