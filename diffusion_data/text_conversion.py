"""Text embedding as stored, numpy float16 -> as models take it, torch bfloat16; refused if not finite."""

from __future__ import annotations

import math
import threading

import numpy as np
import torch

_VALUES_A_THREAD = 1 << 18  # as float32, what a core's cache holds


def convert_finite(target: torch.Tensor, source: np.ndarray) -> bool:
    """Write float16 `source` (S, D) to the first rows of bfloat16 `target`; False if a value is NaN or infinite.

    Over float32, since torch converts one half to the other value by value, but both to and from float32 in vectors.
    """
    width = source.shape[1]
    rows = _as_tensor(source)
    rows_at_a_time = max(1, _VALUES_A_THREAD * torch.get_num_threads() // width)
    between = _scratch(min(rows_at_a_time, len(source)) * width).view(-1, width)
    total = 0.0
    for start in range(0, len(source), rows_at_a_time):
        some = rows[start : start + rows_at_a_time]
        values = between[: len(some)].copy_(some)
        target[start : start + len(some)] = values
        # NaN and infinity stay what they are in a sum, and halves are too small for theirs to become infinite.
        total += values.sum().item()
    return math.isfinite(total)


def _as_tensor(array: np.ndarray) -> torch.Tensor:
    """The array, only to be read: torch warns of those that mustn't be written to, since a tensor can't tell."""
    if not array.flags.writeable:
        array = array.view()
        try:
            array.setflags(write=True)
        except ValueError:  # its memory can't be written to at all
            array = array.copy()
    return torch.from_numpy(array)


_kept = threading.local()


def _scratch(size: int) -> torch.Tensor:
    """float32 (size,) for this thread's next use. New memory would cost as much as a conversion: a fault each page."""
    values: torch.Tensor | None = getattr(_kept, "values", None)
    if values is None or len(values) < size:
        values = _kept.values = torch.empty(size)
    return values[:size]
