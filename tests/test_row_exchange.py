"""Workers run ahead as far as memory allows, and the caller's order is kept."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from diffusion_data import decode_workers
from diffusion_data.decode_workers import DecodeWorkers
from diffusion_data.sources import Row
from tests.worker_rows import Counted, decoder, in_thread, pixels_of, rows, simple_decoder, wait_for


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_rows_are_read_only_as_far_ahead_as_the_workers_need(num_workers: int) -> None:
    taken = 0

    def endless() -> Iterator[tuple[str, Row]]:
        nonlocal taken
        for entry in rows(*[{} for _ in range(1000)]):
            taken += 1
            yield entry

    with DecodeWorkers(decoder(), num_workers) as workers:
        results = workers.map(endless())
        for _ in range(10):
            next(results)
        assert 10 <= taken <= 10 + 16 * num_workers


def test_frames_that_wait_for_their_turn_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_workers, "_RUN_AHEAD_BYTES", 7_000_000)
    with DecodeWorkers(simple_decoder, 2) as workers:
        results = workers.map(rows(*[{"bytes": 3_000_000} for _ in range(12)]))
        next(results)
        most = 0
        for _ in range(11):
            time.sleep(0.03)  # for the workers, to run ahead as far as they may
            waiting = [result.samples[0].pixels.nbytes for result in workers._exchange._results.values()]
            most = max(most, sum(waiting))
            next(results)
        assert 6_000_000 <= most <= 7_000_000 + 3_000_000  # the next in turn always has room


def test_results_larger_than_the_bound_come_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_workers, "_RUN_AHEAD_BYTES", 1)
    with DecodeWorkers(simple_decoder, 2) as workers:
        results = [result for _, result in workers.map(rows(*[{"bytes": 300_000} for _ in range(10)]))]
    assert [result.row for result in results] == list(range(100, 110))
    assert [int(pixels.mean()) for pixels in pixels_of(results)] == list(range(10))


@pytest.mark.parametrize(
    ("max_bytes", "taken"), [(10_000_000, 9), (3_000_000, 3), (1, 2)], ids=["ten", "three", "one a worker"]
)
def test_rows_that_wait_for_workers_are_bounded_in_bytes(
    max_bytes: int, taken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_workers, "_ROW_BYTES", max_bytes)
    flag = tmp_path / "flag"
    struct = {"media": {"bytes": b"x" * 600_000, "parts": [b"x" * 300_000, b"x" * 300_000]}}
    source = Counted(rows(*[{"does": "wait", "flag": str(flag), **struct} for _ in range(12)]))
    with DecodeWorkers(simple_decoder, 2) as workers:
        done = in_thread(workers.map(source))
        wait_for(lambda: source.count == taken and len(workers._exchange._busy) == 2, timeout_seconds=60.0)
        time.sleep(0.2)  # in which it could go on
        assert source.count == taken
        flag.touch()
        assert done.result(60) == list(range(100, 112))


@pytest.mark.parametrize("rows_of_group", [1, 12])
def test_workers_have_rows_while_the_caller_waits_for_another(
    rows_of_group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first row ends when the last one is done."""
    monkeypatch.setattr(decode_workers, "_ROW_BYTES", 1)
    flag = str(tmp_path / "flag")
    all_rows = rows({"does": "wait", "flag": flag}, *[{} for _ in range(10)], {"does": "note", "flag": flag})
    groups = [all_rows[start : start + rows_of_group] for start in range(0, 12, rows_of_group)]
    with DecodeWorkers(simple_decoder, 2) as workers:
        assert in_thread(workers.map_groups(groups)).result(60) == list(range(100, 112))


def test_order_is_kept_whatever_waits_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_workers, "_ROW_BYTES", 20_000)
    monkeypatch.setattr(decode_workers, "_RUN_AHEAD_BYTES", 200_000)
    random = Random(0)
    all_rows = rows(
        *[
            {"value": 0, "bytes": random.choice([3, 3_000, 300_000]), "media": bytes(random.choice([1, 1_000, 30_000]))}
            for _ in range(300)
        ]
    )
    bounds = [0, *sorted(random.sample(range(1, 300), 40)), 300]
    groups = [all_rows[start:stop] for start, stop in pairwise(bounds)]
    with DecodeWorkers(simple_decoder, 3) as workers:
        assert in_thread(workers.map_groups(groups)).result(60) == list(range(100, 400))


def test_another_group_is_asked_for_once_a_worker_has_nothing_to_do(tmp_path: Path) -> None:
    flags = [tmp_path / str(number) for number in range(12)]
    all_rows = rows(*[{"does": "wait", "flag": str(flag)} for flag in flags])
    groups = Counted([all_rows[:4], all_rows[4:8], all_rows[8:]])
    with DecodeWorkers(simple_decoder, 2) as workers:
        done = in_thread(workers.map_groups(groups))
        wait_for(lambda: len(workers._exchange._busy) == 2, timeout_seconds=60.0)
        time.sleep(0.2)  # in which it could ask
        assert groups.count == 1
        for flag in flags[1:4]:
            flag.touch()
        wait_for(lambda: groups.count > 1, timeout_seconds=60.0)
        time.sleep(0.2)
        assert groups.count == 2
        for flag in flags:
            flag.touch()
        assert done.result(60) == list(range(100, 112))


def test_a_caller_that_is_busy_has_the_next_group_decoded_only_for_its_last_rows() -> None:
    all_rows = rows(*[{} for _ in range(24)])
    groups = Counted([all_rows[:8], all_rows[8:16], all_rows[16:]])
    with DecodeWorkers(simple_decoder, 1) as workers:
        results = workers.map_groups(groups)
        for _ in range(7):
            next(results)
            assert groups.count == 1
        wait_for(workers._exchange.has_idle_worker)
        next(results)
        assert groups.count == 2
        assert [result.row for _, result in results] == list(range(108, 124))
