"""Rows in, decoded or rejected rows out: in order, with every failure accounted for."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffusion_data import decode_workers
from diffusion_data.decode_workers import DecodeWorkers
from diffusion_data.decoded_row import DecodedRow, RejectedRow
from diffusion_data.errors import Reason, UserError
from diffusion_data.process_server import process_context
from diffusion_data.sources import Row
from tests.worker_rows import decoder, is_running, kinds, pid_of, pixels_of, rows, simple_decoder, wait_for


@pytest.mark.parametrize("num_workers", [0, 2])
def test_results_come_in_the_order_of_the_rows(num_workers: int) -> None:
    with DecodeWorkers(decoder(), num_workers) as workers:
        results = list(workers.map(rows(*[{} for _ in range(50)])))
    assert [tag for tag, _ in results] == [f"tag {index}" for index in range(50)]
    assert [result.row for _, result in results] == list(range(100, 150))


def test_a_row_that_kills_its_worker_is_rejected_and_the_others_are_not_lost(tmp_path: Path) -> None:
    flag = str(tmp_path / "flag")
    with DecodeWorkers(decoder(), 1) as workers:
        results = [
            result for _, result in workers.map(rows({}, {"does": "kill"}, {}, {"does": "kill once", "flag": flag}, {}))
        ]
    assert [type(result).__name__ for result in results] == [
        "DecodedRow",
        "RejectedRow",
        "DecodedRow",
        "DecodedRow",
        "DecodedRow",
    ]
    assert isinstance(results[1], RejectedRow)
    assert results[1].reason is Reason.worker_killed
    assert "2 times" in results[1].message
    assert "killed by SIGKILL" in results[1].message


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_row_that_finds_no_memory_costs_its_worker_not_the_job(num_workers: int) -> None:
    with DecodeWorkers(decoder(), num_workers) as workers:
        results = list(workers.map(rows({}, {"does": "no memory"}, {})))
    assert kinds(results) == ["decoded", "worker_killed", "decoded"]


def test_a_row_that_finds_no_memory_is_tried_again(tmp_path: Path) -> None:
    with DecodeWorkers(decoder(), 1) as workers:
        results = list(workers.map(rows({}, {"does": "no memory once", "flag": str(tmp_path / "flag")}, {})))
    assert kinds(results) == ["decoded"] * 3
    assert (tmp_path / "flag").exists()


def test_a_worker_killed_while_it_sends_a_large_result_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_workers, "_RUN_AHEAD_BYTES", 10)  # the large one waits until the first is taken
    flag = tmp_path / "flag"
    with DecodeWorkers(simple_decoder, 1) as workers:
        large = {"does": "note", "flag": str(flag), "bytes": 200_000_001, "value": 7}
        results = workers.map(rows({"value": 5}, {"value": 6}, large, {"value": 8}))
        assert pid_of(next(results)[1])
        # The second one is there; nobody asks for it, so the third has begun to send and can't go on.
        wait_for(flag.exists)
        first_pid = int(flag.read_text())
        time.sleep(0.3)
        os.kill(first_pid, signal.SIGKILL)
        rest = [result for _, result in results]
    assert [pixels.nbytes for pixels in pixels_of(rest)] == [3, 200_000_001, 3]
    assert int(rest[1].samples[0].pixels.min()) == int(rest[1].samples[0].pixels.max()) == 7  # type: ignore[union-attr]
    assert pid_of(rest[0]) == first_pid != pid_of(rest[1])


def test_workers_killed_while_idle_are_replaced() -> None:
    with DecodeWorkers(simple_decoder, 2) as workers:
        first = {pid_of(result) for _, result in workers.map(rows(*[{} for _ in range(40)]))}
        for pid in first:
            os.kill(pid, signal.SIGKILL)
        for pid in first:
            wait_for(lambda pid=pid: not is_running(pid))
        second = list(workers.map(rows(*[{} for _ in range(40)])))
        assert kinds(second) == ["decoded"] * 40
        assert not first & {pid_of(result) for _, result in second}


def test_a_row_whose_worker_exits_is_rejected_and_the_rank_goes_on() -> None:
    with DecodeWorkers(simple_decoder, 1) as workers:
        assert kinds(workers.map(rows({}, {"does": "exit"}, {}))) == ["decoded", "worker_killed", "decoded"]


def test_a_process_that_the_worker_leaves_behind_does_not_hide_its_death() -> None:
    started = time.monotonic()
    with DecodeWorkers(simple_decoder, 1) as workers:
        assert kinds(workers.map(rows({"does": "stay behind"}, {}))) == ["worker_killed", "decoded"]
    assert time.monotonic() - started < 2.9


def test_a_job_that_is_stopped_as_a_whole_for_longer_than_a_row_may_take_rejects_none(tmp_path: Path) -> None:
    """As a scheduler suspends it, or a container is frozen."""
    script = tmp_path / "job.py"
    script.write_text(
        """
