"""Which data-parallel rank this process is, out of how many, and how many micro batches make a step.

Ranks that share a data-parallel rank (tensor-, context- or pipeline-parallel ones) must read the same samples, so a
device mesh or megatron-core's groups come first where they are in use. What tensor- and context-parallel ranks share
out is padded to a multiple of 2 x context- x tensor-parallel size: each of the former takes a piece of the first half
of a sequence and one of the second, in ring attention, and the latter split what is left.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from typing import Any

import torch

from diffusion_data.errors import UserError

# Names of the dimensions of a device mesh, as torchtitan, Lightning, transformers and torch's documentation have them.
_DATA_DIMS = {"data_parallel", "ddp", "dp", "dp_replicate", "dp_shard", "fsdp", "replicate", "shard"}
_TENSOR_DIMS = {"tensor_parallel", "tp"}
_CONTEXT_DIMS = {"context_parallel", "cp"}
_OTHER_DIMS = {"pipeline_parallel", "pp"}


@dataclass(frozen=True, kw_only=True)
class DataParallel:
    """This process among those that read different samples."""

    rank: int
    size: int
    group: Any = None
    """The torch.distributed group of these processes, or of more than these; None for all processes."""
    length_multiple: int = 1
    """What the length of a sequence has to divide by."""


def data_parallel(trainer: Any = None, device_mesh: Any = None) -> DataParallel:
    """The given device mesh, megatron-core's groups, the trainer's mesh, torch.distributed, the trainer, or torchrun's
    variables: the first of these that is there."""
    if device_mesh is not None:
        return _of_mesh(device_mesh)
    # Not imported here: if nobody else has, its groups aren't set up.
    megatron = sys.modules.get("megatron.core.parallel_state")
    if megatron is not None and megatron.is_initialized():
        return DataParallel(
            rank=megatron.get_data_parallel_rank(),
            size=megatron.get_data_parallel_world_size(),
            group=megatron.get_data_parallel_group(),
            length_multiple=_length_multiple(
                megatron.get_tensor_model_parallel_world_size(), megatron.get_context_parallel_world_size()
            ),
        )
    mesh = getattr(getattr(trainer, "strategy", None), "_device_mesh", None)
    if mesh is not None:
        return _of_mesh(mesh)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return DataParallel(rank=torch.distributed.get_rank(), size=torch.distributed.get_world_size())
    if trainer is not None:
        return DataParallel(rank=trainer.global_rank, size=trainer.world_size)
    return DataParallel(rank=int(os.environ.get("RANK", 0)), size=int(os.environ.get("WORLD_SIZE", 1)))


def _of_mesh(mesh: Any) -> DataParallel:
    names = mesh.mesh_dim_names or ("dp",) * mesh.ndim
    known = _DATA_DIMS | _TENSOR_DIMS | _CONTEXT_DIMS | _OTHER_DIMS
    if unknown := [name for name in names if name not in known]:
        raise UserError(
            f"the device mesh has a dimension {unknown[0]!r}: whether its ranks read the same samples can't be told; "
            f"known names are {', '.join(sorted(known))}"
        )
    rank, size = 0, 1
    for dim, name in enumerate(names):
        if name in _DATA_DIMS:
            size *= mesh.size(dim)
            rank = rank * mesh.size(dim) + mesh.get_local_rank(dim)
    sizes = [
        math.prod(mesh.size(dim) for dim, name in enumerate(names) if name in dims)
        for dims in (_TENSOR_DIMS, _CONTEXT_DIMS)
    ]
    return DataParallel(rank=rank, size=size, length_multiple=_length_multiple(*sizes))


def _length_multiple(tensor_parallel_size: int, context_parallel_size: int) -> int:
    both = tensor_parallel_size * context_parallel_size
    return 2 * both if both > 1 else 1


def can_gather(parallel: DataParallel) -> bool:
    """True if the ranks can tell each other something."""
    return parallel.size == 1 or (torch.distributed.is_available() and torch.distributed.is_initialized())


def gather_from_ranks(parallel: DataParallel, value: Any) -> list[Any]:
    """The values of all data-parallel ranks, in their order. To be called on all processes of the group."""
    if parallel.size == 1:
        return [value]
    if not can_gather(parallel):
        raise UserError(
            f"the place of {parallel.size} ranks in the dataset can't be gathered: call "
            "torch.distributed.init_process_group first"
        )
    gathered: list[Any] = [None] * torch.distributed.get_world_size(parallel.group)
    torch.distributed.all_gather_object(gathered, (parallel.rank, value), group=parallel.group)
    by_rank = dict(gathered)  # ranks that read the same samples have equal values
    return [by_rank[rank] for rank in range(parallel.size)]


def any_rank(parallel: DataParallel, value: bool) -> bool:
    """True if it is on any data-parallel rank. Without a process group, nobody waits for anybody: this rank's own."""
    return any(gather_from_ranks(parallel, value)) if can_gather(parallel) else value


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
