"""Video files in and out: rates, sizes, colours, odd formats and damaged files, all made here."""

import io
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from prophy_jax.data.sources import video
from prophy_jax.run.errors import UserError
from tests.conftest import ROOT
from tests.videos import read_clip, read_video

av = pytest.importorskip("av", reason="video needs PyAV: pip install av")

# H.264 and the YUV conversion move flat areas by up to 3 of 255 levels; frames differ by 6 or more.
LEVELS = 3


def counting_clip(num_frames, height=48, width=64, step=6):
    """Frame i is flat grey of level 20 + step i, so that a decoded frame tells its index."""
    levels = (20 + step * np.arange(num_frames)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (num_frames, height, width, 3))


def indices(frames, step=6):
    return np.rint((frames.mean(axis=(1, 2, 3)) - 20) / step).astype(int).tolist()


def encode(path, frames, rate=30, codec="libx264", pix_fmt="yuv420p", pts=None, rotation=0, **options):
    """A clip written by PyAV directly, for what `write_mp4` does not write."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        if rotation:
            stream.set_display_rotation(rotation)
        for i, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[i], Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def cut(path, target, share):
    data = path.read_bytes()
    target.write_bytes(data[: int(len(data) * share)])
    return target


def in_memory(path):
    file = io.BytesIO(path.read_bytes())
    file.name = str(path)
    return file


# ---- write and read ------------------------------------------------------------------------------


def test_round_trip_keeps_frames_size_rate_and_order(tmp_path):
    path = tmp_path / "clip.mp4"
    frames = counting_clip(12)
    video.write_mp4(path, frames, 16)
    back, fps = read_video(path)
    assert back.shape == frames.shape and back.dtype == np.uint8 and fps == 16
    assert indices(back) == list(range(12))
    assert np.abs(back.astype(int) - frames).max() <= LEVELS
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert container.format.name.startswith("mov,mp4")


@pytest.mark.parametrize("fps", [8, 16.0, 23.976, 29.97])
def test_rate_survives(tmp_path, fps):
    video.write_mp4(tmp_path / "clip.mp4", counting_clip(5), fps)
    assert read_video(tmp_path / "clip.mp4")[1] == pytest.approx(fps, rel=1e-4)  # 24000/1001


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (10, 200, 90)])
def test_colours_survive(tmp_path, colour):
    frames = np.full((3, 48, 64, 3), colour, np.uint8)
    video.write_mp4(tmp_path / "clip.mp4", frames, 16)
    for back in (read_video(tmp_path / "clip.mp4")[0], read_clip(tmp_path / "clip.mp4", 3, 16, 48, 64)):
        # A wrong YUV matrix moves green by 20 and more.
        assert np.abs(back.astype(int) - frames).max() <= LEVELS


def test_odd_sizes_are_padded_by_their_edge(tmp_path):
    frames = np.zeros((3, 47, 63, 3), np.uint8)
    frames[:, 30:, 40:] = 200
    video.write_mp4(tmp_path / "clip.mp4", frames, 16)
    back = read_video(tmp_path / "clip.mp4")[0]
    assert back.shape == (3, 48, 64, 3)
    assert abs(int(back[1, -1, -1, 0]) - 200) <= LEVELS and back[1, 5, -1, 0] <= LEVELS


def test_equal_frames_are_equal_files_whatever_the_memory_held(tmp_path):
    """Memory as glibc hands it out: fresh, or filled with one byte; AVX-512 told them apart."""
    code = """
import sys, numpy as np
from prophy_jax.data.sources import video
cells = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
for name in ("a", "b"):
    video.write_mp4(sys.argv[1] + name + ".mp4", cells.repeat(4, 1).repeat(4, 2), 8)
