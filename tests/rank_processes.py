"""Runs a function as the ranks of a process group on this machine, forked, so that nothing is imported again."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

SECONDS = 240  # nothing here takes as long, unless ranks wait for each other for ever


def run_ranks(size: int, function: Callable[..., None], *arguments: Any) -> list[int]:
    """Exit codes of the ranks. Where one fails or is killed, the others are ended, as torchrun does."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, size, port, function, arguments)) for rank in range(size)]
    for process in ranks:
        process.start()
    until = time.monotonic() + SECONDS
    while any(process.is_alive() for process in ranks):
        failed = any(process.exitcode not in (None, 0) for process in ranks)
        if failed or time.monotonic() > until:
            for process in ranks:
                if process.is_alive():
                    os.killpg(process.pid, signal.SIGKILL)  # with its loader workers
        time.sleep(0.05)
    return [process.exitcode for process in ranks]


def _rank(rank: int, size: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.setpgid(0, 0)
    gc.freeze()  # what was imported is no garbage: energon's workers look for some as they start
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",
    )
    function(*arguments)
