"""energon's loaders -> loaders that Lightning handles rightly, and whose errors are one line.

TrainLoader   an endless stream in epochs of a set length; saved and restored by the datamodule
ValLoader     one pass over a split, from its start each time, equally many batches on all ranks
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from typing import Any

import torch
from megatron.energon import SavableDataLoader
from megatron.energon.errors import FatalSampleError
from megatron.energon.savable_loader import SavableDataLoaderState
from megatron.energon.worker import WorkerConfig

from diffusion_data.errors import UserError
from diffusion_data.parallel_ranks import DataParallel, any_rank
from diffusion_data.shared_batch import SharedBatch
from diffusion_data.skip_counts import SkipCounts

logger = logging.getLogger(__name__)

Batch = dict[str, Any]

_BATCHES_A_REPORT = 1000  # of what was skipped


class TrainLoader:
    """Batches of an endless stream, an epoch of `length` at a time; each pass goes on where the last one ended.

    The epochs are counted here, not by energon: its workers begin each of its own epochs in an order that
    is another one after a resume. Having a length keeps Lightning from fetching one batch ahead, which
    would be lost on resume. The (empty) state tells Lightning that the stream can be resumed; the
    datamodule does that, on all ranks.

    any_batch: makes a batch of the same kind as the stream's; see `without_samples`
    """

    def __init__(
        self,
        loader: SavableDataLoader,
        length: int,
        skips: SkipCounts,
        batches_done: int = 0,
        *,
        any_batch: Callable[[], Batch],
    ) -> None:
        self.loader: SavableDataLoader | None = loader
        self.batches_done = batches_done
        """Batches given in this epoch. A pass that was left early is finished by the next one."""
        self._length = length
        self._skips = skips
        self._any_batch = any_batch
        self._stream: Iterator[Batch] | None = None
        self._batches_since_report = 0
        self._last: Batch | None = None

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        while True:
            if self._stream is None:
                self._stream = _clear_errors(self.loader)
            try:
                batch = next(self._stream)
            except Exception:  # raised again; a generator that raised is at its end
                self._stream = None
                raise
            self.batches_done = (self.batches_done + 1) % self._length
            self._batches_since_report += 1
            if self._batches_since_report == _BATCHES_A_REPORT:
                self._batches_since_report = 0
                self._skips.report()
            if batch:
                self._last = batch
            else:
                self._last = self._last or self._any_batch()
                batch = without_samples(self._last)
            yield batch
            if self.batches_done == 0:
                break
        self._skips.report()

    def close(self) -> None:
        """End the workers now: left to the garbage collector, each is waited for 5 seconds."""
        self._skips.report()
        if isinstance(self._stream, Generator):
            self._stream.close()
        self._stream = self.loader = self._last = None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load here, see the class."""


class ValLoader:
    """One pass over a split. `make` builds the energon loader of this rank.

    Every sample comes exactly once on some rank. A rank that has fewer batches than another gives batches without
    samples at the end: ranks that synchronise in each step would wait for it for ever.

    length: batches of the rank that has most; None where nobody can tell before they are made. The ranks then tell
        each other with every batch whether they have more.
    any_batch: makes a batch of the split, whichever rank's, or raises; see `without_samples`
    """

    def __init__(
        self,
        make: Callable[[], Any],
        length: int | None,
        skips: SkipCounts,
        *,
        parallel: DataParallel,
        any_batch: Callable[[], Batch],
    ) -> None:
        self._make = make
        self._length = length
        self._skips = skips
        self._parallel = parallel
        self._any_batch = any_batch
        self._idle_loader: Any = None

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("how many packed or bucketed batches a pass has shows when it ends")
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        # A loader that finished its pass starts the next one from the start, with the workers it has. One
        # that was left in the middle would go on there.
        loader, self._idle_loader = self._idle_loader or self._make(), None
        batches = _clear_errors(loader)
        batch = next(batches, None)
        some = batch or self._any_batch()  # of another rank, if all samples of this one are skipped
        count = 0
        while self._goes_on(count, batch is not None):
            # One ahead: who counts batches, as Lightning does, never asks for the end.
            following = None if batch is None else next(batches, None)
            if following is None and loader is not None:
                self._idle_loader, loader = loader, None
                self._skips.report()
            count += 1
            yield without_samples(some) if batch is None else batch
            batch = following

    def _goes_on(self, count: int, has_more: bool) -> bool:
        if self._length is None:
            return any_rank(self._parallel, has_more)
        return has_more or (self._parallel.size > 1 and count < self._length)

    def close(self) -> None:
        """End the workers that wait for the next pass."""
        self._skips.report()
        self._idle_loader = None


