"""The share of rejected rows is counted over all ranks, and the run stops when it is too large."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from diffusion_data.decoded_row import DecodedRow, RejectedRow
from diffusion_data.distributed import Ranks
from diffusion_data.errors import Reason, UserError
from diffusion_data.ledger import LedgerEntry
from diffusion_data.progress import ROWS_DECODED, ROWS_REJECTED
from diffusion_data.reject_limit import RejectLimit, Standing
from diffusion_data.shard_plan import Shard
from tests.test_distributed import ranks
from tests.test_encode_pipeline import decoded

SHARD = Shard(number=0, start=0, stop=1000)
NOTHING = Standing(total_rows=10**6, rows=0, rejected=0, gaining=frozenset())


def results(written: int, *reasons: Reason) -> Iterator[tuple[Shard, DecodedRow | RejectedRow]]:
    for row, reason in enumerate(reasons):
        yield SHARD, RejectedRow(row=row, source_file="a", source_row=row, reason=reason, message="")
    good = decoded(0)
    for _ in range(written):
        yield SHARD, good


def pass_on(rank: Ranks, limit: float, written: int, *reasons: Reason, standing: Standing = NOTHING) -> int:
    return sum(1 for _ in RejectLimit(rank, limit, standing).watch(results(written, *reasons)))


def test_what_passes_is_counted_for_all_ranks() -> None:
    first, second = ranks(2)
    assert pass_on(first, 0.05, 100, Reason.empty) == 101
    assert pass_on(second, 0.05, 50) == 50
    assert (first.count(ROWS_DECODED), second.count(ROWS_REJECTED)) == (151, 1)


def test_the_limit_is_of_all_ranks_together_and_the_reasons_are_told() -> None:
    first, second = ranks(2)
    assert pass_on(first, 0.05, 190, *[Reason.empty] * 10) == 200  # at the limit, and too few to say
    with pytest.raises(
        UserError,
        match=r"max_reject_rate: 21 of 400 rows were rejected, more than 5% \(on this rank: not_found 9, timeout 2\)",
    ):
        pass_on(second, 0.05, 189, Reason.timeout, *[Reason.not_found] * 9, Reason.timeout)


def test_a_rank_that_is_well_stops_because_of_the_others() -> None:
    first, second = ranks(2)
    assert pass_on(first, 0.05, 0, *[Reason.not_media] * 299) == 299  # of fewer rows nothing is said
    with pytest.raises(UserError, match=r"299 of 300 rows were rejected, more than 5%; mend"):  # none on this rank
        pass_on(second, 0.05, 1)


def test_at_the_limit_the_run_goes_on() -> None:
    (only,) = ranks(1)
    assert pass_on(only, 0.05, 380, *[Reason.empty] * 20) == 400
    assert pass_on(ranks(1)[0], 1.0, 0, *[Reason.empty] * 400) == 400


def entry(*reasons: Reason) -> LedgerEntry:
    return LedgerEntry(
        shard=0,
        start=0,
        stop=400,
        file="a",
        num_bytes=1,
        sha256="",
        written=400 - len(reasons),
        samples=400 - len(reasons),
        captions_cut=0,
        fingerprint="",
        rejected=[{"row": 0, "reason": reason.value} for reason in reasons],
    )


def test_what_the_encoders_reject_counts_too_and_once() -> None:
    (only,) = ranks(1)
    limit = RejectLimit(only, 0.05, NOTHING)
    assert sum(1 for _ in limit.watch(results(390, *[Reason.empty] * 10))) == 400
    limit.shard_written(entry(*[Reason.empty] * 10, *[Reason.non_finite_latent] * 10))
    limit.count()
    assert only.count(ROWS_REJECTED) == 20
    assert sum(1 for _ in limit.watch(results(1))) == 1
    limit.shard_written(entry(Reason.non_finite_latent, Reason.non_finite_latent))
    with pytest.raises(UserError, match=r"22 of 401 rows .*\(on this rank: non_finite_latent 12, empty 10\)"):
        limit.count()


def standing(rows: int, rejected: int, total_rows: int = 10**6, gaining: frozenset[int] = frozenset()) -> Standing:
    return Standing(total_rows=total_rows, rows=rows, rejected=rejected, gaining=gaining)


def test_what_stands_is_of_the_finished_shards_that_stay() -> None:
    shards = [Shard(number=number, start=100 * number, stop=100 * number + 100) for number in range(5)]
    found = Standing.of(shards, [shards[1], shards[3]], [7, 20, 0, None, 5])
    assert found == standing(300, 12, 500, frozenset({1}))


def test_bad_rows_that_come_together_stop_no_restart_of_a_run_that_would_finish_undisturbed() -> None:
    """27 of 640 rows, all in the second half, whichever half is finished."""
    first, second = ranks(1), ranks(1)
    assert pass_on(first[0], 0.05, 293, *[Reason.empty] * 27, standing=standing(320, 0, 640)) == 320
    assert pass_on(second[0], 0.05, 320, standing=standing(320, 27, 640)) == 320


def test_a_restart_goes_no_further_than_the_limit_of_all_rows() -> None:
    (only,) = ranks(1)
    with pytest.raises(UserError, match=r"81 of 1060 rows were rejected, more than 5% \(on this rank: empty 31\)"):
        pass_on(only, 0.05, 329, *[Reason.empty] * 31, standing=standing(700, 50))
    (other,) = ranks(1)  # with too few rows to say how the rest will be, but the rest can't mend it
    with pytest.raises(UserError, match=r"51 of 800 rows .*\(on this rank: not_found 1\)"):
        pass_on(other, 0.05, 99, Reason.not_found, standing=standing(700, 50, 1000))
    assert pass_on(ranks(1)[0], 0.05, 100, standing=standing(700, 50, 1000)) == 100


def test_a_shard_that_gains_rows_is_never_stopped_for_those_that_it_still_lacks() -> None:
    (only,) = ranks(1)
    limit = RejectLimit(only, 0.05, standing(320, 16, 1320, frozenset({0})))
    assert sum(1 for _ in limit.watch(results(600, *[Reason.fetch_error] * 400))) == 1000
    limit.shard_written(entry(*[Reason.fetch_error] * 390, *[Reason.non_finite_latent] * 10))
    limit.count()
    assert (only.count(ROWS_DECODED), only.count(ROWS_REJECTED)) == (1000, 410)
