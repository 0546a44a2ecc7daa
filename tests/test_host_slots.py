"""A host is asked by few processes at a time, and their places are safe where others may write."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from diffusion_data.errors import Reason, RowRejected
from diffusion_data.fetch import Fetcher
from diffusion_data.host_slots import HostSlots
from diffusion_data.media import MediaConfig
from tests.fetching import LOCAL, fetch


def _fetch_busy(url: str, times: int, queue: Any) -> None:
    fetcher = Fetcher(MediaConfig(**LOCAL, max_connections_per_host=2), "/nowhere")
    queue.put(max(int(fetcher.open(url).read()) for _ in range(times)))


def test_a_host_is_asked_by_few_processes_at_a_time(server: Any) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_fetch_busy, args=(f"{server.url}/busy", 4, queue)) for _ in range(5)]
    for process in processes:
        process.start()
    assert max(queue.get(timeout=60) for _ in processes) == 2
    for process in processes:
        process.join()


def test_waiting_for_a_connection_ends_with_the_time(server: Any) -> None:
    options = {**LOCAL, "max_connections_per_host": 1}
    with HostSlots(1).hold("127.0.0.1", time.monotonic() + 1):
        with pytest.raises(
            RowRejected, match=r"media\.max_connections_per_host=1 connections to 127\.0\.0\.1"
        ) as rejected:
            fetch(f"{server.url}/ok", **{**options, "fetch_timeout_seconds": 0.3})
        assert rejected.value.reason is Reason.timeout
    assert fetch(f"{server.url}/ok", **options) == b"body"


def test_slots_are_not_kept_where_others_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first = tmp_path / f"diffusion_data-{os.getuid()}-0"
    first.symlink_to(tmp_path)
    (tmp_path / f"diffusion_data-{os.getuid()}-1").mkdir()
    (tmp_path / f"diffusion_data-{os.getuid()}-1").chmod(0o777)
    (tmp_path / f"diffusion_data-{os.getuid()}-2").touch()
    with HostSlots(1).hold("a", time.monotonic()):
        assert list((tmp_path / f"diffusion_data-{os.getuid()}-3").iterdir())
    assert (tmp_path / f"diffusion_data-{os.getuid()}-3").stat().st_mode & 0o777 == 0o700


def test_without_a_place_for_slots_rows_are_to_be_tried_again(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(RowRejected, match=r"no file for its connection in .*nowhere") as rejected:
        fetch(f"{server.url}/ok", **LOCAL, fetch_retries=1)
    assert rejected.value.reason.retryable
