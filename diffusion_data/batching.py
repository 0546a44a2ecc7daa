"""Budgets of a batch: pixels for the tokenizer, tokens for the text encoder.

Which batches are formed changes the low bits of a result, so the budgets are part of the fingerprint. Their defaults
follow from the free memory of the device of rank 0, once: all ranks use them, and so does a run that goes on
later, perhaps on another card.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from diffusion_data.errors import UserError

_CPU_PIXELS = 2 * 512 * 512  # a CPU gains nothing by more, and holds a batch for each of its threads
_GPU_PIXELS = 16 * 512 * 512
_TOKENS = 4096  # a GPU is busy from about 1,000 on
_ROOMY = 24 << 30  # bytes free beside the models, from which on the budgets needn't be smaller
_MOST_HALVINGS = 3


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """pixels: height x width x frames x samples. tokens: captions x longest caption."""

    pixels: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class BatchingConfig:
    """What is encoded at once; see `Budgets`.

    pixels_per_batch: None is 16 pictures of 512 x 512 on a GPU, and 2 on a CPU
    tokens_per_batch: None is 4096

    On a GPU with less than 24 GiB free, the defaults are halved for each halving of that, three times at most.
    """

    pixels_per_batch: int | None = None
    tokens_per_batch: int | None = None

    def __post_init__(self) -> None:
        for value in (self.pixels_per_batch, self.tokens_per_batch):
            if value is not None and value < 1:
                raise UserError("batching: pixels_per_batch and tokens_per_batch are at least 1")

    def budgets(self, free_bytes: int | None, before: Any = None) -> Budgets:
        """Those that were given; else those of the run that is resumed; else the defaults.

        Args:
            free_bytes: of the GPU, once it holds the models; None on a CPU.
            before: what `fingerprint_fields` gave in the run that is resumed, as it was read from a file.
        """
        halvings = 0 if free_bytes is None else _halvings(free_bytes)
        pixels = _CPU_PIXELS if free_bytes is None else _GPU_PIXELS >> halvings
        return Budgets(
            pixels=self.pixels_per_batch or _number(before, "pixels_per_batch") or pixels,
            tokens=self.tokens_per_batch or _number(before, "tokens_per_batch") or _TOKENS >> halvings,
        )


def fingerprint_fields(budgets: Budgets) -> dict[str, int]:
    return {"pixels_per_batch": budgets.pixels, "tokens_per_batch": budgets.tokens}


def _number(fields: Any, name: str) -> int | None:
    value = fields.get(name) if isinstance(fields, dict) else None
    return value if isinstance(value, int) and value > 0 else None


def free_bytes(device: torch.device) -> int | None:
    """Of a GPU's memory, now; None on a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def _halvings(free: int) -> int:
    """Whole halvings only, so that what a desktop takes of the card at the moment seldom matters."""
    halvings = 0
    while halvings < _MOST_HALVINGS and free < _ROOMY >> halvings:
        halvings += 1
    return halvings
