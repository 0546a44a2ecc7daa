"""Ranks share a store: every claim is somebody's, once; counters add up; values arrive."""

from __future__ import annotations

import io
import threading
import time
from datetime import timedelta

import pytest
import torch
from torch.distributed import TCPStore

from diffusion_data.distributed import Ranks
from diffusion_data.errors import UserError
from diffusion_data.progress import ROWS_DONE, ROWS_REJECTED, Progress, format_seconds


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

    threads = [threading.Thread(target=claim_all, args=(one,)) for one in ranks(4)]
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


def test_a_log_file_gets_lines_with_rows_rate_time_left_and_rejects() -> None:
    first, second = ranks(2)
    log = io.StringIO()
    with Progress(first, total_rows=100, done_before=40, stream=log), Progress(second, 100, 40, log):
        second.count(ROWS_DONE, 60)
        second.count(ROWS_REJECTED, 7)
    (line,) = log.getvalue().splitlines()  # the other rank is silent
    assert line.startswith("100/100 rows, ")
    assert "samples/s, 0:00:00 left, 7 rejected" in line


def test_times_are_told_in_hours_minutes_and_seconds() -> None:
    assert [format_seconds(seconds) for seconds in (None, 59.6, 3723)] == ["unknown time", "0:01:00", "1:02:03"]
