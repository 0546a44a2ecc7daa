"""Which samples the task encoder leaves out, why, and how many: counted in shared memory across workers.

Also ends a stream in which no sample is usable; energon itself would look for one for ever.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from megatron.energon import SavableDataset, SkipSample, WorkerConfig
from megatron.energon.wrappers import BlendDataset
from megatron.energon.wrappers.base import BaseWrapperDataset

from diffusion_data.errors import UserError
from diffusion_data.shared_counts import SharedCounts

logger = logging.getLogger(__name__)

_LOGGED_EACH = 3


class SkipReason(str, Enum):
    """Why a sample isn't used."""

    unreadable = "unreadable"  # a part is missing, broken, refused or of the wrong shape
    not_finite = "not_finite"
    too_large_values = "too_large_values"
    no_text = "no_text"
    too_long = "too_long"  # more patches than seq_length
    not_divisible = "not_divisible"  # into whole patches
    low_aesthetic_score = "low_aesthetic_score"


class SkipCounts:
    """Skips by reason; the same numbers are seen in the main process and in its workers.

    more_reasons: beside those of `SkipReason`
    """

    def __init__(self, more_reasons: Iterable[str] = ()) -> None:
        self._counts = SharedCounts([*(reason.value for reason in SkipReason), *more_reasons])
        self._logged: Counter[str] = Counter()
        self._reported: dict[str, int] = {}
        self._counts_nothing = False
        self.used = 0
        """Samples of this process that were not skipped."""

    def skip(self, key: str, reason: str, message: str) -> SkipSample:
        """Count and log a skip; the caller raises what is returned."""
        if self._counts_nothing:
            return SkipSample()
        name = reason.value if isinstance(reason, SkipReason) else reason
        self._counts.add(name)
        self._logged[name] += 1
        if self._logged[name] <= _LOGGED_EACH:
            more = "; more of these are only counted" if self._logged[name] == _LOGGED_EACH else ""
            logger.warning("skipped %s: %s: %s%s", key, name, message, more)
        return SkipSample()

    def by_reason(self) -> dict[str, int]:
        """Skips of all workers so far, only the reasons that occurred."""
        return {reason: total for reason, total in self._counts.totals().items() if total}

    @contextmanager
    def counting_nothing(self) -> Iterator[None]:
        """For looking at samples, in this process, beside those that are asked for."""
        before, self._counts_nothing = self._counts_nothing, True
        try:
            yield
        finally:
            self._counts_nothing = before

    def report(self) -> None:
        """Log this rank's skips by reason, if there are any that the last report didn't tell of."""
        totals = self.by_reason()
        if totals != self._reported:
            self._reported = totals
            logger.warning("samples skipped so far%s, by reason: %s", _whose(), self)

    def __str__(self) -> str:
        return ", ".join(f"{reason} {count}" for reason, count in self.by_reason().items()) or "none"


class StopWhenAllSkipped(BaseWrapperDataset[Any, Any]):
    """Passes samples on to the encoding stage; raises once a worker's whole share was skipped."""

    def __init__(self, dataset: SavableDataset[Any], skips: SkipCounts, *, worker_config: WorkerConfig) -> None:
        super().__init__(dataset, worker_config=worker_config)
        self._skips = skips

    def reset_state_own(self) -> None:
        """No state: the count starts anew after a resume."""

    def len_worker(self, worker_idx: int | None = None) -> int:
        return self.dataset.len_worker(worker_idx)

    def __iter__(self) -> Iterator[Any]:
        limit = self._whole_passes()
        skipped_in_a_row = 0
        for sample in self.dataset:
            used_before = self._skips.used
            yield sample
            skipped_in_a_row = 0 if self._skips.used > used_before else skipped_in_a_row + 1
            if skipped_in_a_row >= limit:
                workers = self.worker_config.world_size * max(1, self.worker_config.num_workers)
                raise all_skipped(self._skips) if workers == 1 else share_skipped(self._skips, workers)

    def _whole_passes(self) -> int:
        """So many samples in a row hold at least one of every dataset's usable ones, if there are any."""
        passes = 2 * self.len_worker()  # wherever in a pass they begin
        blend = self.dataset
        if isinstance(blend, BaseWrapperDataset) and not isinstance(blend, BlendDataset):
            blend = blend._find_wrapped_dataset(BlendDataset)
        if isinstance(blend, BlendDataset):
            # A dataset of share w is missed n times in a row with a probability of (1 - w)**n.
            passes += math.ceil(40 * sum(blend.weights) / min(blend.weights))
        return passes

    def config(self) -> dict[str, Any]:
        return self.dataset.config()


def _whose() -> str:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return ""
    return f" on rank {distributed.get_rank()}"


def share_skipped(skips: SkipCounts, workers: int) -> UserError:
    """The error for a worker, one of so many on all ranks, that has no usable sample; others may have some."""
    return UserError(
        f"one of the {workers} workers of all ranks can use no sample of its share, all were skipped (by reason on its "
        f"rank: {skips}). Shares follow the order of the rows: mix them before they are prepared, use fewer workers or "
        "ranks, or skip less"
    )


def all_skipped(skips: SkipCounts) -> UserError:
    """The error for a split without a usable sample."""
    return UserError(
        f"no sample could be used, all were skipped (by reason: {skips}); check data.seq_length, the patch "
        "sizes and the other limits of the task encoder against the dataset"
    )
