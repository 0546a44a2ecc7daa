"""A batch on its way from a worker to the training process: its tensors in one piece of shared memory.

torch sends each tensor over a connection of its own, with a handshake: the ten of a batch take ten times as long as
making it did.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

Batch = dict[str, Any]

_ALIGNMENT = 64  # bytes; a cache line, and more than any dtype needs


@dataclass(frozen=True)
class SharedBatch:
    """Made by `of` in a worker, taken apart by `batch` where it arrives.

    memory: uint8, all tensors one after the other
    entries: in the batch's order; of a tensor, where it stands in `memory`
    """

    memory: torch.Tensor
    entries: dict[str, _Place | Any]

    @classmethod
    def of(cls, batch: Batch) -> SharedBatch:
        """Copies every plain tensor; what else a batch holds is sent as it is."""
        entries: dict[str, _Place | Any] = {}
        size = 0
        for name, value in batch.items():
            if type(value) is torch.Tensor and value.device.type == "cpu" and value.layout == torch.strided:
                entries[name] = _Place(size, value.nbytes, value.dtype, tuple(value.shape))
                size += -(-value.nbytes // _ALIGNMENT) * _ALIGNMENT
            else:
                entries[name] = value
        # As torch's own collation does in a worker: otherwise sending it would copy it once more.
        memory = torch.empty(0, dtype=torch.uint8)
        if size:
            memory.set_(torch.UntypedStorage._new_shared(size))
        for name, place in entries.items():
            if isinstance(place, _Place):
                place.tensor_in(memory).copy_(batch[name])
        return cls(memory, entries)

    def batch(self) -> Batch:
        """The tensors share one storage, of which each has its own part."""
        return {
            name: entry.tensor_in(self.memory) if isinstance(entry, _Place) else entry
            for name, entry in self.entries.items()
        }

    def pin_memory(self) -> SharedBatch:
        """Called by torch's loader where batches are to be page-locked."""
        return replace(self, memory=self.memory.pin_memory())


@dataclass(frozen=True)
class _Place:
    begin: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def tensor_in(self, memory: torch.Tensor) -> torch.Tensor:
        return memory[self.begin : self.begin + self.num_bytes].view(self.dtype).view(self.shape)
