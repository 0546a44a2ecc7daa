"""Rows in, decoded or rejected rows out: in order, with every failure accounted for."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from diffusion_data import decode_workers
from diffusion_data.decode_workers import DecodeWorkers
from diffusion_data.decoded_row import DecodedRow, DecodedSample, RejectedRow
from diffusion_data.errors import Reason, RowRejected, UserError
from diffusion_data.media import Frames, MediaConfig
from diffusion_data.process_funcs import MediaSample
from diffusion_data.process_server import process_context
from diffusion_data.row_decoder import RowDecoder
from diffusion_data.sources import Row


def process(row: dict[str, Any], *, suffix: str = "") -> MediaSample:
    """The tests' own process function; what the row's `does` says happens."""
    match row["does"]:
        case "raise":
            return {}["missing"]
        case "reject":
            raise RowRejected(Reason.fetch_error, "no network")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "kill once":
            flag = Path(row["flag"])
            if not flag.exists():
                flag.write_text("")
                os.kill(os.getpid(), signal.SIGKILL)
        case "no memory":
            raise MemoryError
        case "no memory once":
            flag = Path(row["flag"])
            if not flag.exists():
                flag.write_text("")
                raise MemoryError
        case "return nothing":
            return None  # type: ignore[return-value]
    height, width = row.get("size", (32, 48))
    pixels = np.full((row.get("frames", 1), height, width, 3), row["value"], np.uint8)
    return MediaSample(
        frames=Frames(pixels=pixels, fps=row.get("fps"), source_height=height, source_width=width),
        caption=row.get("caption", f"value {row['value']}{suffix}"),
        metadata=row.get("metadata", {}),
    )


def decoder(**options: Any) -> RowDecoder:
    defaults: dict[str, Any] = {
        "process_func": f"{__name__}.process",
        "arguments": {},
        "metadata_columns": (),
        "media": MediaConfig(short_side=None),
        "temporal_compression": 4,
        "size_multiple": 16,
    }
    return RowDecoder(**{**defaults, **options})


def rows(*values: dict[str, Any]) -> list[tuple[str, Row]]:
    return [
        (
            f"tag {index}",
            Row(
                index=index + 100,
                source_file="a.parquet",
                source_row=index,
                folder="/tmp",
                values={"does": "", "value": index, **value},
            ),
        )
        for index, value in enumerate(values)
    ]


def decode_one(value: dict[str, Any], **options: Any) -> DecodedRow | RejectedRow:
    ((_, row),) = rows(value)
    return decoder(**options)(row)


def test_a_row_becomes_frames_caption_and_metadata() -> None:
    done = decode_one({"value": 7, "score": 0.5}, metadata_columns=("score",), arguments={"suffix": "!"})
    assert isinstance(done, DecodedRow)
    assert done.samples[0].pixels.shape == (1, 32, 48, 3)
    assert (done.samples[0].pixels == 7).all()
    assert (done.row, done.source_file, done.source_row) == (100, "a.parquet", 0)
    (sample,) = done.samples
    assert (sample.caption, sample.metadata, sample.framerate) == ("value 7!", {"score": 0.5}, None)


def test_frames_of_any_size_and_number_are_made_to_fit_the_tokenizer() -> None:
    done = decode_one({"size": (37, 50), "frames": 12, "fps": 8.0})
    assert isinstance(done, DecodedRow)
    assert done.samples[0].pixels.shape == (9, 32, 48, 3)
    assert (done.samples[0].image_height, done.samples[0].image_width, done.samples[0].framerate) == (37, 50, 8.0)


@pytest.mark.parametrize(
    ("value", "reason", "message"),
    [
        ({"does": "reject"}, Reason.fetch_error, "no network"),
        ({"does": "raise"}, Reason.process_func_error, "KeyError: 'missing' (process, line"),
        ({"does": "return nothing"}, Reason.process_func_error, "returned NoneType, expected MediaSample"),
        ({"caption": None}, Reason.null_caption, "caption is null"),
        ({"caption": 7}, Reason.caption_not_text, "caption holds int"),
        ({"caption": " \n"}, Reason.null_caption, "empty caption"),
        ({"metadata": {"caption": "x"}}, Reason.bad_metadata, "['caption'] are the format's own"),
        ({"metadata": {"raw": b"x"}}, Reason.bad_metadata, "raw holds bytes"),
    ],
)
def test_a_bad_row_is_rejected_with_its_reason(value: dict[str, Any], reason: Reason, message: str) -> None:
    rejected = decode_one(value)
    assert isinstance(rejected, RejectedRow)
    assert rejected.reason is reason
    assert message in rejected.message


def test_a_rejected_row_keeps_its_metadata_columns_for_the_report() -> None:
    rejected = decode_one({"does": "reject", "score": 4}, metadata_columns=("score",))
    assert isinstance(rejected, RejectedRow)
    assert rejected.to_json() == {
        "row": 100,
        "source_file": "a.parquet",
        "source_row": 0,
        "reason": "fetch_error",
        "retryable": True,
        "message": "no network",
        "score": 4,
    }


def test_metadata_is_what_json_can_hold() -> None:
    done = decode_one(
        {
            "when": datetime.date(2024, 5, 17),
            "nan": float("nan"),
            "tags": [{"a": np.float32(0.5)}],
            "none": None,
        },
        metadata_columns=("when", "nan", "tags", "none"),
    )
    assert isinstance(done, DecodedRow)
    assert done.samples[0].metadata == {"when": "2024-05-17", "nan": None, "tags": [{"a": 0.5}], "none": None}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_results_come_in_the_order_of_the_rows(num_workers: int) -> None:
    with DecodeWorkers(decoder(), num_workers) as workers:
        results = list(workers.map(rows(*[{} for _ in range(50)])))
    assert [tag for tag, _ in results] == [f"tag {index}" for index in range(50)]
    assert [result.row for _, result in results] == list(range(100, 150))


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


def simple_decoder(row: Row) -> DecodedRow | RejectedRow:
    """What the row's `does` says, in the decoder itself; frames of `bytes` bytes and the worker's process id."""
    values = row.values
    match values["does"]:
        case "sleep once" if not Path(values["flag"]).exists():
            Path(values["flag"]).write_text(str(os.getpid()))
            time.sleep(60)
        case "user error":
            raise UserError("process_func._target_: can't import it")
        case "bug":
            raise KeyError("a bug")
        case "unpicklable error":
            raise type("Local", (Exception,), {})("made here")
        case "exit":
            sys.exit(0)
        case "sleep":
            time.sleep(60)
        case "stay behind":  # a child that holds all that it inherited
            if os.fork() == 0:
                time.sleep(3)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
        case "note":
            Path(values["flag"]).write_text(str(os.getpid()))
        case "wait":
            wait_for(Path(values["flag"]).exists, timeout_seconds=60.0)
    return DecodedRow(
        row=row.index,
        source_file=row.source_file,
        source_row=row.source_row,
        samples=(
            DecodedSample(
                pixels=np.full((1, 1, values.get("bytes", 3) // 3, 3), values["value"], np.uint8),
                framerate=None,
                image_height=1,
                image_width=1,
                caption="",
                metadata={"pid": os.getpid()},
            ),
        ),
    )


def wait_for(condition: Callable[[], Any], timeout_seconds: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def pid_of(result: DecodedRow | RejectedRow) -> int:
    assert isinstance(result, DecodedRow)
    return result.samples[0].metadata["pid"]


def pixels_of(results: Iterable[DecodedRow | RejectedRow]) -> list[np.ndarray]:
    return [result.samples[0].pixels for result in results if isinstance(result, DecodedRow)]


def kinds(results: Iterable[tuple[Any, DecodedRow | RejectedRow]]) -> list[str]:
    return [result.reason.value if isinstance(result, RejectedRow) else "decoded" for _, result in results]


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


class Counted:
    """Iterates over `items`, and tells how many were asked for."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.count = 0
        self._items = iter(items)

    def __iter__(self) -> Counted:
        return self

    def __next__(self) -> Any:
        item = next(self._items)
        self.count += 1
        return item


def in_thread(results: Iterator[tuple[Any, DecodedRow | RejectedRow]]) -> Future[list[int]]:
    """The row numbers of the results, all of which a thread waits for."""
    return ThreadPoolExecutor(1).submit(lambda: [result.row for _, result in results])


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
