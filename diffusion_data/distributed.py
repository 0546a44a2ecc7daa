"""Which rank this is, its device, and what ranks tell each other: shard claims and counters.

torchrun is the engine. Ranks share its key-value Store and nothing else: no process group, hence no
collective, so a rank that dies never hangs the others. Without torchrun there is one rank.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import HashStore, Store
from torch.distributed.rendezvous import rendezvous

from diffusion_data.errors import UserError

_POLL_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among the others. `store` is shared by all of one start of the job."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    store: Store

    @classmethod
    def connect(cls) -> Ranks:
        """Join the other ranks that torchrun started. The store is fresh after a restart by torchrun."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return cls(rank=0, world_size=1, local_rank=0, local_world_size=1, store=HashStore())
        store, rank, world_size = next(rendezvous("env://", timeout=timedelta(minutes=30)))
        return cls(
            rank=rank,
            world_size=world_size,
            local_rank=int(os.environ["LOCAL_RANK"]),
            local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
            store=store,
        )

    def publish(self, key: str, value: Any) -> None:
        """Set `key` to a json value for every rank to read."""
        self.store.set(key, json.dumps(value))

    def receive(self, key: str) -> Any:
        """The value of `key`, waiting without limit: torchrun ends this rank if the publisher dies."""
        while not self.store.check([key]):
            time.sleep(_POLL_SECONDS)
        return json.loads(self.store.get(key))

    def claim(self, counter: str) -> int:
        """The next number, from 0, that no other rank was given."""
        return self.store.add(counter, 1) - 1

    def count(self, counter: str, amount: int = 0) -> int:
        """Add to a shared counter; returns the total over all ranks."""
        return self.store.add(counter, amount)

    def device(self, choice: str) -> torch.device:
        """The device of this rank for option `device` = auto, cpu or cuda."""
        if choice not in ("auto", "cpu", "cuda"):
            raise UserError(f"device: expected auto, cpu or cuda, got {choice!r}")
        if choice == "cuda" and not torch.cuda.is_available():
            raise UserError("device: cuda was asked for, but torch sees no CUDA device; use device=cpu")
        if choice == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        if self.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"device: {self.local_world_size} processes on a node with {torch.cuda.device_count()} GPUs; "
                f"start torchrun with --nproc_per_node={torch.cuda.device_count()}"
            )
        return torch.device("cuda", self.local_rank)


def usable_cpus() -> int:
    """Processors that this process may use: what a container or Slurm granted, not what the node has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
