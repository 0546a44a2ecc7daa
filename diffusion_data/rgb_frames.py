"""A decoded frame -> uint8 RGB pixels (H, W, 3), in the colours that the file declares, and upright."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np


def display_matrix(frame: Any) -> tuple[int, ...] | None:
    """The 3 x 3 matrix that phones write to say how the picture is to be turned."""
    for side_data in frame.side_data:
        if side_data.type.name == "DISPLAYMATRIX":
            return struct.unpack("=9i", bytes(side_data)[:36])
    return None


def turn_upright(pixels: np.ndarray, matrix: tuple[int, ...] | None) -> np.ndarray:
    """pixels (H, W, 3) turned and mirrored in quarter turns, as the matrix (a b u, c d v, x y w) says."""
    if matrix is None:
        return pixels
    a, b, _, c, d = matrix[:5]
    # The point (x, y) is shown at (a x + c y, b x + d y).
    if abs(a) + abs(d) >= abs(b) + abs(c):
        mirror_x, mirror_y = a < 0, d < 0
    else:
        pixels = pixels.transpose(1, 0, 2)
        mirror_x, mirror_y = c < 0, b < 0
    return pixels[:: -1 if mirror_y else 1, :: -1 if mirror_x else 1]


class RgbConverter:
    """Decoded frame -> uint8 (H, W, 3), by the colour matrix and the range that the file declares."""

    # libavutil's AVColorSpace -> libswscale's table.
    _MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}  # noqa: RUF012

    def __init__(self) -> None:
        import av
        from av.video.reformatter import Interpolation, VideoReformatter

        self._reformatter = VideoReformatter()
        self._fast = int(Interpolation.BICUBIC)
        accurate_rounding, full_chroma = 0x40000, 0x2000
        self._exact = self._fast | accurate_rounding | full_chroma
        self._before_17 = int(av.__version__.split(".")[0]) < 17

    def __call__(self, frame: Any) -> np.ndarray:
        name = frame.format.name
        if frame.format.is_rgb:
            options = {}
        else:
            matrix = self._matrix(frame)
            options = {
                "src_colorspace": matrix,
                "src_color_range": 2 if frame.color_range == 2 or name.startswith("yuvj") else 1,
                "dst_color_range": 2,
            }
            if self._before_17:  # it ignores all of these unless the two spaces differ; RGB has none anyway
                options["dst_colorspace"] = 1 if matrix == 5 else 5
        # libswscale has a quick and right way for 8-bit 4:2:0; elsewhere its default loses up to 2 of 255.
        flags = self._fast if name in ("yuv420p", "yuvj420p") else self._exact
        if not self._before_17:
            options["threads"] = 1
        rgb = self._reformatter.reformat(frame, format="rgb24", interpolation=flags, **options)
        return rgb.to_ndarray()

    def _matrix(self, frame: Any) -> int:
        declared = self._MATRICES.get(int(frame.colorspace))
        if declared is not None:
            return declared
        # Undeclared: players take BT.709 for high definition and BT.601 below.
        return 1 if frame.width >= 1280 or frame.height > 576 else 5
