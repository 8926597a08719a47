"""Video files in and out, through PyAV (FFmpeg in a wheel).

Decoding streams: `read_clip` keeps only the frames it returns and stops at the last one it needs.

A bucket is a shape that clips are cropped and resized to; training batches hold one bucket each.

Legend: F frames, H W pixels. Frames are uint8 RGB (F,H,W,3) as a player shows them, whatever the bit depth
and the chroma format of the file: turned and mirrored as its display matrix says, with square pixels, in
BT.709 colours (`prophy_jax.data.sources.colours`). Rates are frames per second. A video is a path, or a
seekable binary file with a `name`, such as a member of a zip file held in memory. An image (JPEG, PNG, WebP,
BMP, TIFF, AVIF) is a clip of one frame.
"""

import codecs
import contextlib
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

from prophy_jax.data.sources import colours
from prophy_jax.run.errors import UserError
from prophy_jax.run.storage import replacing

Video = str | os.PathLike | BinaryIO
# Pillow's names. FFmpeg takes an AVIF or HEIF image for a video of one frame a second, or for one tile of it.
IMAGES = (
    "JPEG",
    "PNG",
    "WEBP",
    "BMP",
    "TIFF",
    *(("AVIF",) if "avif" in features.get_supported_modules() else ()),
)
_BRANDS = ("avif", "heic", "heix", "mif1")


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


def center_crop_resize(
    frames: np.ndarray, height: int, width: int, pixel_aspect: Fraction | int = 1
) -> np.ndarray:
    """Resizes (F,H,W,3) to cover (height, width) at its own aspect ratio, and crops the centre.

    Both happen in one antialiased pass of Pillow's bicubic filter over the largest centred window
    of the target's aspect ratio.

    Args:
        frames: uint8, or float32.
        height: of the result.
        width: of the result.
        pixel_aspect: width of a source pixel over its height.

    Returns:
        (F,height,width,3) of the same dtype.
    """
    source_height, source_width = frames.shape[1:3]
    # Source rows per target pixel.
    scale = min(source_height / height, float(source_width * pixel_aspect) / width)
    across = scale / float(pixel_aspect)  # source columns per target pixel
    left = (source_width - across * width) / 2
    top = (source_height - scale * height) / 2
    box = (left, top, left + across * width, top + scale * height)

    def resize(image: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC, box))

    if frames.dtype == np.uint8:
        return np.stack([resize(frame) for frame in frames])
    # Pillow has no images of three float channels.
    return np.stack([np.stack([resize(frame[..., i]) for i in range(3)], axis=-1) for frame in frames])


def share_kept(height: float, width: float, bucket: Bucket) -> float:
    """The share of a picture of height x width that `center_crop_resize` keeps in `bucket`."""
    ratio = float(height * bucket.width / (width * bucket.height))
    return min(ratio, 1 / ratio)


