"""uint8 frames (T, H, W, 3) -> the bytes of a picture, animation or clip file.

.png .jpg .webp     a picture; .png and .webp of several frames are animated
.gif                an animation
.mp4                h264
"""

from __future__ import annotations

import io
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
from PIL import Image

from diffusion_data.errors import UserError

FALLBACK_FPS = 8.0  # of a clip that doesn't tell its rate
_ANIMATED = {".png": "PNG", ".webp": "WEBP", ".gif": "GIF"}
_STILL = {".png": "PNG", ".webp": "WEBP", ".gif": "GIF", ".jpg": "JPEG", ".jpeg": "JPEG"}
_QUALITY = 90


def encode_file(frames: np.ndarray, fps: float | None, suffix: str) -> bytes:
    """frames: uint8 (T, H, W, 3); fps: None for a still picture, or a rate that isn't known.

    Raises:
        UserError: no such format, or one that can't hold a clip.
    """
    suffix = suffix.lower()
    if suffix == ".mp4":
        return _mp4(frames, fps or FALLBACK_FPS)
    formats = _ANIMATED if len(frames) > 1 else _STILL
    if suffix not in formats:
        what = "a clip" if len(frames) > 1 else "a picture"
        raise UserError(f"{suffix or 'no suffix'}: {what} is written as {', '.join([*formats, '.mp4'])}")
    first, *others = [Image.fromarray(frame) for frame in frames]
    file = io.BytesIO()
    moving = {"save_all": True, "append_images": others, "duration": _durations_ms(len(frames), fps), "loop": 0}
    first.save(file, formats[suffix], quality=_QUALITY, **(moving if others else {}))
    return file.getvalue()


def shrink(frames: np.ndarray, longest_side: int) -> np.ndarray:
    """frames uint8 (T, H, W, 3), smaller where a side is longer than that."""
    _, height, width, _ = frames.shape
    scale = longest_side / max(height, width)
    if scale >= 1:
        return frames
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)) for frame in frames])


def _durations_ms(num_frames: int, fps: float | None) -> list[int]:
    """Whole milliseconds that don't drift: 33, 34, 33, ... for 30 frames a second."""
    ends = [round(1000 * number / (fps or FALLBACK_FPS)) for number in range(num_frames + 1)]
    return [max(1, stop - start) for start, stop in pairwise(ends)]


def _mp4(frames: np.ndarray, fps: float) -> bytes:
    """Sides are cut to even numbers, which 4:2:0 asks for."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        rate = Fraction(max(fps, 0.1)).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options={"crf": "16"})
        _, height, width, _ = frames.shape
        stream.height, stream.width, stream.pix_fmt = height // 2 * 2, width // 2 * 2, "yuv420p"
        for frame in frames[:, : stream.height, : stream.width]:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return file.getvalue()
