"""uint8 frames (T, H, W, 3) -> uint8 frames (T, h, w, 3), h and w multiples of the tokenizer's size.

Antialiased Lanczos to the smallest size that covers the target, then a centre crop of the few pixels in
excess, so that shapes keep their aspect. torch's uint8 kernel does it several times faster than Pillow's;
torch versions without it fall back to Pillow, whose pixels differ by 1 at most when shrinking and by 2
when enlarging (`resampler()` tells which one runs).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_BUCKET_STEPS = 8  # of a bucket's shorter side, from short_side down to half of it: aspects up to about 4
_LONGEST_BUCKET = 4.0


@dataclass(frozen=True, kw_only=True)
class ResizePlan:
    """Resize to cover_height x cover_width, then crop the centre height x width out of it."""

    cover_height: int
    cover_width: int
    height: int
    width: int

    def apply(self, frames: np.ndarray) -> np.ndarray:
        """frames uint8 (T, H, W, 3) of any H, W -> uint8 (T, height, width, 3)."""
        if frames.shape[1:3] != (self.cover_height, self.cover_width):
            frames = _lanczos(frames, self.cover_height, self.cover_width)
        top = (self.cover_height - self.height) // 2
        left = (self.cover_width - self.width) // 2
        return np.ascontiguousarray(frames[:, top : top + self.height, left : left + self.width])


def plan_resize(height: int, width: int, short_side: int | None, size_multiple: int) -> ResizePlan:
    """Target of a picture of height x width pixels.

    The short side becomes short_side, the long side what the aspect then asks for, each rounded to the
    nearest multiple. Without a short_side nothing is resampled, only cropped down to the multiples, unless
    a side is shorter than one multiple.
    """
    if short_side is None:
        target_height, target_width = _floor(height, size_multiple), _floor(width, size_multiple)
        if target_height <= height and target_width <= width:
            return ResizePlan(cover_height=height, cover_width=width, height=target_height, width=target_width)
    else:
        # From the rounded short side, so that a picture that is right already stays as it is.
        scale = _nearest(short_side, size_multiple) / min(height, width)
        target_height = _nearest(height * scale, size_multiple)
        target_width = _nearest(width * scale, size_multiple)
    scale = max(target_height / height, target_width / width)
    return ResizePlan(
        cover_height=max(target_height, round(height * scale)),
        cover_width=max(target_width, round(width * scale)),
        height=target_height,
        width=target_width,
    )


def plan_bucket(height: int, width: int, short_side: int, size_multiple: int) -> ResizePlan:
    """As plan_resize, to the size of bucket_sizes whose aspect is nearest: more is cropped, and fewer shapes occur."""
    aspect = math.log(width / height)
    target_height, target_width = min(
        bucket_sizes(short_side, size_multiple), key=lambda size: abs(math.log(size[1] / size[0]) - aspect)
    )
    scale = max(target_height / height, target_width / width)
    return ResizePlan(
        cover_height=max(target_height, round(height * scale)),
        cover_width=max(target_width, round(width * scale)),
        height=target_height,
        width=target_width,
    )


@lru_cache(maxsize=8)
def bucket_sizes(short_side: int, size_multiple: int) -> tuple[tuple[int, int], ...]:
    """(height, width) of aspects from 1:4 to 4:1, all multiples, all of about the area of a square of short_side."""
    side = _nearest(short_side, size_multiple)
    step = max(_floor(side // _BUCKET_STEPS, size_multiple), size_multiple)
    sizes = {(side, side)}
    for shorter in range(side - step, 0, -step):
        longer = _nearest(side * side / shorter, size_multiple)
        if longer > _LONGEST_BUCKET * shorter:
            break
        sizes |= {(shorter, longer), (longer, shorter)}
    return tuple(sorted(sizes))


@lru_cache(maxsize=1)
def resampler() -> str:
    """'torch' or 'pillow': which of the two resamples here. Their pixels differ a little."""
    import torch

    try:
        torch.nn.functional.interpolate(
            torch.zeros(1, 3, 4, 4, dtype=torch.uint8), size=(2, 2), mode="lanczos", antialias=True
        )
    except (NotImplementedError, ValueError):  # how versions of torch refuse what they lack
        return "pillow"
    return "torch"


def _lanczos(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    if resampler() == "pillow":
        from PIL import Image

        size = (width, height)
        resized = [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)) for frame in frames]
        return np.stack(resized)
    return _lanczos_torch(frames, height, width)


def _lanczos_torch(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    import torch

    if not (frames.flags.writeable and frames.flags.c_contiguous):
        frames = np.array(frames, order="C")
    channels_last = torch.from_numpy(frames).permute(0, 3, 1, 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # there is one worker a core; forked workers also hang in OpenMP otherwise
    try:
        resized = torch.nn.functional.interpolate(channels_last, size=(height, width), mode="lanczos", antialias=True)
    finally:
        torch.set_num_threads(threads)
    return resized.permute(0, 2, 3, 1).contiguous().numpy()


def _nearest(length: float, multiple: int) -> int:
    return max(1, int(length / multiple + 0.5)) * multiple


def _floor(length: int, multiple: int) -> int:
    return max(1, length // multiple) * multiple
