"""How long each stage was busy: wall time of CPU work, device time of what runs on a GPU."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StageTimes:
    """Seconds by stage name. A CUDA stage is timed by events, which the device fills in: no waiting here."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def add(self, stage: str, seconds: float) -> None:
        self._seconds[stage] += seconds

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
            started = time.perf_counter()
            yield
            self.add(stage, time.perf_counter() - started)

    def seconds(self) -> dict[str, float]:
        """Totals; call it when the device has finished what was timed."""
        for stage, begin, end in self._events:
            self.add(stage, begin.elapsed_time(end) / 1000)
        self._events.clear()
        return {stage: round(total, 6) for stage, total in sorted(self._seconds.items())}
