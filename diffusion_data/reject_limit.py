"""Decoded rows on their way: counted for all ranks, and the run is stopped when too many are rejected."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator

from diffusion_data.decoded_row import DecodedRow, RejectedRow
from diffusion_data.distributed import Ranks
from diffusion_data.errors import UserError
from diffusion_data.finish import format_reasons
from diffusion_data.ledger import LedgerEntry
from diffusion_data.progress import ROWS_DONE, ROWS_REJECTED, SAMPLES_DONE
from diffusion_data.shard_plan import Shard

REJECT_RATE_ROWS = 300  # below, a few bad rows say nothing about the rest
_SECONDS_BETWEEN_COUNTS = 0.5


class RejectLimit:
    """Counts rows for all ranks. Whatever counts raises UserError when too many are rejected, with the reasons."""

    def __init__(self, ranks: Ranks, max_reject_rate: float) -> None:
        self._ranks = ranks
        self._max_reject_rate = max_reject_rate
        self._done = self._rejected = self._samples = 0  # not yet told to the others
        self._reasons: Counter[str] = Counter()
        self._reasons_of_shard: dict[int, Counter[str]] = {}  # until it is written
        self._counted_at = time.monotonic()

    def watch(
        self, results: Iterable[tuple[Shard, DecodedRow | RejectedRow]]
    ) -> Iterator[tuple[Shard, DecodedRow | RejectedRow]]:
        """Pass decoded rows on, counting them."""
        for shard, result in results:
            self._done += 1
            if isinstance(result, RejectedRow):
                reason = Counter([result.reason.value])
                self._reject(reason)
                self._reasons_of_shard.setdefault(shard.number, Counter()).update(reason)
            else:
                self._samples += len(result.samples)
            if time.monotonic() - self._counted_at > _SECONDS_BETWEEN_COUNTS:
                self.count()
            yield shard, result
        self.count()

    def shard_written(self, entry: LedgerEntry) -> None:
        """Count what the encoders rejected of it, of rows that had passed."""
        seen = self._reasons_of_shard.pop(entry.shard, Counter())
        self._reject(Counter(row["reason"] for row in entry.rejected) - seen)

    def count(self) -> None:
        """Tell the others, and see where all are."""
        all_done = self._ranks.count(ROWS_DONE, self._done)
        all_rejected = self._ranks.count(ROWS_REJECTED, self._rejected)
        self._ranks.count(SAMPLES_DONE, self._samples)
        self._done = self._rejected = self._samples = 0
        self._counted_at = time.monotonic()
        if all_done >= REJECT_RATE_ROWS and all_rejected > self._max_reject_rate * all_done:
            reasons = format_reasons(dict(self._reasons.most_common()))
            raise UserError(
                f"max_reject_rate: {all_rejected} of {all_done} rows were rejected, more than "
                f"{self._max_reject_rate:.0%} (on this rank: {reasons}); mend the source or the recipe, or raise "
                "max_reject_rate"
            )

    def _reject(self, reasons: Counter[str]) -> None:
        self._rejected += reasons.total()
        self._reasons.update(reasons)