def choose_size(
    height: int | Fraction, width: int | Fraction, buckets: Sequence[Bucket], max_upscale: float = math.inf
) -> tuple[int, int] | None:
    """The (height, width) of the buckets that suits a clip shown as height x width pixels best.

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


class Clip(NamedTuple):
    """A clip that was read: frames (F,H,W,3) uint8, their bucket, and (height, width) that it is shown as."""

    frames: np.ndarray
    bucket: Bucket
    shown: tuple[int, int]


def read_clip(video: Video, buckets: Sequence[Bucket], fps: float, max_upscale: float = math.inf) -> Clip:
    """Reads a clip into the bucket that suits it best; decodes no more than it needs.

    `choose_size` takes the height and width. Of the buckets of that size it is the one with most
    frames that the clip fills at `fps`, from its first frame on. Each frame is the nearest one by
    presentation time, of two equally near ones the later; `center_crop_resize` shapes it. An image
    takes buckets of one frame only.

    Args:
        video: a path, or a seekable binary file with a `name`.
        buckets: one or more.
        fps: frames per second of the result.
        max_upscale: the largest factor that the clip may be enlarged by.

    Raises:
        UserError: "too small: ...", "too short: ...", "damaged: ..." (the decoder marks frames in the part
            used as corrupt), "image: ...", no such file, not a video, no video stream, no frames, cannot be
            decoded or cut short; always naming the file. Only formats with an index, such as MP4, show a
            clean cut; a cut Matroska file gives the frames it still holds.
    """
    name = _name(video)
    clip: list[np.ndarray] = []
    with _open_video(video) as (rate, frames):
        first = next(frames, None)
        if first is None:
            raise UserError(f"{name}: the video holds no frames")
        shown = first[1].height, first[1].width
        if rate is None:
            single = [bucket for bucket in buckets if bucket.frames == 1]
            if not single:
                raise UserError(
                    f"{name}: image: it is one frame, and each bucket has more "
                    f"({', '.join(map(str, buckets))}); to use images, add one of 1 frame to "
                    f"config.data.buckets: (1, {buckets[0].height}, "
                    f"{buckets[0].width})"
                )
            buckets = single
        size = choose_size(*shown, buckets, max_upscale)
        if size is None:
            raise UserError(
                f"{name}: too small: {float(shown[0]):g}x{float(shown[1]):g} pixels would have to be "
                f"enlarged more than {max_upscale:g} times for every bucket ({', '.join(map(str, buckets))})"
            )
        lengths = sorted(bucket.frames for bucket in buckets if (bucket.height, bucket.width) == size)
        wanted = [Fraction(k) / Fraction(fps) for k in range(lengths[-1])]  # seconds

        last_time, last_frame, found, corrupt = None, None, 0, 0
        for time, frame in itertools.chain([first], frames):
            found += 1
            corrupt += frame.corrupt
            while len(clip) < len(wanted) and wanted[len(clip)] <= time:
                target = wanted[len(clip)]
                earlier = last_frame is not None and target - last_time < time - target
                clip.append((last_frame if earlier else frame).shape(*size))
            last_time, last_frame = time, frame
            if len(clip) == len(wanted):
                break
        else:  # past the last frame, it stays the nearest for half a frame
            while rate and len(clip) < len(wanted) and wanted[len(clip)] - last_time < 1 / (2 * rate):
                clip.append(last_frame.shape(*size))
    filled = [length for length in lengths if length <= len(clip)]
    if not filled:
        raise UserError(
            f"{name}: too short: {lengths[0]} frames at {fps:g} fps needed, "
            f"{len(clip)} found ({found} frames at {float(rate):g} fps)"
        )
    if corrupt:
        raise UserError(
            f"{name}: damaged: {corrupt} of the first {found} frames are corrupt, says the decoder"
        )
    bucket = Bucket(filled[-1], *size)
    return Clip(np.stack(clip[: filled[-1]]), bucket, (round(shown[0]), round(shown[1])))


def displayed_size(video: Video) -> tuple[int, int]:
    """The (height, width) in pixels that a clip is shown as; decodes its first frame only.

    Raises UserError as `read_clip` does.
    """
    with _open_video(video) as (_, frames):
        for _, frame in frames:
            return round(frame.height), round(frame.width)
    raise UserError(f"{_name(video)}: the video holds no frames")


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
            # With AVX-512, x264's macroblock tree reads memory that nobody wrote: equal frames came out as
            # other bytes, up to 16 levels apart.
            coding = {"crf": "18", "mbtree": "0"}
            stream = container.add_stream("libx264", rate=rate, options=coding)
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
def _open_video(video: Video) -> Iterator[tuple[Fraction | None, Iterator]]:
    """Yields the average rate and an iterator of (seconds after the first frame, `_Frame`).

    The rate of an image is None.
    """
    av = _import_av()
    name, is_file = _name(video), hasattr(video, "read")
    if not is_file and not Path(video).is_file():
        raise UserError(f"{name}: no such video file")
    image = _open_image(video)
    if image is not None:
        yield None, iter([(Fraction(0), image)])
        return
    try:
        # "file:" since FFmpeg takes what is before a colon for a protocol.
        with av.open(video if is_file else f"file:{name}") as container:
            if container.metadata.get("major_brand") in _BRANDS:
                raise UserError(f"{name}: image: AVIF and HEIF are not read: convert it to PNG")
            stream = _best_stream(container)
            if stream is None:
                raise UserError(f"{name}: the file has no video stream")
            stream.thread_type = "AUTO"
            rate = stream.average_rate or stream.guessed_rate
            if not rate:
                raise UserError(f"{name}: the video holds no frames or no frame rate")
            pixel_aspect = Fraction(stream.sample_aspect_ratio or 1)
            frames = _frames(video, container, stream, rate)
            yield rate, ((time, _Frame(name, frame, pixel_aspect)) for time, frame in frames)
    except av.error.FFmpegError as error:
        if instead := _instead(video):
            raise UserError(f"{name}: is {instead}") from error
        raise UserError(
            f"{name}: cannot be decoded; it is empty, damaged, cut short or not a video ({error.strerror})"
        ) from error


def _instead(video: Video) -> str:
    """What a file is that is often found in place of a video, "" for any other."""
    with contextlib.ExitStack() as opened:
        file = video if hasattr(video, "read") else opened.enter_context(open(video, "rb"))
        file.seek(0)
        head = file.read(200).lstrip(codecs.BOM_UTF8).lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, without the video: run `git lfs pull` in its folder"
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page and not a video: download it again"
    return ""


def _best_stream(container) -> Any:
    """The video stream that a player shows, or None. Cover pictures and the tiles of a large photo are none.

    FFmpeg prefers streams marked as default, then those of more frames, pictures or not.
    """
    from av.stream import Disposition

    pictures = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.dependent
    streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
    moving = [stream for stream in streams if stream.frames != 1] or streams
    best = container.streams.best("video")
    if best in moving:
        return best

    def rank(stream: Any) -> tuple[int, int, int]:
        return int(stream.disposition & Disposition.default), stream.frames, stream.duration or 0

    return max(moving, key=rank, default=None)


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


class _Frame:
    """A decoded frame, and how it is shown.

    Attributes:
        height, width: pixels that it is shown as, upright; fractions where the pixels stored are not square.
        corrupt: whether the decoder marks it so.
    """

    def __init__(self, name: str, frame, pixel_aspect: Fraction):
        self.corrupt = bool(frame.is_corrupt)
        self._name, self._frame = name, frame
        # The rows of the display matrix say where a step right, and a step down, in the frame leads.
        self._matrix = ((1, 0), (0, 1))
        try:
            stored = frame.side_data.get("DISPLAYMATRIX")
        except ValueError as error:  # PyAV 18 does not know all kinds that its FFmpeg gives
            raise UserError(
                f"{name}: has data of a kind that this PyAV cannot read ({error}): pip install --upgrade av"
            ) from error
        if stored is not None:
            a, b, _, c, d = np.frombuffer(bytes(stored), "<i4")[:5].tolist()
            self._matrix = ((a, b), (c, d))
        (a, b), (c, d) = self._matrix
        self._transposed = abs(b) + abs(c) > abs(a) + abs(d)
        shape = frame.height, frame.width * pixel_aspect
        self.height, self.width = shape[::-1] if self._transposed else shape
        self._pixel_aspect = 1 / pixel_aspect if self._transposed else pixel_aspect

    def shape(self, height: int, width: int) -> np.ndarray:
        """uint8 (height,width,3), see `center_crop_resize`."""
        convert = colours.converter(self._frame, self._name)
        pixels = self._frame.to_ndarray(format="rgb48le" if convert else "rgb24")  # (H, W, 3)
        if convert:
            pixels = np.float32(pixels) / 65535
        (right, down), (other_right, other_down) = self._matrix
        if self._transposed:
            pixels, right, other_down = pixels.swapaxes(0, 1), other_right, down  # (W, H, 3)
        pixels = pixels[:: -1 if other_down < 0 else 1, :: -1 if right < 0 else 1]
        shaped = center_crop_resize(pixels[None], height, width, self._pixel_aspect)[0]
        return convert(shaped) if convert else shaped


class _Image:
    """An image, with what `_Frame` has."""

    corrupt = False

    def __init__(self, pixels: np.ndarray):
        self._pixels = pixels  # uint8 (H, W, 3)
        self.height, self.width = pixels.shape[:2]

    def shape(self, height: int, width: int) -> np.ndarray:
        return center_crop_resize(self._pixels[None], height, width)[0]


def _open_image(video: Video) -> _Image | None:
    """The image in a file, upright, on white where it is transparent; None if it is not one, or moves."""
    try:
        with Image.open(video, formats=IMAGES) as image:
            moves = getattr(image, "is_animated", False) and image.format != "MPO"
            if moves or image.mode[0] in "IF":  # more than 8 bits, which FFmpeg converts
                return None
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return _Image(np.asarray(image.convert("RGB")))
    except UnidentifiedImageError:
        return None
    except Exception as error:  # Pillow lets many kinds pass from a damaged file
        raise UserError(
            f"{_name(video)}: cannot be decoded; the image is damaged or cut short ({error})"
        ) from error
    finally:
        if hasattr(video, "read"):
            video.seek(0)
