"""Which of a file's streams the frames come from: never of a cover picture, never of two."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from diffusion_data.errors import Reason
from tests.decoded_video import decode, reason
from tests.media_files import encoded, frame_numbers, gradient, level

SMALL, LARGE = 0, 1  # the streams of write_two_streams


def write_two_streams(path: Path, default: Collection[int]) -> Path:
    """Of 32 x 48 pixels with the frames 10 to 17, of 64 x 96 with 0 to 7; those in `default` are flagged so."""
    with av.open(str(path), "w") as output:
        streams: list[Any] = []
        for height, width in ((32, 48), (64, 96)):
            stream: Any = output.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.disposition = Disposition.default if len(streams) in default else Disposition(0)
            streams.append(stream)
        for number in range(8):
            for stream, value in zip(streams, (level(10 + number), level(number)), strict=True):
                picture = np.full((stream.height, stream.width, 3), value, np.uint8)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts = number
                output.mux(stream.encode(frame))
        for stream in streams:
            output.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("suffix", "default", "taken"),
    [
        ("mkv", [], LARGE),
        ("mkv", [SMALL], SMALL),
        ("mkv", [LARGE], LARGE),
        ("mkv", [SMALL, LARGE], LARGE),
        ("mp4", [SMALL], SMALL),
        ("mp4", [LARGE], LARGE),
    ],
)
def test_of_several_streams_the_default_one_is_taken_else_the_largest_and_they_are_not_mixed(
    tmp_path: Path, suffix: str, default: list[int], taken: int
) -> None:
    video = decode(write_two_streams(tmp_path / f"a.{suffix}", default))
    assert video.pixels.shape == ((8, 32, 48, 3), (8, 64, 96, 3))[taken]
    assert frame_numbers(video.pixels) == [list(range(10, 18)), list(range(8))][taken]


def test_a_cover_picture_is_not_taken_for_the_video_however_large_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.disposition = 96, 64, "yuv420p", Disposition(0)
        output.add_attachment("cover.png", "image/png", encoded(Image.new("RGB", (192, 128), "white"), "PNG"))
        for number in range(4):
            picture = np.full((64, 96, 3), level(number), np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode())
    with av.open(str(path)) as file:
        flags = [(stream.width, stream.disposition) for stream in file.streams.video]
    assert flags == [(96, Disposition(0)), (192, Disposition.attached_pic)]
    video = decode(path)
    assert video.pixels.shape == (4, 64, 96, 3)
    assert frame_numbers(video.pixels) == [0, 1, 2, 3]


@pytest.mark.parametrize("with_cover", [False, True])
def test_sound_has_no_frames_with_a_cover_picture_or_without(tmp_path: Path, with_cover: bool) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream("aac", rate=44100)
        if with_cover:
            cover: Any = output.add_stream("mjpeg", rate=1)
            cover.width, cover.height, cover.pix_fmt, cover.disposition = 96, 64, "yuvj420p", Disposition.attached_pic
            output.mux(cover.encode(av.VideoFrame.from_ndarray(gradient(), format="rgb24")))
            output.mux(cover.encode())
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    with av.open(str(path)) as file:
        assert len(file.streams.video) == with_cover
    assert reason(path) == Reason.no_frames
