"""Which rank this is, its device, and what ranks tell each other: shard claims and counters.

torchrun is the engine. Ranks share its key-value Store and nothing else: no process group, hence no
collective, so a rank that dies never hangs the others. Without torchrun there is one rank.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from diffusion_data.errors import UserError

_POLL_SECONDS = 0.1
_SECONDS_BETWEEN_BEATS = 5.0
_SECONDS_OF_SILENCE = 300.0  # a rank may stand still for a minute, on a stuck disk for one, without being dead

# Launchers other than torchrun would start as many independent jobs, all of them on the same output.
_OTHER_LAUNCHERS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")

Item = TypeVar("Item")


class Ranks:
    """This process among the others; `store` is shared by all of one start of the job.

    A context manager: inside, a thread shows the others that this rank is alive.
    """

    def __init__(self, *, rank: int, world_size: int, local_rank: int, local_world_size: int, store: Store) -> None:
        self.rank = rank
        self.world_size = world_size
        self.local_rank = local_rank
        self.local_world_size = local_world_size
        self.store = store
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []

    @classmethod
    def alone(cls) -> Ranks:
        """The only rank there is."""
        return cls(rank=0, world_size=1, local_rank=0, local_world_size=1, store=HashStore())

    @classmethod
    def connect(cls) -> Ranks:
        """Join the other ranks that torchrun started.

        torchrun keeps its store when it restarts the ranks, so each start agrees on a prefix of its own.

        Raises:
            UserError: started in several processes, but not by torchrun.
        """
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            for name in _OTHER_LAUNCHERS:
                if int(os.environ.get(name, 1)) > 1:
                    raise UserError(f"{name}={os.environ[name]}: start several processes with torchrun")
            return cls.alone()
        with _lost_store_explained():
            store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=_SECONDS_OF_SILENCE)))
        ranks = cls(
            rank=rank,
            world_size=world_size,
            local_rank=int(os.environ["LOCAL_RANK"]),
            local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
            store=store,
        )
        with _lost_store_explained():
            ranks._join_this_start()
        return ranks

    def _join_this_start(self) -> None:
        """Every rank asks under a name that is new, and this start's rank 0 answers with its prefix."""
        common = self.store
        if self.rank == 0:
            prefix = uuid.uuid4().hex
            self._run_until_end(lambda: self._answer(common, prefix))
        else:
            question = uuid.uuid4().hex
            common.set(f"question/{common.add('questions', 1)}", question)
            while not common.check([f"answer/{question}"]):
                time.sleep(_POLL_SECONDS)
            prefix = common.get(f"answer/{question}").decode()
        self.store = PrefixStore(prefix, common)

    def _answer(self, common: Store, prefix: str) -> None:
        answered = 0
        with suppress(torch.distributed.DistError):  # the store is gone: the main thread will notice
            while not self._ended.wait(_POLL_SECONDS):
                while answered < common.add("questions", 0) and common.check([f"question/{answered + 1}"]):
                    answered += 1
                    common.set(f"answer/{common.get(f'question/{answered}').decode()}", prefix)

    def __enter__(self) -> Ranks:
        self._run_until_end(self._beat)
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _beat(self) -> None:
        with suppress(UserError):  # the store is gone: the main thread will notice
            self.count(f"beats/{self.rank}", 1)
            while not self._ended.wait(_SECONDS_BETWEEN_BEATS):
                self.count(f"beats/{self.rank}", 1)

    def _run_until_end(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, daemon=True)
        self._threads.append(thread)
        thread.start()

    def publish(self, key: str, value: Any) -> None:
        """Set `key` to a json value for every rank to read."""
        with _lost_store_explained():
            self.store.set(key, json.dumps(value))

    def receive(self, key: str, publisher: int = 0) -> Any:
        """The value of `key`, waiting for it as long as rank `publisher` is alive.

        Raises:
            UserError: it has shown no sign of life for minutes.
        """
        # Looks are counted, not seconds: while all ranks are stopped together, nobody falls silent.
        beats, looks = -1, 0
        with _lost_store_explained():
            while not self.store.check([key]):
                time.sleep(_POLL_SECONDS)
                now = self.count(f"beats/{publisher}")
                beats, looks = now, looks + 1 if now == beats else 0
                if looks * _POLL_SECONDS > _SECONDS_OF_SILENCE:
                    raise UserError(
                        f"rank {publisher} has stopped without a word; what is finished is kept: "
                        "run the same command again"
                    )
            return json.loads(self.store.get(key))

    def claim(self, counter: str) -> int:
        """The next number, from 0, that no other rank was given."""
        return self.count(counter, 1) - 1

    def claimed(self, items: Sequence[Item], counter: str) -> Iterator[Item]:
        """This rank's share of items that all ranks go through together: whoever is free takes the next."""
        while (number := self.claim(counter)) < len(items):
            yield items[number]

    def count(self, counter: str, amount: int = 0) -> int:
        """Add to a shared counter; returns the total over all ranks."""
        with _lost_store_explained():
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


@contextmanager
def _lost_store_explained() -> Iterator[None]:
    """torchrun keeps the store: without it this rank can't know what is left to do."""
    try:
        yield
    except torch.distributed.DistError as error:
        raise UserError(
            "torchrun, or the node that keeps its store, is gone; what is finished is kept: run the same command again"
        ) from error


def usable_cpus() -> int:
    """Processors that this process may use: what affinity or a container's quota grants, not what the node has."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()  # cgroup v2: microseconds of each period
        return max(1, min(cpus, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        return cpus