def without_samples(batch: Batch) -> Batch:
    """A batch of the same shapes that counts for nothing: loss_mask is 0 everywhere, and no key is in it."""
    return {**batch, "loss_mask": torch.zeros_like(batch["loss_mask"]), "__key__": []}


def loader_options(config: WorkerConfig) -> dict[str, Any]:
    """What energon's loaders do beside loading."""
    options: dict[str, Any] = {"watchdog_timeout_seconds": None}  # it would print all stacks for slow storage
    if config.num_workers == 0:
        # Collecting garbage every 10 batches helps a worker; in the training process it takes 0.2 s each time.
        options["gc_collect_every_n_steps"] = 0
    return options


def restore(loader: SavableDataLoader, state: SavableDataLoaderState | None) -> None:
    """Go to the place that was saved.

    energon forgets, for a worker that has given nothing since, how many batches it has to skip from its last checkpoint
    on: if the place is saved again, these would come twice.
    """
    loader.restore_state_rank(state)
    if state is None or loader.num_workers == 0:
        return
    for worker, saved in enumerate(state.worker_states):
        if saved.state is not None:
            loader._worker_sample_counters[worker] = saved.state.sample_index + saved.offset - 1


def use_pinned_memory(loader: torch.utils.data.DataLoader[Any], wanted: bool) -> None:
    """energon always asks for pinned memory, which without CUDA only makes torch warn."""
    loader.pin_memory = wanted and torch.cuda.is_available()


def pass_batches_on(loader: torch.utils.data.DataLoader[Any]) -> None:
    """torch looks through each batch for arrays to convert, and sends each tensor by itself; both take long."""
    loader.collate_fn = _as_it_is if loader.num_workers == 0 else _in_one_piece


def iterate_directly(loader: torch.utils.data.DataLoader[Any]) -> None:
    """Without workers, and nothing to collate or pin, torch's iterator only adds its profiler's marks to each batch."""
    if loader.num_workers == 0 and loader.collate_fn is _as_it_is and not loader.pin_memory:
        # Without a reference to the loader: energon freezes garbage, and a cycle would keep its files open for good.
        loader._get_iterator = partial(iter, loader.dataset)  # type: ignore[method-assign]


def _as_it_is(batch: Any) -> Any:
    return batch


def _in_one_piece(item: tuple[int, int, Any]) -> tuple[int, int, Any]:
    """What energon gives in a worker: its number, the batch's, and the batch."""
    worker, number, batch = item
    return worker, number, SharedBatch.of(batch) if type(batch) is dict else batch


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


def log_sample_error(error: Exception, sample: Any, _sources: Any = None) -> None:
    """energon's handler for a sample that raised: one line instead of a traceback and the sample's contents."""
    if isinstance(error, UserError):
        raise error
    key = sample.get("__key__") if isinstance(sample, dict) else getattr(sample, "__key__", None)
    logger.warning("skipped %s: %s: %s", key or "a sample", type(error).__name__, error)


def _clear_errors(loader: Any) -> Iterator[Batch]:
    """The loader's batches; its workers' tracebacks are reduced to what the user can act on."""
    try:
        with closing(iter(loader)) as batches:  # which ends the workers of a stream that is closed
            for batch in batches:
                yield batch.batch() if isinstance(batch, SharedBatch) else batch
    except UserError as error:
        # A worker's error arrives as text: its traceback, of which the last line is the message.
        raise UserError(str(error).strip().rsplit("UserError: ", 1)[-1]) from None
    except FatalSampleError as error:
        last_line = str(error).strip().split("\n")[-1]
        raise UserError(f"the dataset can't be read: {last_line}") from error
