"""energon's loaders -> loaders that Lightning handles rightly, and whose errors are one line.

TrainLoader   an endless stream in epochs of a set length; saved and restored by the datamodule
ValLoader     one pass over a split, from its start each time, equally many batches on all ranks
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from megatron.energon import SavableDataLoader
from megatron.energon.errors import FatalSampleError
from megatron.energon.flavors.webdataset.sharder import Sharder
from megatron.energon.worker import WorkerConfig

from diffusion_data.errors import UserError
from diffusion_data.skip_counts import SkipCounts, all_skipped

logger = logging.getLogger(__name__)

Batch = dict[str, Any]


class TrainLoader:
    """Batches of an endless stream, an epoch of `length` at a time; each pass goes on where the last one ended.

    The epochs are counted here, not by energon: its workers begin each of its own epochs in an order that
    is another one after a resume. Having a length keeps Lightning from fetching one batch ahead, which
    would be lost on resume. The (empty) state tells Lightning that the stream can be resumed; the
    datamodule does that, on all ranks.
    """

    def __init__(self, loader: SavableDataLoader, length: int, skips: SkipCounts, batches_done: int = 0) -> None:
        self.loader: SavableDataLoader | None = loader
        self.batches_done = batches_done
        """Batches given in this epoch. A pass that was left early is finished by the next one."""
        self._length = length
        self._skips = skips
        self._stream: Iterator[Batch] | None = None

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        while True:
            if self._stream is None:
                self._stream = _clear_errors(self.loader)
            try:
                batch = next(self._stream)
            except UserError:
                self._stream = None
                raise
            self.batches_done = (self.batches_done + 1) % self._length
            yield batch
            if self.batches_done == 0:
                break
        if self._skips.by_reason():
            logger.info("samples skipped so far, by reason: %s", self._skips)

    def close(self) -> None:
        """End the workers now: left to the garbage collector, each is waited for 5 seconds."""
        if isinstance(self._stream, Generator):
            self._stream.close()
        self._stream = self.loader = None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load here, see the class."""


class ValLoader:
    """One pass over a split. `make` builds the energon loader of this rank.

    A rank that has fewer batches than another repeats its first one: ranks that synchronise in each
    validation step would wait for it for ever. A single rank sees each sample exactly once.
    """

    def __init__(self, make: Callable[[], Any], length: int, skips: SkipCounts, *, in_step: bool) -> None:
        self._make = make
        self._length = length
        self._skips = skips
        self._in_step = in_step
        self._idle_loader: Any = None

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        # A loader that finished its pass starts the next one from the start, with the workers it has. One
        # that was left in the middle would go on there.
        loader, self._idle_loader = self._idle_loader or self._make(), None
        batches = _clear_errors(loader)
        batch = first = next(batches, None)
        if first is None:
            raise all_skipped(self._skips)
        count = 0
        while batch is not None:
            # One ahead: who counts batches, as Lightning does, never asks for the end.
            following = next(batches, None)
            if following is None:
                self._idle_loader, loader = loader, None
            count += 1
            yield batch
            batch = following
        while self._in_step and count < self._length:
            count += 1
            yield first

    def close(self) -> None:
        """End the workers that wait for the next pass."""
        self._idle_loader = None


def loader_options(config: WorkerConfig) -> dict[str, Any]:
    """What energon's loaders do beside loading."""
    options: dict[str, Any] = {"watchdog_timeout_seconds": None}  # it would print all stacks for slow storage
    if config.num_workers == 0:
        # Collecting garbage every 10 batches helps a worker; in the training process it takes 0.2 s each time.
        options["gc_collect_every_n_steps"] = 0
    return options


def use_pinned_memory(loader: torch.utils.data.DataLoader[Any], wanted: bool) -> None:
    """energon always asks for pinned memory, which without CUDA only makes torch warn."""
    loader.pin_memory = wanted and torch.cuda.is_available()


def pass_batches_on(loader: torch.utils.data.DataLoader[Any]) -> None:
    """torch looks through each batch for arrays to convert, which costs more than copying a picture's latent."""
    loader.collate_fn = _as_it_is


def iterate_directly(loader: torch.utils.data.DataLoader[Any]) -> None:
    """Without workers, and nothing to collate or pin, torch's iterator only adds its profiler's marks to each batch."""
    if loader.num_workers == 0 and loader.collate_fn is _as_it_is and not loader.pin_memory:
        # Without a reference to the loader: energon freezes garbage, and a cycle would keep its files open for good.
        loader._get_iterator = partial(iter, loader.dataset)  # type: ignore[method-assign]


def _as_it_is(batch: Any) -> Any:
    return batch


def usable_workers(num_workers: int, num_samples: int, data_parallel_size: int, split: str) -> int:
    """`num_workers`, lowered where some would have no sample (energon can't repeat nothing).

    Raises:
        UserError: there are fewer samples than ranks.
    """
    if num_workers < 0:
        raise UserError(f"num_workers must not be negative, got {num_workers}")
    if num_samples < data_parallel_size:
        raise UserError(
            f"the split {split!r} has {num_samples} samples for {data_parallel_size} data-parallel ranks; each "
            "needs at least one: use fewer ranks or a larger dataset"
        )
    most = num_samples // data_parallel_size
    if num_workers > most:
        logger.info("%d workers a rank instead of %d: the split %r is small", most, num_workers, split)
    return min(num_workers, most)


def batches_of_longest_rank(num_samples: int, micro_batch_size: int, num_workers: int, ranks: int) -> int:
    """Batches of one pass over a split, on the rank that has most of them."""
    return max(
        sum(-(-(end - start) // micro_batch_size) for start, end in pairwise(offsets))
        for offsets in (
            Sharder.split_samples_to_workers(
                0, num_samples, WorkerConfig(rank=rank, world_size=ranks, num_workers=num_workers)
            )
            for rank in range(ranks)
        )
    )


def log_sample_error(error: Exception, sample: Any, _sources: Any = None) -> None:
    """energon's handler for a sample that raised: one line instead of a traceback and the sample's contents."""
    if isinstance(error, UserError):
        raise error
    key = sample.get("__key__") if isinstance(sample, dict) else getattr(sample, "__key__", None)
    logger.warning("skipped %s: %s: %s", key or "a sample", type(error).__name__, error)


def _clear_errors(loader: Any) -> Iterator[Batch]:
    """The loader's batches; its workers' tracebacks are reduced to what the user can act on."""
    try:
        yield from loader
    except UserError as error:
        # A worker's error arrives as text: its traceback, of which the last line is the message.
        raise UserError(str(error).strip().rsplit("UserError: ", 1)[-1]) from None
    except FatalSampleError as error:
        last_line = str(error).strip().split("\n")[-1]
        raise UserError(f"the dataset can't be read: {last_line}") from error
