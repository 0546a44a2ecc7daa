"""Rates of training, from a clock that the test sets."""

from __future__ import annotations

import torch

from diffusion_data.scripts.throughput import Throughput, rates

FETCH = "[_TrainingEpochLoop].train_dataloader_next"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def one_batch(throughput: Throughput, clock: Clock, waiting: float, training: float) -> None:
    throughput.start(FETCH)
    clock.now += waiting
    throughput.stop(FETCH)
    clock.now += training
    throughput.count({"num_samples": 2, "num_tokens": 16, "num_positions": 40})
    throughput.pause()


def test_time_between_batches_does_not_count() -> None:
    clock = Clock()
    throughput = Throughput(clock)
    one_batch(throughput, clock, waiting=1.0, training=3.0)
    throughput.start("[_EvaluationLoop].val_next")
    clock.now += 1000.0  # validation, saving
    throughput.stop("[_EvaluationLoop].val_next")
    throughput.pause()
    one_batch(throughput, clock, waiting=0.0, training=4.0)

    assert rates(throughput.totals.as_tensor(torch.device("cpu")), world_size=1) == {
        "samples_per_second": 4 / 8,
        "tokens_per_second": 32 / 8,
        "padding_share": 0.6,
        "data_wait_share": 1 / 8,
    }
    throughput.reset()
    assert throughput.totals.seconds == throughput.totals.tokens == 0


def test_ranks_add_up_but_their_time_does_not() -> None:
    both = torch.tensor([2.0, 16.0, 40.0, 4.0, 1.0]) + torch.tensor([2.0, 24.0, 40.0, 4.0, 3.0])

    assert rates(both, world_size=2) == {
        "samples_per_second": 4 / 4,
        "tokens_per_second": 40 / 4,
        "padding_share": 0.5,
        "data_wait_share": 0.5,
    }
