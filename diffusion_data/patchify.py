"""latent (C, T, H, W) <-> patches (S, pt*ph*pw*C), with a position (t, h, w) for each patch.

S = (T/pt) * (H/ph) * (W/pw). Patches run over time, then rows, then columns; within a patch the order is
(ph pw pt C), as in NeMo's diffusion transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from einops import rearrange

_PATCH_ORDER = "C (T pt) (H ph) (W pw) -> (T H W) (ph pw pt C)"
_LARGE = 1 << 18  # numbers; of fewer, two steps that are fast take longer than a slow one
_LATENT_ORDER = "(T H W) (ph pw pt C) -> C (T pt) (H ph) (W pw)"


def patchify(latent: torch.Tensor, patch_spatial: int, patch_temporal: int) -> torch.Tensor:
    """(C, T, H, W) -> (S, patch_spatial**2 * patch_temporal * C)."""
    return rearrange(latent, _PATCH_ORDER, ph=patch_spatial, pw=patch_spatial, pt=patch_temporal)


def patchify_into(patches: torch.Tensor, latent: torch.Tensor, patch_spatial: int, patch_temporal: int) -> None:
    """`patchify`, written to `patches`. For the CPU, where numpy is the faster copier."""
    channels, frames, height, width = latent.shape
    rows, columns = height // patch_spatial, width // patch_spatial
    times = frames // patch_temporal
    if latent.dtype != patches.dtype or latent.element_size() != 2 or not patches.is_contiguous():
        patches.copy_(patchify(latent, patch_spatial, patch_temporal))
        return
    # numpy has no bfloat16, and a copy needs none.
    target = patches.view(torch.int16).numpy()
    target = target.reshape(times, rows, columns, patch_spatial, patch_spatial, patch_temporal, channels)
    if latent.numel() >= _LARGE and patch_spatial % 2 == 0 and sys.byteorder == "little":
        _patch_pairs(target, latent.contiguous())
        return
    source = latent.view(torch.int16).numpy()
    source = source.reshape(channels, times, patch_temporal, rows, patch_spatial, columns, patch_spatial)
    np.copyto(target, source.transpose(1, 3, 5, 4, 6, 2, 0))


def _patch_pairs(target: np.ndarray, latent: torch.Tensor) -> None:
    """Move neighbours of a row in pairs to where the channels come last, and take the pairs apart in a second step.

    Both are done in vectors, and take less time together than numbers of 16 bits one by one.
    """
    times, rows, columns, patch_spatial, _, patch_temporal, channels = target.shape
    last = _channels_last(latent.view(torch.float32).view(channels, -1)).view(torch.int32).numpy()
    pairs = last.reshape(times, patch_temporal, rows, patch_spatial, columns, patch_spatial // 2, channels)
    pairs = pairs.transpose(0, 2, 4, 3, 5, 1, 6)
    np.copyto(target[:, :, :, :, 0::2], pairs, casting="unsafe")
    np.copyto(target[:, :, :, :, 1::2], pairs >> 16, casting="unsafe")


def _channels_last(values: torch.Tensor) -> torch.Tensor:
    """float32 (C, N) -> (N, C), the bits as they are.

    Shuffling the channels of a picture of one pixel is a transpose, the one that torch does in vectors: a fourth of the
    time of a copy with other strides.
    """
    size = values.numel()
    pixel = values.as_strided((1, size, 1, 1), (size, 1, size, size))
    return torch.channel_shuffle(pixel, len(values)).as_strided((size // len(values), len(values)), (len(values), 1))


def unpatchify(
    patches: torch.Tensor, latent_shape: Sequence[int], patch_spatial: int, patch_temporal: int
) -> torch.Tensor:
    """Undo `patchify`; rows beyond the latent's own length, which padding added, are dropped."""
    _, frames, height, width = (int(size) for size in latent_shape)
    length = sequence_length(latent_shape, patch_spatial, patch_temporal)
    return rearrange(
        patches[:length],
        _LATENT_ORDER,
        T=frames // patch_temporal,
        H=height // patch_spatial,
        W=width // patch_spatial,
        ph=patch_spatial,
        pw=patch_spatial,
        pt=patch_temporal,
    )


def is_divisible(latent_shape: Sequence[int], patch_spatial: int, patch_temporal: int) -> bool:
    """True if whole patches cover a latent of shape (C, T, H, W)."""
    _, frames, height, width = latent_shape
    return frames % patch_temporal == 0 and height % patch_spatial == 0 and width % patch_spatial == 0


def sequence_length(latent_shape: Sequence[int], patch_spatial: int, patch_temporal: int) -> int:
    """Number of patches of a latent of shape (C, T, H, W).

    Raises:
        ValueError: the latent can't be cut into whole patches.
    """
    _, frames, height, width = (int(size) for size in latent_shape)
    if not is_divisible((0, frames, height, width), patch_spatial, patch_temporal):
        raise ValueError(
            f"a latent of {frames}x{height}x{width} (T, H, W) can't be cut into patches of "
            f"{patch_temporal}x{patch_spatial}x{patch_spatial}"
        )
    return (frames // patch_temporal) * (height // patch_spatial) * (width // patch_spatial)


@lru_cache(maxsize=64)  # a dataset has few shapes, and making the grid costs more than patching
def position_ids_3d(frames: int, height: int, width: int) -> torch.Tensor:
    """int64 (frames*height*width, 3): (t, h, w) of each patch. Sizes in patches. Shared: don't write to it."""
    axes = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    return rearrange(torch.stack(axes, dim=-1), "T H W coordinate -> (T H W) coordinate")
