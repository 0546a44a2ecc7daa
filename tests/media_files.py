"""Tiny real media files for the tests: solid grey frames whose level says which frame it is."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

MILLISECOND = Fraction(1, 1000)


def level(number: int) -> int:
    """Grey of frame `number`; far enough apart to survive compression."""
    return 20 + 6 * number


def frame_numbers(pixels: np.ndarray) -> list[int]:
    """Which frames of write_video's these are."""
    return [round((float(frame.mean()) - 20) / 6) for frame in pixels]


def write_video(
    path: Path,
    num_frames: int,
    fps: int = 10,
    *,
    height: int = 64,
    width: int = 96,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    at_milliseconds: Sequence[int] | None = None,
    pictures: Sequence[np.ndarray] | None = None,
    rotation: int = 0,
    container_options: dict[str, str] | None = None,
    **stream_attributes: Any,
) -> Path:
    """Grey frames (or rgb24 pictures) at fps, or at the given times."""
    with av.open(str(path), "w", options=container_options or {}) as output:
        stream: Any = output.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.bit_rate = 4_000_000
        for name, value in stream_attributes.items():
            setattr(stream.codec_context, name, value)
        if at_milliseconds is not None:
            stream.time_base = stream.codec_context.time_base = MILLISECOND
        if rotation:
            stream.set_display_rotation(rotation)
        output.start_encoding()  # a file, even without a frame
        for number in range(num_frames):
            grey = np.full((height, width, 3), level(number), np.uint8)
            frame = av.VideoFrame.from_ndarray(grey if pictures is None else pictures[number], format="rgb24")
            if at_milliseconds is not None:
                frame.pts, frame.time_base = at_milliseconds[number], MILLISECOND
            else:
                frame.pts, frame.time_base = number, Fraction(1, fps)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def gradient(height: int = 64, width: int = 96) -> np.ndarray:
    """uint8 (H, W, 3): red grows to the right, green downwards, so that any turn shows."""
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [columns * 255 // (width - 1), rows * 255 // (height - 1), np.full((height, width), 60)]
    return np.stack(channels, axis=-1).astype(np.uint8)
