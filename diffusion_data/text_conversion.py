"""Text embedding as stored, numpy float16 -> as models take it, torch bfloat16; refused if not finite."""

from __future__ import annotations

import numpy as np
import torch

from diffusion_data.latent_sample import all_finite

_ROWS_AT_A_TIME = 256  # what lies between float16 and bfloat16 stays in the cache


def convert_finite(target: torch.Tensor, source: np.ndarray) -> bool:
    """Write float16 `source` (S, D) to the first rows of bfloat16 `target`; False if a value is NaN or infinite.

    Over float32, since torch converts one half to the other value by value, but both to and from float32 in vectors.
    """
    rows = torch.from_numpy(source)
    between = torch.empty(min(_ROWS_AT_A_TIME, len(source)), source.shape[1])
    for start in range(0, len(source), _ROWS_AT_A_TIME):
        some = rows[start : start + _ROWS_AT_A_TIME]
        count = some.shape[0]
        target[start : start + count].copy_(between[:count].copy_(some))
    # Not of the source, which need not be aligned: numpy would copy it first.
    return all_finite(target[: len(source)])
