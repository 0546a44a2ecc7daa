"""Frames by timestamp, upright, in the right colours; no more decoded than needed."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest

from diffusion_data.clips import ClipCutter
from diffusion_data.errors import Reason, RowRejected
from diffusion_data.media import MediaConfig
from diffusion_data.resize import ResizePlan
from diffusion_data.video import FrameClock, decode_video, turn_upright
from tests.decoded_video import as_it_is, decode, reason
from tests.media_files import frame_numbers, gradient, write_video


def reason_of(data: bytes, num_frames: int) -> Reason:
    with pytest.raises(RowRejected) as rejected:
        decode_video(io.BytesIO(data), MediaConfig(), as_it_is, ClipCutter(num_frames))
    return rejected.value.reason


def noise(num_frames: int) -> np.ndarray:
    """Frames that compress badly, so that the file has its bytes in its frames."""
    return np.random.default_rng(0).integers(0, 256, (num_frames, 64, 96, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [("mp4", "libx264"), ("mkv", "libx264"), ("avi", "mpeg4"), ("webm", "libvpx"), ("ts", "libx264")],
)
def test_every_stored_frame_at_the_source_rate(tmp_path: Path, suffix: str, codec: str) -> None:
    video = decode(write_video(tmp_path / f"a.{suffix}", 12, fps=10, codec=codec))
    assert frame_numbers(video.pixels) == list(range(12))
    assert video.pixels.shape == (12, 64, 96, 3)
    assert (video.fps[0], video.source_height, video.source_width) == (10.0, 64, 96)


def test_lower_rate_takes_the_frame_shown_at_that_time(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 12, fps=12)
    assert frame_numbers(decode(path, fps=4).pixels) == [0, 3, 6, 9]
    assert frame_numbers(decode(path, fps=5).pixels) == [0, 2, 4, 7, 9]
    assert decode(path, fps=5).fps == [5.0]


def test_higher_rate_repeats_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 3, fps=10)
    assert frame_numbers(decode(path, fps=20).pixels) == [0, 0, 1, 1, 2, 2]


def test_the_frames_of_a_clip_are_held_once(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 12, fps=1)
    decode(path, num_frames=1)  # imports
    tracemalloc.start()
    try:
        pixels = decode(path, fps=20).pixels
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(pixels) == 240
    assert peak_bytes < 1.5 * pixels.nbytes


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_variable_frame_rate_follows_the_clock(tmp_path: Path, suffix: str) -> None:
    # One second at 5 fps, one at 20 fps, then the last frame stands until 3 s.
    times = [*range(0, 1000, 200), *range(1000, 2000, 50), 3000]
    path = write_video(tmp_path / f"a.{suffix}", len(times), at_milliseconds=times)
    numbers = frame_numbers(decode(path, num_frames=31, fps=10).pixels)
    expected = [max(n for n, at in enumerate(times) if at <= 100 * tick) for tick in range(31)]
    assert numbers[:31] == expected
    whole = decode(path)
    assert len(whole.pixels) == len(times)
    assert whole.fps[0] == pytest.approx(25 / 3, rel=0.01)


def test_decoding_stops_when_enough_frames_are_there(tmp_path: Path) -> None:
    pictures = list(noise(40))
    options = {"movflags": "faststart"}
    path = write_video(tmp_path / "a.mp4", 40, gop_size=5, pictures=pictures, container_options=options)
    data = bytearray(path.read_bytes())
    quarter = len(data) // 4
    data[-quarter:] = b"\xff" * quarter  # destroys the last frames
    video = decode_video(io.BytesIO(bytes(data)), MediaConfig(), as_it_is, ClipCutter(6))
    assert len(video.pixels) == 6
    assert reason_of(bytes(data), 40) == Reason.decode_error


def test_frames_are_resized_one_by_one(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 5, height=128, width=192)
    shapes = []

    class Plan(ResizePlan):
        def apply(self, frames: np.ndarray) -> np.ndarray:
            shapes.append(frames.shape)
            return super().apply(frames)

    plan = Plan(cover_height=32, cover_width=48, height=32, width=48)
    with path.open("rb") as file:
        video = decode_video(file, MediaConfig(), lambda height, width: plan, ClipCutter(5))
    assert shapes == [(1, 128, 192, 3)] * 5
    assert video.pixels.shape == (5, 32, 48, 3)
    assert (video.source_height, video.source_width) == (128, 192)


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_rotation_metadata_is_applied(tmp_path: Path, rotation: int) -> None:
    if not hasattr(av.video.stream.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV can't write rotation metadata")
    stored = gradient()
    path = write_video(tmp_path / "a.mp4", 1, pictures=[stored], rotation=rotation)
    video = decode(path)
    shown = np.rot90(stored, rotation // 90)  # both turn counterclockwise
    assert (video.source_height, video.source_width) == shown.shape[:2]
    assert np.abs(video.pixels[0].astype(int) - shown).mean() < 4


def test_display_matrix_may_mirror() -> None:
    picture, one = gradient(4, 6), 1 << 16
    mirrored = turn_upright(picture, (-one, 0, 0, 0, one, 0, 0, 0, 1 << 30))
    np.testing.assert_array_equal(mirrored, picture[:, ::-1])
    clockwise = turn_upright(picture, (0, one, 0, -one, 0, 0, 0, 0, 1 << 30))
    np.testing.assert_array_equal(clockwise, np.rot90(picture, -1))


def raw_video(tmp_path: Path, pixel_format: str, planes: tuple[int, int, int], **colour: int) -> Path:
    """One losslessly stored frame of constant planes, tagged with its colour range and space."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream("ffv1", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 64, pixel_format
        for name, value in colour.items():
            setattr(stream.codec_context, name, value)
        frame = av.VideoFrame(64, 64, pixel_format)
        kind = np.uint16 if "10" in pixel_format else np.uint8
        for plane, value in zip(frame.planes, planes, strict=True):
            plane.update(np.full(plane.buffer_size // kind().itemsize, value, kind).tobytes())
        frame.pts = 0
        for name, value in colour.items():
            setattr(frame, name, value)
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


LIMITED, FULL, BT709, BT601 = 1, 2, 1, 5


@pytest.mark.parametrize(
    ("pixel_format", "planes", "color_range", "colorspace", "rgb"),
    [
        ("yuv420p", (235, 128, 128), LIMITED, BT709, (255, 255, 255)),
        ("yuv420p", (16, 128, 128), LIMITED, BT709, (0, 0, 0)),
        ("yuv420p", (235, 128, 128), FULL, BT709, (235, 235, 235)),
        ("yuv420p", (63, 102, 240), LIMITED, BT709, (255, 0, 0)),
        ("yuv420p", (81, 90, 240), LIMITED, BT601, (255, 0, 0)),
        ("yuv444p", (235, 128, 128), LIMITED, BT709, (255, 255, 255)),
        ("yuv420p10le", (940, 512, 512), LIMITED, BT709, (255, 255, 255)),
        ("yuv420p10le", (1023, 512, 512), FULL, BT709, (255, 255, 255)),
        ("yuv420p10le", (512, 512, 512), FULL, BT709, (128, 128, 128)),
        ("yuv420p10le", (250, 409, 960), LIMITED, BT709, (255, 0, 0)),
    ],
)
def test_declared_range_and_matrix_are_used(
    tmp_path: Path, pixel_format: str, planes: tuple[int, int, int], color_range: int, colorspace: int,
    rgb: tuple[int, int, int],
) -> None:  # fmt: skip
    path = raw_video(tmp_path, pixel_format, planes, color_range=color_range, colorspace=colorspace)
    pixel = decode(path).pixels[0, 32, 32].astype(int)
    assert np.abs(pixel - rgb).max() <= 3


def test_non_square_pixels_become_square(tmp_path: Path) -> None:
    from fractions import Fraction

    path = write_video(tmp_path / "a.mp4", 1, sample_aspect_ratio=Fraction(4, 3))
    video = decode(path)
    assert video.pixels.shape == (1, 64, 128, 3)
    assert (video.source_height, video.source_width) == (64, 96)


@pytest.mark.parametrize(
    ("suffix", "codec"), [("mp4", "libx264"), ("mkv", "libx264"), ("avi", "mpeg4"), ("ts", "libx264")]
)
@pytest.mark.parametrize("faststart", [False, True])
def test_file_cut_short_is_truncated(tmp_path: Path, suffix: str, codec: str, faststart: bool) -> None:
    options = {"movflags": "faststart"} if faststart and suffix == "mp4" else {}
    path = write_video(tmp_path / f"a.{suffix}", 20, codec=codec, pictures=list(noise(20)), container_options=options)
    whole = path.read_bytes()
    length = len(whole) * 6 // 10
    if suffix == "ts" and length % 188 == 0:  # between two packets nothing tells that there were more
        length += 1
    path.write_bytes(whole[:length])
    assert reason(path) == Reason.truncated


def test_clip_before_the_cut_is_used(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", 20, pictures=list(noise(20)), gop_size=4)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 8 // 10])
    assert len(decode(path, num_frames=5).pixels) == 5


def test_damaged_video_is_a_decode_error(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 5)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    data[start : data.index(b"moov") - 4] = b"\xff" * (data.index(b"moov") - 4 - start)
    path.write_bytes(bytes(data))
    assert reason(path) == Reason.decode_error
    path.write_bytes(b"\x1a\x45\xdf\xa3" + b"\xff" * 500)  # Matroska's first bytes, then nothing of it
    assert reason(path) == Reason.decode_error


def test_playlist_opens_no_other_file(tmp_path: Path) -> None:
    video = write_video(tmp_path / "secret.ts", 3)
    lists = {
        "a.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{video}\n#EXT-X-ENDLIST\n",
        "a.ffconcat": f"ffconcat version 1.0\nfile '{video}'\n",
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
        assert reason(tmp_path / name) == Reason.not_media


def test_text_and_noise_are_not_media(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    for data in (b"<html>404</html>", bytes(np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8))):
        path.write_bytes(data)
        assert reason(path) == Reason.not_media


def test_pixel_limit_is_checked_before_decoding(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 1)
    assert reason(path, max_pixels=64 * 96 - 1) == Reason.too_large
    assert decode(path, max_pixels=64 * 96).pixels.shape == (1, 64, 96, 3)


def test_clock_goes_on_where_timestamps_are_missing_or_jump_back() -> None:
    times = [5.0, 5.1, None, 2.0, 2.1]
    frames = [SimpleNamespace(time=time, duration=None, time_base=None) for time in times]
    seconds = [at for at, _, _ in FrameClock(10.0).timed(frames)]
    assert seconds == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
