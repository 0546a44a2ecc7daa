"""How long each stage was busy: wall and CPU time of CPU work, device time of what runs on a GPU."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

WAITS = {
    "wait_for_rows": "decoding",
    "wait_for_encoders": "the encoders",
    "wait_for_writer": "writing",
}
"""Stages in which a rank's main loop had nothing to do, and what it waited for."""


class StageTimes:
    """Seconds by stage name; threads may add to it at the same time.

    A CUDA stage is timed by events, which the device fills in: no waiting here.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._cpu_seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._lock = threading.Lock()

    def add(self, stage: str, seconds: float, cpu_seconds: float = 0.0) -> None:
        with self._lock:
            self._seconds[stage] += seconds
            self._cpu_seconds[stage] += cpu_seconds

    @contextmanager
    def busy(self, stage: str, device: torch.device | None = None) -> Iterator[None]:
        """Time the block; with a CUDA device, what the block put on its current stream."""
        if device is not None and device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((stage, begin, end))
        else:
            started, cpu_started = time.perf_counter(), time.thread_time()
            yield
            self.add(stage, time.perf_counter() - started, time.thread_time() - cpu_started)

    def merge(self, other: StageTimes) -> None:
        for stage, seconds in other.seconds().items():
            self.add(stage, seconds)

    def seconds(self) -> dict[str, float]:
        """Totals; call it when the device has finished what was timed."""
        for stage, begin, end in self._events:
            self.add(stage, begin.elapsed_time(end) / 1000)
        self._events.clear()
        return _rounded(self._seconds)

    def cpu_seconds(self) -> dict[str, float]:
        """Of the stages that run on a CPU, without what they waited for."""
        return _rounded({stage: each for stage, each in self._cpu_seconds.items() if each and stage not in WAITS})


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {stage: round(total, 6) for stage, total in sorted(seconds.items())}
