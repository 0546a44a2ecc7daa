"""Clips that overlap are views of the same frames -> these frames once, and where in them each clip lies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def join_overlapping(clips: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[tuple[int, int, int]]]:
    """Arrays (N, H, W, 3), and of each clip (T, H, W, 3) which of these it is in, from which frame to which.

    A clip that shares no memory with the one before is an array of its own; nothing is copied.
    """
    arrays: list[np.ndarray] = []
    places: list[tuple[int, int, int]] = []
    for clip in clips:
        offset = _frames_between(arrays[-1], clip) if arrays else None
        if offset is None:
            arrays.append(clip)
            offset = 0
        elif offset + len(clip) > len(arrays[-1]):
            arrays[-1] = _extended(arrays[-1], offset + len(clip))
        places.append((len(arrays) - 1, offset, offset + len(clip)))
    return arrays, places


def _frames_between(first: np.ndarray, second: np.ndarray) -> int | None:
    """How many frames after `first` the other begins, if it does so within it, in the same memory; else None."""
    owner = first.base
    if (
        not isinstance(owner, np.ndarray)
        or second.base is not owner
        or first.shape[1:] != second.shape[1:]
        or not (owner.flags.c_contiguous and first.flags.c_contiguous and second.flags.c_contiguous)
    ):
        return None
    frames, rest = divmod(_address(second) - _address(first), first[0].nbytes)
    return frames if rest == 0 and 0 <= frames < len(first) else None


def _extended(view: np.ndarray, num_frames: int) -> np.ndarray:
    """The view with the frames that follow it in its owner's memory."""
    owner = view.base
    assert owner is not None
    start = (_address(view) - _address(owner)) // view.itemsize
    return owner.reshape(-1)[start : start + num_frames * view[0].size].reshape(num_frames, *view.shape[1:])


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])
