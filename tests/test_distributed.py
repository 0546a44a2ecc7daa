"""Ranks share a store: every claim is somebody's, once; counters add up; values arrive."""

from __future__ import annotations

import fcntl
import io
import os
import re
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain, repeat
from types import SimpleNamespace
from typing import TextIO

import pytest
import torch
from torch.distributed import TCPStore

from diffusion_data import distributed
from diffusion_data.busy_shares import BusyShares, busy_shares
from diffusion_data.distributed import Ranks
from diffusion_data.encoded_share import EncodedCounts, encoded_share
from diffusion_data.errors import UserError
from diffusion_data.progress import ROWS_DECODED, ROWS_REJECTED, SAMPLES_DECODED, Progress, format_seconds


def ranks(count: int) -> list[Ranks]:
    """As torchrun would set them up, over one TCPStore on loopback."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    return [
        Ranks(
            rank=rank,
            world_size=count,
            local_rank=rank,
            local_world_size=count,
            store=server if rank == 0 else TCPStore("127.0.0.1", server.port, is_master=False),
        )
        for rank in range(count)
    ]


def test_without_torchrun_there_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    alone = Ranks.connect()
    assert (alone.rank, alone.world_size) == (0, 1)
    assert [alone.claim("shard"), alone.claim("shard")] == [0, 1]


def test_each_number_is_claimed_by_one_rank() -> None:
    claimed: list[int] = []

    def claim_all(one: Ranks) -> None:
        while (number := one.claim("shard")) < 200:
            claimed.append(number)

    everybody = ranks(4)  # held: the first one's store is the server of all
    threads = [threading.Thread(target=claim_all, args=(one,)) for one in everybody]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == list(range(200))


def test_a_published_value_reaches_a_rank_that_waits_for_it() -> None:
    first, second = ranks(2)
    received: list[object] = []
    waiting = threading.Thread(target=lambda: received.append(second.receive("plan")))
    waiting.start()
    time.sleep(0.2)
    assert not received
    first.publish("plan", {"todo": [1, 2]})
    waiting.join()
    assert received == [{"todo": [1, 2]}]


def test_waiting_for_a_rank_that_has_stopped_ends_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_SECONDS_OF_SILENCE", 0.5)
    first, second = ranks(2)
    with second:
        pass  # was alive once
    with first, pytest.raises(UserError, match=r"rank 1 has stopped without a word.*same command again"):
        first.receive("finished/1", publisher=1)


def test_a_rank_that_is_only_slow_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_SECONDS_OF_SILENCE", 0.5)
    monkeypatch.setattr(distributed, "_SECONDS_BETWEEN_BEATS", 0.1)
    first, second = ranks(2)
    with first, second:
        threading.Timer(1.5, lambda: second.publish("finished/1", True)).start()
        assert first.receive("finished/1", publisher=1) is True


def test_a_rank_whose_torchrun_was_killed_before_it_came_to_work_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_SECONDS_OF_SILENCE", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**started, **torchrun}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="torchrun, or the node that keeps its store, is gone"):
        Ranks.connect()


def test_after_a_restart_nothing_of_the_first_start_is_seen() -> None:
    """torchrun keeps its store over restarts, and a rank of the new start may ask before rank 0 answers."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for _ in range(2):
        stores = [TCPStore("127.0.0.1", server.port, is_master=False) for _ in range(2)]
        first, second = (
            Ranks(rank=rank, world_size=2, local_rank=rank, local_world_size=2, store=store)
            for rank, store in enumerate(stores)
        )
        joining = threading.Thread(target=second._join_this_start)
        joining.start()
        first._join_this_start()
        joining.join()
        with first, second:
            assert sorted([first.claim("shard"), second.claim("shard")]) == [0, 1]
            assert not second.store.check(["plan"])
            first.publish("plan", 1)
            assert second.receive("plan") == 1


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_another_launcher_than_torchrun_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv(name, "8")
    with pytest.raises(UserError, match=f"{name}=8: start several processes with torchrun"):
        Ranks.connect()


def test_counters_add_up_over_ranks() -> None:
    first, second = ranks(2)
    first.count("rows", 3)
    assert second.count("rows", 4) == 7
    assert first.count("rows") == 7


