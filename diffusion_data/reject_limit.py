"""Decoded rows on their way: counted for all ranks, and the run is stopped when too many are rejected.

What counts is the dataset, not this start: finished shards stand with the rows that they reject. So a run that was
interrupted ends as an undisturbed one would, and nothing that was accepted once is held against a later start.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from diffusion_data.decoded_row import DecodedRow, RejectedRow
from diffusion_data.distributed import Ranks
from diffusion_data.errors import UserError
from diffusion_data.finish import format_reasons
from diffusion_data.ledger import LedgerEntry
from diffusion_data.progress import ROWS_DECODED, ROWS_REJECTED, SAMPLES_DECODED
from diffusion_data.shard_plan import Shard

_NEW_ROWS, _NEW_ROWS_REJECTED = "new_rows", "new_rows_rejected"  # those of progress, less those of gaining shards

REJECT_RATE_ROWS = 300  # below, a few bad rows say nothing about the rest
_SECONDS_BETWEEN_COUNTS = 0.5


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What the ledger has when encoding begins.

    total_rows: of the source
    rows, rejected: of finished shards that stay
    gaining: numbers of finished shards that are made anew to gain rows; they can only become better
    """

    total_rows: int
    rows: int
    rejected: int
    gaining: frozenset[int]

    @classmethod
    def of(cls, shards: Sequence[Shard], todo: Iterable[Shard], num_rejected: Sequence[int | None]) -> Standing:
        """num_rejected: of each shard, None if it isn't finished"""
        to_make = {shard.number for shard in todo}
        finished = [(shard, number) for shard, number in zip(shards, num_rejected, strict=True) if number is not None]
        stay = [(shard.num_rows, number) for shard, number in finished if shard.number not in to_make]
        return cls(
            total_rows=shards[-1].stop,
            rows=sum(num_rows for num_rows, _ in stay),
            rejected=sum(number for _, number in stay),
            gaining=frozenset(shard.number for shard, _ in finished) & to_make,
        )


class RejectLimit:
    """Counts rows for all ranks. Whatever counts raises UserError when too many are rejected, with the reasons."""

    def __init__(self, ranks: Ranks, max_reject_rate: float, standing: Standing) -> None:
        self._ranks = ranks
        self._max_reject_rate = max_reject_rate
        self._standing = standing
        self._untold: Counter[str] = Counter()  # to the others
        self._reasons: Counter[str] = Counter()
        self._reasons_of_shard: dict[int, Counter[str]] = {}  # until it is written
        self._counted_at = time.monotonic()

    def watch(
        self, results: Iterable[tuple[Shard, DecodedRow | RejectedRow]]
    ) -> Iterator[tuple[Shard, DecodedRow | RejectedRow]]:
        """Pass decoded rows on, counting them."""
        for shard, result in results:
            self._untold[ROWS_DECODED] += 1
            self._untold[_NEW_ROWS] += shard.number not in self._standing.gaining
            if isinstance(result, RejectedRow):
                reason = Counter([result.reason.value])
                self._reject(shard.number, reason)
                self._reasons_of_shard.setdefault(shard.number, Counter()).update(reason)
            else:
                self._untold[SAMPLES_DECODED] += len(result.samples)
            if time.monotonic() - self._counted_at > _SECONDS_BETWEEN_COUNTS:
                self.count()
            yield shard, result
        self.count()

    def shard_written(self, entry: LedgerEntry) -> None:
        """Count what the encoders rejected of it, of rows that had passed."""
        seen = self._reasons_of_shard.pop(entry.shard, Counter())
        self._reject(entry.shard, Counter(row["reason"] for row in entry.rejected) - seen)

    def count(self) -> None:
        """Tell the others, and see where all are."""
        for counter in (ROWS_DECODED, ROWS_REJECTED, SAMPLES_DECODED):
            self._ranks.count(counter, self._untold[counter])
        rows = self._ranks.count(_NEW_ROWS, self._untold[_NEW_ROWS])
        rejected = self._ranks.count(_NEW_ROWS_REJECTED, self._untold[_NEW_ROWS_REJECTED])
        self._untold.clear()
        self._counted_at = time.monotonic()
        self._check(rows, rejected)

    def _check(self, new_rows: int, new_rejected: int) -> None:
        """Stop if the new rows are too bad, and with them all that there are so far; or if the rest can't mend it."""
        limit, standing = self._max_reject_rate, self._standing
        rows, rejected = standing.rows + new_rows, standing.rejected + new_rejected
        # Bad rows come together: neither the shards that happen to be finished nor those that are left decide alone.
        are_bad = new_rows >= REJECT_RATE_ROWS and new_rejected > limit * new_rows and rejected > limit * rows
        is_lost = rows >= REJECT_RATE_ROWS and rejected > limit * standing.total_rows
        if are_bad or is_lost:
            reasons = format_reasons(dict(self._reasons.most_common()))
            raise UserError(
                f"max_reject_rate: {rejected} of {rows} rows were rejected, more than {limit:.0%}"
                f"{f' (on this rank: {reasons})' if reasons else ''}; mend the source or the recipe, or raise "
                "max_reject_rate"
            )

    def _reject(self, shard: int, reasons: Counter[str]) -> None:
        self._untold[ROWS_REJECTED] += reasons.total()
        if shard not in self._standing.gaining:
            self._untold[_NEW_ROWS_REJECTED] += reasons.total()
            self._reasons.update(reasons)
