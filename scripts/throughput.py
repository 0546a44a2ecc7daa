"""Where training's time goes: samples and tokens a second over all ranks, the share of padding, waiting for data.

Lightning tells its profiler when it asks for a batch and when it has one; the rest of a step is the callbacks' to see.
Validation and saving lie between steps and don't count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from lightning.pytorch.profilers import Profiler

from diffusion_data.scripts.sample_layout import Batch

COLUMNS = ("samples_per_second", "tokens_per_second", "padding_share", "data_wait_share")

_FETCH = "[_TrainingEpochLoop].train_dataloader_next"


@dataclass
class Totals:
    """Of the steps since the last `reset`, on this rank."""

    samples: float = 0
    tokens: float = 0  # positions of samples
    positions: float = 0  # those that the loader gave, padding included
    seconds: float = 0
    waited_seconds: float = 0

    def as_tensor(self, device: torch.device) -> torch.Tensor:
        values = [getattr(self, field.name) for field in fields(self)]
        return torch.tensor(values, dtype=torch.float32, device=device)  # not every device has float64


class Throughput(Profiler):
    """Passed to the Trainer as its profiler, and told of each batch that was trained on."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._began: float | None = None  # of the micro batch that is under way
        self.totals = Totals()

    def start(self, action_name: str) -> None:
        if action_name == _FETCH:
            self._began = self._clock()

    def stop(self, action_name: str) -> None:
        if action_name == _FETCH and self._began is not None:
            self.totals.waited_seconds += self._clock() - self._began

    def count(self, batch: Batch) -> None:
        """A batch, from `without_padding`, that was trained on."""
        self.totals.samples += batch["num_samples"]
        self.totals.tokens += batch["num_tokens"]
        self.totals.positions += batch["num_positions"]

    def pause(self) -> None:
        """The batch is done: time from here to the next fetch is not training's. May be called twice."""
        if self._began is not None:
            self.totals.seconds += self._clock() - self._began
            self._began = None

    def reset(self) -> None:
        self.totals = Totals()


def rates(totals_of_all_ranks: torch.Tensor, world_size: int) -> dict[str, float]:
    """Totals' tensors added up -> COLUMNS. The clocks of ranks that work in step are averaged."""
    samples, tokens, positions, seconds, waited = totals_of_all_ranks.tolist()
    seconds = max(seconds, 1e-9)
    values = (
        samples * world_size / seconds,
        tokens * world_size / seconds,
        1 - tokens / positions,
        waited / seconds,
    )
    return {name: round(value, 4) for name, value in zip(COLUMNS, values, strict=True)}
