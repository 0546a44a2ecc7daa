"""Which data-parallel rank this process is, out of how many, and how many micro batches make a step.

Ranks that share a data-parallel rank (tensor or pipeline parallel ones) must read the same samples, so
megatron-core's groups come first where they are in use.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

import torch

from diffusion_data.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DataParallel:
    """This process among those that read different samples."""

    rank: int
    size: int
    group: Any = None
    """The torch.distributed group of these processes; None for all processes."""


def data_parallel(trainer: Any = None) -> DataParallel:
    """megatron-core's groups if they are set up, else torch.distributed's, the trainer's, torchrun's variables."""
    # Not imported here: if nobody else has, its groups aren't set up.
    megatron = sys.modules.get("megatron.core.parallel_state")
    if megatron is not None and megatron.is_initialized():
        return DataParallel(
            rank=megatron.get_data_parallel_rank(),
            size=megatron.get_data_parallel_world_size(),
            group=megatron.get_data_parallel_group(),
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return DataParallel(rank=torch.distributed.get_rank(), size=torch.distributed.get_world_size())
    if trainer is not None:
        return DataParallel(rank=trainer.global_rank, size=trainer.world_size)
    return DataParallel(rank=int(os.environ.get("RANK", 0)), size=int(os.environ.get("WORLD_SIZE", 1)))


def gradient_accumulation_steps(global_batch_size: int, micro_batch_size: int, data_parallel_size: int) -> int:
    """Micro batches that each rank adds up for one step of the optimizer.

    Raises:
        UserError: the batch sizes don't divide.
    """
    if micro_batch_size < 1 or global_batch_size < 1:
        raise UserError(f"batch sizes must be at least 1, got {micro_batch_size = } and {global_batch_size = }")
    at_once = micro_batch_size * data_parallel_size
    if global_batch_size % at_once:
        nearest = max(at_once, round(global_batch_size / at_once) * at_once)
        raise UserError(
            f"global_batch_size={global_batch_size} is not divisible by micro_batch_size={micro_batch_size} x "
            f"{data_parallel_size} data-parallel ranks; set global_batch_size={nearest}"
        )
    return global_batch_size // at_once
