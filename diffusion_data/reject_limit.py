"""Decoded rows on their way: counted for all ranks, and the run is stopped when too many are rejected."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator

from diffusion_data.decoded_row import DecodedRow, RejectedRow
from diffusion_data.distributed import Ranks
from diffusion_data.errors import UserError
from diffusion_data.finish import format_reasons
from diffusion_data.progress import ROWS_DONE, ROWS_REJECTED, SAMPLES_DONE
from diffusion_data.shard_plan import Shard

_REJECT_RATE_ROWS = 300  # below, a few bad rows say nothing about the rest
_SECONDS_BETWEEN_COUNTS = 0.5


def counted(
    results: Iterable[tuple[Shard, DecodedRow | RejectedRow]], ranks: Ranks, max_reject_rate: float
) -> Iterator[tuple[Shard, DecodedRow | RejectedRow]]:
    """Pass results on, counting them for all ranks; stops the run when too many rows are rejected.

    Raises:
        UserError: the share of rejected rows is above the limit.
    """
    reasons: Counter[str] = Counter()
    done = rejected = samples = 0
    counted_at = time.monotonic()
    for shard, result in results:
        done += 1
        if isinstance(result, RejectedRow):
            rejected += 1
            reasons[result.reason.value] += 1
        else:
            samples += len(result.samples)
        if time.monotonic() - counted_at > _SECONDS_BETWEEN_COUNTS:
            ranks.count(SAMPLES_DONE, samples)
            _count(ranks, done, rejected, reasons, max_reject_rate)
            done = rejected = samples = 0
            counted_at = time.monotonic()
        yield shard, result
    ranks.count(SAMPLES_DONE, samples)
    _count(ranks, done, rejected, reasons, max_reject_rate)


def _count(ranks: Ranks, done: int, rejected: int, reasons: Counter[str], max_reject_rate: float) -> None:
    all_done = ranks.count(ROWS_DONE, done)
    all_rejected = ranks.count(ROWS_REJECTED, rejected)
    if all_done >= _REJECT_RATE_ROWS and all_rejected > max_reject_rate * all_done:
        raise UserError(
            f"max_reject_rate: {all_rejected} of {all_done} rows were rejected, more than {max_reject_rate:.0%} "
            f"(on this rank: {format_reasons(dict(reasons.most_common()))}); mend the source or the recipe, "
            "or raise max_reject_rate"
        )