def test_device_follows_the_option() -> None:
    (one,) = ranks(1)
    assert one.device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="expected auto, cpu or cuda, got 'tpu'"):
        one.device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens on a machine without CUDA")
def test_asking_for_cuda_where_there_is_none_says_so() -> None:
    (one,) = ranks(1)
    assert one.device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="torch sees no CUDA device"):
        one.device("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_rank_takes_the_gpu_of_its_local_rank() -> None:
    (one,) = ranks(1)
    assert one.device("auto") == torch.device("cuda", 0)


def clock(monkeypatch: pytest.MonkeyPatch, first: float, then: float) -> None:
    """What Progress reads as its beginning and as the time of every look."""
    times = chain([first], repeat(then))
    monkeypatch.setattr("diffusion_data.progress.time", SimpleNamespace(monotonic=lambda: next(times)))


def test_rows_rate_and_time_left_are_those_of_what_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """150 of 200 rows are decoded in 30 s. Of what encoding their samples takes, 20 + 15 of 30 + 30 s are done."""
    first, second = ranks(2)
    second.count(ROWS_DECODED, 150)
    second.count(SAMPLES_DECODED, 300)
    second.count(ROWS_REJECTED, 7)
    for rank in (first, second):
        counts = EncodedCounts(rank)
        counts.add("frames", 100, 10.0)
        counts.add("tokens", 75, 7.5)
        counts.tell()
    clock(monkeypatch, 100.0, 130.0)
    log = io.StringIO()
    with Progress(first, total_rows=220, done_before=20, stream=log):
        pass
    assert log.getvalue() == "107/220 rows, 5.8 samples/s, 0:00:39 left, 7 rejected\n"  # 87.5 rows, so 112.5 are left
    with terminal(24, 120) as (stream, shown):
        clock(monkeypatch, 100.0, 130.0)
        with Progress(first, total_rows=220, done_before=20, stream=stream):
            pass
        assert re.search(r"107/220 rows \[\d\d:\d\d, 5.8 samples/s, 0:00:39 left, 7 rejected\]", shown())


def test_when_the_first_captions_show_what_they_take_no_row_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = ranks(1)
    one.count(ROWS_DECODED, 100)
    one.count(SAMPLES_DECODED, 100)
    counts = EncodedCounts(one)
    counts.add("frames", 80, 8.0)
    counts.tell()
    clock(monkeypatch, 0.0, 10.0)
    monkeypatch.setattr("diffusion_data.progress._SECONDS_BETWEEN_LINES", 0.02)
    log = io.StringIO()
    with Progress(one, total_rows=200, done_before=0, stream=log):
        while not log.getvalue():
            threading.Event().wait(0.01)
        counts.add("tokens", 10, 4.0)
        counts.tell()
    lines = log.getvalue().splitlines()
    assert lines[0] == "80/200 rows, 8.0 samples/s, 0:00:15 left, 0 rejected"
    assert lines[-1] == "80/200 rows, 2.4 samples/s, 0:01:13 left, 0 rejected"  # 12 of 50 s are done: 24 rows


def test_what_is_encoded_is_told_every_so_often_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = ranks(1)
    now = [50.0]
    monkeypatch.setattr("diffusion_data.encoded_share.time", SimpleNamespace(monotonic=lambda: now[0]))
    assert encoded_share(one, 0) == 1.0
    assert encoded_share(one, 8) == 0.0
    counts = EncodedCounts(one)
    counts.add("frames", 2, 1.0)
    assert encoded_share(one, 8) == 0.0
    now[0] = 50.6
    counts.add("frames", 2, 1.0)
    assert encoded_share(one, 8) == 0.5
    counts.add("frames", 4, 2.0)
    counts.add("tokens", 8, 1.0)
    assert encoded_share(one, 8) == 0.5
    counts.tell()
    assert encoded_share(one, 8) == encoded_share(one, 7) == 1.0


def test_a_log_file_gets_lines_with_rows_rate_time_left_and_rejects() -> None:
    first, second = ranks(2)
    log = io.StringIO()
    with Progress(first, total_rows=100, done_before=40, stream=log), Progress(second, 100, 40, log):
        second.count(ROWS_DECODED, 60)
        second.count(ROWS_REJECTED, 7)
    (line,) = log.getvalue().splitlines()  # the other rank is silent
    assert line.startswith("100/100 rows, ")
    assert "samples/s, 0:00:00 left, 7 rejected" in line


def test_busy_shares_are_those_of_the_time_that_each_rank_took(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ranks(2)
    now = [100.0]
    monkeypatch.setattr("diffusion_data.busy_shares.time.monotonic", lambda: now[0])
    lanes = {"decoding": 4, "encoders": 1, "writing": 1}
    on_first, on_second = BusyShares(first, lanes), BusyShares(second, lanes)
    assert busy_shares(first) == {}
    now[0] = 110.0
    on_first.add({"decode": 20.0, "tokenizer": 8.0, "text_encoder": 1.0, "write": 1.0, "wait_for_rows": 9.0})
    assert busy_shares(second) == {"decoding": 0.5, "encoders": 0.9, "writing": 0.1}
    now[0] = 130.0  # a slow shard counts with its time
    on_second.add({"decode": 10.0, "tokenizer": 6.0})
    assert busy_shares(first) == {"decoding": 0.1875, "encoders": 0.375, "writing": 0.025}
    monkeypatch.undo()
    log = io.StringIO()
    with Progress(first, total_rows=100, done_before=40, stream=log):
        first.count(ROWS_DECODED, 60)
    assert "0 rejected; busy: decoding 19%, encoders 38%, writing 2%" in log.getvalue()


@contextmanager
def terminal(lines: int, columns: int) -> Iterator[tuple[TextIO, Callable[[], str]]]:
    """A real one: where a program writes, and what has been shown."""
    screen, program = os.openpty()
    fcntl.ioctl(program, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    os.set_blocking(screen, False)
    with os.fdopen(program, "w") as stream, os.fdopen(screen, "rb") as shown:
        yield stream, lambda: (shown.read() or b"").decode()


def test_a_terminal_gets_one_bar() -> None:
    first, second = ranks(2)
    busy = BusyShares(second, {"decoding": 1, "encoders": 1, "writing": 1})
    time.sleep(0.01)
    with terminal(24, 120) as (stream, shown), terminal(24, 120) as (silent, silence):
        with Progress(first, total_rows=100, done_before=40, stream=stream), Progress(second, 100, 40, silent):
            second.count(ROWS_DECODED, 60)
            second.count(SAMPLES_DECODED, 90)
            counts = EncodedCounts(second)
            counts.add("frames", 90, 1.0)
            counts.tell()
            second.count(ROWS_REJECTED, 7)
            busy.add({"tokenizer": 1e9})
        last = shown().split("\r")[-2]
        assert silence() == ""
    assert "100/100 rows [" in last
    assert re.search(r"\d samples/s, 0:00:00 left, 7 rejected; busy: decoding 0%, encoders 100%, writing 0%", last)


def test_a_terminal_of_unknown_size_gets_lines() -> None:
    (one,) = ranks(1)
    with terminal(0, 0) as (stream, shown):
        with Progress(one, total_rows=5, done_before=5, stream=stream):
            pass
        assert shown().startswith("5/5 rows, 0.0 samples/s, 0:00:00 left, ")


def test_rows_that_are_encoded_but_not_written_are_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = ranks(1)
    monkeypatch.setattr("diffusion_data.progress._SECONDS_BETWEEN_LINES", 0.02)
    log = io.StringIO()
    one.count(ROWS_DECODED, 5)
    with Progress(one, total_rows=5, done_before=0, stream=log):
        while not log.getvalue():
            time.sleep(0.01)
    assert "samples/s, finishing the last, 0 rejected" in log.getvalue().splitlines()[0]
    assert "samples/s, 0:00:00 left, 0 rejected" in log.getvalue().splitlines()[-1]


def test_times_are_told_in_hours_minutes_and_seconds() -> None:
    assert [format_seconds(seconds) for seconds in (None, 59.6, 3723)] == ["unknown time", "0:01:00", "1:02:03"]