import sys, time
from pathlib import Path
from diffusion_data.decode_workers import DecodeWorkers
from diffusion_data.sources import Row

def decoder(row):
    Path(row.folder, "begun").touch()
    for _ in range(40):
        time.sleep(0.05)
    return "decoded"

if __name__ == "__main__":
    row = Row(index=0, source_file="", source_row=0, folder=sys.argv[1], values={})
    with DecodeWorkers(decoder, 1, row_timeout_seconds=4.0) as workers:
        print([result for _, result in workers.map([(0, row)])], flush=True)
"""
    )
    job = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for((tmp_path / "begun").exists, timeout_seconds=120)
    os.killpg(job.pid, signal.SIGSTOP)
    time.sleep(6)
    os.killpg(job.pid, signal.SIGCONT)
    assert job.communicate(timeout=60)[0] == "['decoded']\n"


def test_a_row_that_takes_too_long_is_rejected_as_timeout(tmp_path: Path) -> None:
    with DecodeWorkers(simple_decoder, 1, row_timeout_seconds=0.5) as workers:
        results = list(workers.map(rows({}, {"does": "sleep"}, {}, {})))
    assert kinds(results) == ["decoded", "timeout", "decoded", "decoded"]
    assert isinstance(results[1][1], RejectedRow)
    assert results[1][1].message == "not decoded after 0.5 seconds"


class NeverStarts:
    """A decoder that can't be unpacked in another process."""

    def __call__(self, row: Row) -> DecodedRow | RejectedRow:
        raise AssertionError

    def __reduce__(self) -> Any:
        return os._exit, (3,)


def test_workers_that_cannot_start_are_an_error() -> None:
    with (
        DecodeWorkers(NeverStarts(), 2) as workers,
        pytest.raises(UserError, match="can't be started: 3 died at once, the last one: exit code 3"),
    ):
        list(workers.map(rows({}, {})))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_the_source_raises_reaches_the_caller(num_workers: int) -> None:
    def source() -> Iterator[tuple[str, Row]]:
        yield from rows({}, {})
        raise LookupError("no such row group")

    with DecodeWorkers(simple_decoder, num_workers) as workers, pytest.raises(LookupError, match="no such row group"):
        list(workers.map(source()))


@pytest.mark.parametrize(
    ("does", "error", "message"),
    [
        ("user error", UserError, "process_func._target_: can't import it"),
        ("bug", KeyError, "'a bug'"),
        ("unpicklable error", RuntimeError, "Local: made here"),
    ],
)
def test_what_the_decoder_raises_reaches_the_caller_in_its_turn(
    does: str, error: type[Exception], message: str
) -> None:
    with DecodeWorkers(simple_decoder, 1) as workers:
        results = workers.map(rows({}, {"does": does}, {}))
        next(results)
        with pytest.raises(error) as raised:
            next(results)
    assert type(raised.value) is error
    assert str(raised.value) == message
    assert "in simple_decoder" in str(raised.value.__cause__)


def test_leaving_early_ends_the_workers_at_once(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    with DecodeWorkers(simple_decoder, 3) as workers:
        results = workers.map(rows({}, {"does": "sleep once", "flag": str(flag)}, *[{} for _ in range(100)]))
        next(results)
        wait_for(lambda: flag.exists() and len(multiprocessing.active_children()) == 3)
        pids = [process.pid for process in multiprocessing.active_children()]
        left_at = time.monotonic()
    assert time.monotonic() - left_at < 2
    assert multiprocessing.active_children() == []
    for pid in pids:
        assert pid is not None
        wait_for(lambda pid=pid: not is_running(pid))
    with pytest.raises(RuntimeError, match="the decode workers were ended"):
        list(results)


def test_another_source_can_follow_one_that_was_left_early() -> None:
    with DecodeWorkers(simple_decoder, 2) as workers:
        early = workers.map(rows(*[{"value": 1} for _ in range(50)]))
        next(early)
        early.close()
        results = [result for _, result in workers.map(rows(*[{"value": 2} for _ in range(5)]))]
    assert [int(pixels[0, 0, 0, 0]) for pixels in pixels_of(results)] == [2] * 5


def be_a_rank(flags: list[str]) -> None:
    with DecodeWorkers(simple_decoder, 2) as workers:
        list(workers.map(rows(*[{"does": "sleep once", "flag": flag} for flag in flags])))


def test_a_rank_that_is_killed_leaves_no_worker_behind(tmp_path: Path) -> None:
    flags = [tmp_path / "a", tmp_path / "b"]
    rank = process_context().Process(target=be_a_rank, args=([str(flag) for flag in flags],))
    rank.start()
    wait_for(lambda: all(flag.exists() and flag.read_text() for flag in flags))
    rank.kill()
    for flag in flags:
        wait_for(lambda flag=flag: not is_running(int(flag.read_text())))
    rank.join()