"""
    heap = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1073741824"}  # no fresh pages, which are zero
    for fill in ("0", "85", "170"):
        environment = {**os.environ, **heap, "MALLOC_PERTURB_": fill}
        command = [sys.executable, "-c", code, str(tmp_path / fill)]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1 and len(list(tmp_path.iterdir())) == 6


def test_writing_replaces_whole_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    video.write_mp4(path, counting_clip(3), 16)
    assert len(read_video(path)[0]) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_interrupted_writing_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(av.VideoFrame, "from_ndarray", interrupt)
    with pytest.raises(KeyboardInterrupt):
        video.write_mp4(path, counting_clip(3), 16)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_unwritable_target_is_one_line(tmp_path):
    with pytest.raises(UserError, match="missing/clip.mp4: cannot be written"):
        video.write_mp4(tmp_path / "missing" / "clip.mp4", counting_clip(3), 16)


@pytest.mark.parametrize("bad", [np.zeros((0, 4, 4, 3), np.uint8), np.zeros((2, 4, 4, 3))])
def test_wrong_frames_are_a_programming_error(tmp_path, bad):
    with pytest.raises(ValueError, match="uint8"):
        video.write_mp4(tmp_path / "clip.mp4", bad, 16)


# ---- rates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "rate", "num_frames", "fps", "expected"),
    [
        # k * 30/8 = 0, 3.75, 7.5, 11.25, 15, 18.75, 22.5, 26.25; halves go to the later frame.
        (30, 30, 8, 8, [0, 4, 8, 11, 15, 19, 23, 26]),
        (9, 16, 9, 16, list(range(9))),
        (9, 8, 5, 16, [0, 1, 1, 2, 2]),  # a higher rate repeats
    ],
)
def test_nearest_frames_at_another_rate(tmp_path, count, rate, num_frames, fps, expected):
    encode(tmp_path / "clip.mp4", counting_clip(count), rate=rate)
    assert indices(read_clip(tmp_path / "clip.mp4", num_frames, fps, 48, 64)) == expected


def test_too_short_says_needed_and_found(tmp_path):
    encode(tmp_path / "clip.mp4", counting_clip(30))
    with pytest.raises(UserError, match=r"9 frames at 8 fps needed, 8 found \(30 frames at 30 fps"):
        read_clip(tmp_path / "clip.mp4", 9, 8, 24, 24)


# ---- crop and resize -----------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(48, 48), (24, 48), (96, 32), (40, 64)])
def test_crop_is_centred_and_keeps_the_aspect_ratio(height, width):
    # Coordinates as colours: linear ramps stay linear under resizing and tell the window.
    rows, columns = np.mgrid[:120, :160]
    frame = np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8)[None]
    result = video.center_crop_resize(frame, height, width)[0].astype(float)
    assert result.shape == (height, width, 3)
    scale = min(120 / height, 160 / width)
    x = (160 - 1) / 2 + scale * (np.arange(width) - (width - 1) / 2)
    y = (120 - 1) / 2 + scale * (np.arange(height) - (height - 1) / 2)
    inner = slice(3, -3)  # the filter is one-sided at the borders
    np.testing.assert_allclose(result[height // 2, inner, 0], x[inner], atol=1)  # uint8 rounding
    np.testing.assert_allclose(result[inner, width // 2, 1], y[inner], atol=1)


def test_resizing_is_antialiased_and_the_same_size_is_exact():
    rows, columns = np.mgrid[:128, :128]
    board = np.repeat(((rows + columns) % 2 * 255).astype(np.uint8)[..., None], 3, -1)[None]
    # A one-pixel chessboard shrunk fourfold is grey; without a filter 0 and 255 would remain.
    inner = video.center_crop_resize(board, 32, 32)[0, 2:-2, 2:-2].astype(int)
    assert np.abs(inner - 127.5).max() <= 2
    np.testing.assert_array_equal(video.center_crop_resize(board, 128, 128), board)


# ---- streaming -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "num_frames", "target_fps"),
    [(30, 8, 8), (30, 5, 30), (25, 9, 16), (24, 12, 16), (8, 9, 16), (Fraction(30000, 1001), 8, 8)],
)
def test_streaming_equals_choosing_of_all_frames(tmp_path, rate, num_frames, target_fps):
    path = tmp_path / "clip.mp4"
    encode(path, counting_clip(32), rate=rate)
    frames, fps = read_video(path)
    nearest = np.floor(np.arange(num_frames) * fps / target_fps + 0.5).astype(int)
    expected = video.center_crop_resize(frames[nearest], 24, 24)
    np.testing.assert_array_equal(read_clip(path, num_frames, target_fps, 24, 24), expected)


@pytest.mark.parametrize("num_frames", [7, 8, 9, 10])
def test_reading_ends_with_the_last_whole_frame(tmp_path, num_frames):
    path = tmp_path / "clip.mp4"
    encode(path, counting_clip(30))  # 8 frames at 8 fps fit, the ninth would be source frame 30
    if num_frames <= 8:
        assert len(read_clip(path, num_frames, 8, 24, 24)) == num_frames
    else:
        with pytest.raises(UserError, match=rf"clip.mp4.*{num_frames} frames.*8 found \(30"):
            read_clip(path, num_frames, 8, 24, 24)


def test_last_frame_stays_nearest_for_half_a_frame(tmp_path):
    path = tmp_path / "clip.mp4"
    encode(path, counting_clip(4), rate=8)
    # At 18 fps, frame 7 is at 0.389 s; the last of 4 frames at 8 fps is at 0.375 s.
    assert indices(read_clip(path, 8, 18, 48, 64)) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_reading_stops_decoding_early(tmp_path):
    path = tmp_path / "clip.mp4"
    noise = np.random.RandomState(0).randint(0, 255, (60, 48, 64, 3), np.uint8)
    encode(path, noise, movflags="faststart")
    broken = cut(path, tmp_path / "broken.mp4", 0.6)
    with pytest.raises(UserError):
        read_clip(broken, 60, 30, 24, 24)  # the damage is real,
    assert len(read_clip(broken, 5, 30, 24, 24)) == 5  # and comes after what is needed


def test_reading_follows_presentation_times(tmp_path):
    path = tmp_path / "clip.mp4"
    # 12 frames: six at 30 fps, then six at 10 fps.
    encode(path, counting_clip(12), pts=[0, 1, 2, 3, 4, 5, 8, 11, 14, 17, 20, 23])
    # Every 0.1 s is every 3 ticks: 0 3 6 9 12 15 18 21; nearest of the ticks above, ties late.
    assert indices(read_clip(path, 8, 10, 48, 64)) == [0, 3, 5, 6, 7, 8, 9, 10]


# ---- buckets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "max_upscale", "expected"),
    [
        (480, 832, 1, (480, 832)),  # its own shape
        (1080, 1920, 1, (480, 832)),  # 16:9 is 1.026 times wider than 480x832, 1.185 times than 480x720
        (1080, 1500, 1, (480, 720)),  # 1.389 to 1.5 is a factor of 1.08, to 1 of 1.389
        (1000, 1000, 1, (480, 480)),
        (1280, 720, 1, (832, 480)),  # portrait
        (240, 416, 3, (480, 832)),  # equal aspects: the largest
        (240, 416, 1.5, (240, 416)),  # without enlarging more than 1.5 times
        (400, 832, 1.2, (480, 832)),  # 2.08 is nearest to 1.733; 480/400 = 1.2 is just allowed
        (400, 832, 1.19, (240, 416)),  # and now not: of the same aspect, the smaller one
        (200, 200, 1, None),
    ],
)
def test_size_is_the_nearest_in_aspect_that_the_clip_covers(height, width, max_upscale, expected):
    sizes = [(480, 832), (832, 480), (480, 720), (480, 480), (240, 416)]
    buckets = [video.Bucket(81, *size) for size in sizes]
    assert video.choose_size(height, width, buckets, max_upscale) == expected
    assert video.choose_size(height, width, buckets[::-1], max_upscale) == expected


def test_a_square_clip_takes_the_first_of_two_equally_near_sizes():
    buckets = [video.Bucket(5, 32, 64), video.Bucket(5, 64, 32)]
    assert video.choose_size(100, 100, buckets) == (32, 64)


@pytest.mark.parametrize(("num_frames", "expected"), [(16, 5), (17, 9), (32, 9), (33, 17), (50, 17)])
def test_longest_bucket_that_the_clip_fills(tmp_path, num_frames, expected):
    # At half the rate 5, 9 and 17 frames are the source's frames up to 8, 16 and 32.
    path = tmp_path / "clip.mp4"
    encode(path, counting_clip(num_frames, step=4))
    buckets = [video.Bucket(frames, 24, 24) for frames in (9, 5, 17)] + [video.Bucket(3, 24, 96)]
    frames, bucket, _ = video.read_clip(path, buckets, 15)
    assert bucket == (expected, 24, 24) and frames.shape == (expected, 24, 24, 3)
    assert indices(frames, step=4) == list(range(0, 2 * expected, 2))


def test_portrait_clip_by_rotation_takes_the_upright_bucket(tmp_path):
    encode(tmp_path / "phone.mp4", counting_clip(9), rotation=90)
    buckets = [video.Bucket(5, 24, 32), video.Bucket(5, 32, 24)]
    assert video.read_clip(tmp_path / "phone.mp4", buckets, 30)[1] == (5, 32, 24)


def test_too_small_and_too_short_name_the_file(tmp_path):
    path = tmp_path / "clip.mp4"
    encode(path, counting_clip(9))
    buckets = [video.Bucket(5, 96, 128), video.Bucket(5, 64, 64)]
    with pytest.raises(UserError, match=r"clip.mp4: too small: 48x64 pixels .* 1.25 times"):
        video.read_clip(path, buckets, 30, max_upscale=1.25)
    assert video.read_clip(path, buckets, 30, max_upscale=1.5)[1] == (5, 64, 64)  # 64/48 = 1.33
    with pytest.raises(UserError, match=r"clip.mp4: too short: 11 frames at 30 fps needed, 9 found"):
        video.read_clip(path, [video.Bucket(13, 48, 64), video.Bucket(11, 48, 64)], 30)


def test_bucket_as_text():
    bucket = video.Bucket(81, 480, 832)
    assert str(bucket) == f"{bucket}" == "81x480x832" and video.Bucket.parse("81x480x832") == bucket


@pytest.mark.parametrize("text", ["480x832", "81x480x832x3", "81xax832", "0x480x832", ""])
def test_bucket_of_other_text(text):
    with pytest.raises(UserError, match="FRAMESxHEIGHTxWIDTH"):
        video.Bucket.parse(text)


@pytest.mark.parametrize("codec", ["libx264", "ffv1"])
def test_a_file_in_memory_reads_as_the_path(tmp_path, codec):
    path = tmp_path / ("clip.mp4" if codec == "libx264" else "clip.mkv")
    encode(path, counting_clip(20), codec=codec)
    frames = read_clip(in_memory(path), 20, 30, 48, 64)
    np.testing.assert_array_equal(frames, read_clip(path, 20, 30, 48, 64))
    assert indices(frames) == list(range(20))
    np.testing.assert_array_equal(read_clip(in_memory(path), 5, 8, 24, 24), read_clip(path, 5, 8, 24, 24))


# ---- formats -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "height", "width"),
    [
        ("ten_bit.mkv", "ffv1", "yuv420p10le", 48, 64),
        ("odd.mkv", "ffv1", "yuv420p", 47, 63),
        ("odd_444.mp4", "libx264", "yuv444p", 47, 63),
        ("palette.gif", "gif", "rgb8", 48, 64),
    ],
)
def test_other_formats_decode(tmp_path, name, codec, pix_fmt, height, width):
    frames = counting_clip(10, height, width, step=20)
    encode(tmp_path / name, frames, rate=25, codec=codec, pix_fmt=pix_fmt)
    with pytest.raises(UserError, match=f"too small: {height}x{width} pixels"):  # its size and its rate
        video.read_clip(tmp_path / name, [video.Bucket(10, 2 * height, width)], 25, max_upscale=1)
    back = read_clip(tmp_path / name, 10, 25, height, width)
    assert indices(back, step=20) == list(range(10))
    with pytest.raises(UserError, match=r"\(10 frames at 25 fps"):
        read_clip(tmp_path / name, 11, 25, height, width)
    assert read_clip(tmp_path / name, 4, 8, 16, 16).shape == (4, 16, 16, 3)


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation_metadata_is_applied(tmp_path, rotation):
    frames = np.zeros((4, 48, 64, 3), np.uint8)
    frames[:, :24, :32] = 255  # the top left quarter as stored
    encode(tmp_path / "phone.mp4", frames, rotation=rotation)
    expected = np.rot90(frames, rotation // 90, axes=(1, 2))  # counterclockwise
    height, width = expected.shape[1:3]
    buckets = [video.Bucket(4, height, width), video.Bucket(4, width, height)]
    back, bucket, _ = video.read_clip(tmp_path / "phone.mp4", buckets, 30)
    assert bucket == buckets[0] and back.shape == expected.shape
    for y, x in ((0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75)):
        at = (2, int(y * back.shape[1]), int(x * back.shape[2]), 0)
        assert abs(int(back[at]) - int(expected[at])) <= LEVELS


MATRICES = {  # (a, b, c, d) of the display matrix -> what is shown of a stored frame
    (1, 0, 0, 1): lambda x: x,
    (-1, 0, 0, 1): lambda x: x[:, ::-1],
    (1, 0, 0, -1): lambda x: x[::-1],
    (-1, 0, 0, -1): lambda x: x[::-1, ::-1],
    (0, 1, 1, 0): lambda x: x.swapaxes(0, 1),
    (0, 1, -1, 0): lambda x: np.rot90(x, -1),
    (0, -1, 1, 0): lambda x: np.rot90(x),
    (0, -1, -1, 0): lambda x: x.swapaxes(0, 1)[::-1, ::-1],
}


@pytest.mark.parametrize("matrix", MATRICES)
def test_all_eight_display_matrices_are_applied(tmp_path, matrix):
    frame = np.zeros((48, 64, 3), np.uint8)
    frame[:24, :32], frame[:24, 32:] = 240, 160  # four quarters of different grey
    frame[24:, :32] = 80
    a, b, c, d = (65536 * value for value in matrix)
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    expected = MATRICES[matrix](frame).astype(int)
    shown = read_clip(tmp_path / "clip.mp4", 1, 30, *expected.shape[:2])[0].astype(int)
    height, width = expected.shape[:2]
    for y in (height // 4, 3 * height // 4):
        for x in (width // 4, 3 * width // 4):
            assert abs(shown[y, x, 0] - expected[y, x, 0]) <= LEVELS


@pytest.mark.parametrize(("aspect", "turned"), [(2, False), (2, True), (Fraction(1, 2), False)])
def test_pixels_that_are_not_square_are_shown_at_their_size(tmp_path, aspect, turned):
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        if turned:
            stream.set_display_rotation(90)
        columns = np.broadcast_to(np.arange(48, dtype=np.uint8)[:, None] * 5, (64, 48, 3))
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(columns))))
        container.mux(stream.encode())
    size = (64, int(48 * aspect))[:: -1 if turned else 1]
    assert video.displayed_size(path) == size
    clip = video.read_clip(path, [video.Bucket(1, *size)], 30)
    assert clip.shown == size
    # The whole picture is there: its first and its last column.
    ramp = np.rot90(clip.frames[0], -1 if turned else 0)[..., 0].mean(0)
    assert ramp[0] < 15 and ramp[-1] > 220


def test_corrupt_frames_in_the_part_used_are_found(tmp_path):
    whole, path = tmp_path / "whole.mp4", tmp_path / "damaged.mp4"
    noise = np.random.RandomState(0).randint(0, 255, (20, 96, 160, 3), np.uint8)
    encode(whole, noise)
    data = bytearray(whole.read_bytes())
    with av.open(str(whole)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    position, size = packets[10]
    for at in range(position + size // 2, position + size, 97):
        data[at] ^= 255
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged.mp4: (damaged: \d+ of the first 20 frames|cannot be)"):
        read_clip(path, 20, 30, 24, 24)
    assert len(read_clip(path, 3, 30, 24, 24)) == 3  # the damage comes after what is needed


def test_a_cover_picture_before_the_video_is_not_the_video(tmp_path):
    path = tmp_path / "clip.mp4"
    frames = counting_clip(9)
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=25)
        stream = container.add_stream("libx264", rate=30)
        cover.height = stream.height = 48
        cover.width = stream.width = 64
        cover.pix_fmt, stream.pix_fmt = "yuvj420p", "yuv420p"
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 250, np.uint8))))
        for array in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(array))))
        container.mux(stream.encode())
    assert indices(read_clip(path, 9, 30, 48, 64)) == list(range(9))


@pytest.mark.parametrize(("transfer", "white"), [(16, 0.58069), (18, 0.75)])
def test_hdr_becomes_sdr(tmp_path, transfer, white):
    path = tmp_path / "hdr.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=30)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p10le"
        context = stream.codec_context
        context.colorspace, context.color_primaries, context.color_trc = 9, 9, transfer
        context.color_range = 1
        pixels = np.full((48, 64, 3), round(65535 * white), np.uint16)
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb48le")
        container.mux(stream.encode(frame.reformat(format="yuv420p10le", dst_colorspace=9)))
        container.mux(stream.encode())
    shown = read_clip(path, 1, 30, 48, 64)
    # Reference white, 203 cd/m2: 0.68 of linear light after the curve, 217 of 255 at gamma 2.4.
    assert abs(int(shown[0, 24, 32, 0]) - 217) <= LEVELS and np.ptp(shown[0, 24, 32]) <= LEVELS


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_a_clip_of_one_frame(tmp_path, orientation):
    image = np.zeros((48, 64, 3), np.uint8)
    image[:24, :32] = 255
    exif = Image.Exif()
    exif[0x112] = orientation
    path = tmp_path / "PICTURE"  # formats are told by content
    Image.fromarray(image).save(path, "WEBP" if orientation % 2 else "PNG", exif=exif, lossless=True)
    with Image.open(path) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored))
    clip = video.read_clip(
        in_memory(path), [video.Bucket(9, 48, 64), video.Bucket(1, *expected.shape[:2])], 8
    )
    np.testing.assert_array_equal(clip.frames, expected[None])
    with pytest.raises(
        UserError, match=r"PICTURE: image: .*\(9x48x64\).* add one of 1 frame .*\(1, 48, 64\)"
    ):
        read_clip(path, 9, 8, 48, 64)


@pytest.mark.skipif("avif" not in features.get_supported_modules(), reason="needs a Pillow that writes AVIF")
def test_an_avif_image_is_no_video(tmp_path, monkeypatch):
    """FFmpeg shows it for a second, which would be a clip in which nothing moves."""
    path = tmp_path / "a.avif"
    Image.new("RGB", (64, 48), (90, 90, 90)).save(path)
    assert read_clip(path, 1, 8, 48, 64).shape == (1, 48, 64, 3)
    with pytest.raises(UserError, match="a.avif: image: it is one frame"):
        read_clip(path, 5, 8, 48, 64)
    monkeypatch.setattr(video, "IMAGES", ("JPEG",))  # an older Pillow
    with pytest.raises(UserError, match="a.avif: image: AVIF and HEIF are not read"):
        read_clip(path, 5, 8, 48, 64)


# ---- bad input -----------------------------------------------------------------------------------


def audio_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for i in range(16):
            samples = np.zeros((1, 1024), np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def no_frames(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        container.start_encoding()


def truncated(path):
    whole = path.with_name("whole.mp4")
    encode(whole, np.random.RandomState(0).randint(0, 255, (30, 48, 64, 3), np.uint8))
    cut(whole, path, 0.5)  # the index, at the end, is lost


BAD = {
    "audio.mp4": (audio_only, "no video stream"),
    "empty_stream.mkv": (no_frames, "is empty"),
    "empty_stream.avi": (no_frames, "no frames|0 frames"),
    "truncated.mp4": (truncated, "cut short"),
    "text.mp4": (lambda path: path.write_text("not a video\n" * 100), "not a video"),
    "nothing.mp4": (lambda path: path.write_bytes(b""), "not a video"),
    "missing.mp4": (lambda path: None, "no such"),
    "folder.mp4": (lambda path: path.mkdir(), "no such"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_line_naming_the_file(tmp_path, capfd, name):
    make, message = BAD[name]
    make(tmp_path / name)
    capfd.readouterr()
    with pytest.raises(UserError, match=message) as error:
        read_clip(tmp_path / name, 25, 30, 16, 16)
    assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)
    assert capfd.readouterr().err == ""  # FFmpeg's own log stays quiet
    if (tmp_path / name).is_file():
        with pytest.raises(UserError, match=message) as again:
            read_clip(in_memory(tmp_path / name), 25, 30, 16, 16)
        assert str(again.value) == str(error.value)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.999])
def test_damage_behind_the_index_is_found_when_it_is_reached(tmp_path, share):
    whole = tmp_path / "whole.mp4"
    noise = np.random.RandomState(0).randint(0, 255, (30, 48, 64, 3), np.uint8)
    encode(whole, noise, movflags="faststart")
    broken = cut(whole, tmp_path / "cut.mp4", share)
    # FFmpeg either reports the last packet as damaged or ends early without a word.
    for file in (broken, in_memory(broken)):
        with pytest.raises(UserError, match="cut.mp4: .*cut short"):
            read_clip(file, 31, 30, 16, 16)


def test_without_pyav_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match="pip install av"):
        read_clip(tmp_path / "clip.mp4", 5, 8, 16, 16)
