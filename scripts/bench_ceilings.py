"""Each encoder alone, on ready batches of the job's shapes: samples/s, and how much arithmetic that is."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffusion_data.batch_encoder import BatchEncoder, BatchRecord
from diffusion_data.batching import Budgets
from diffusion_data.encode_pipeline import batches_by_length
from diffusion_data.encoders import Encoders

_SECONDS = 3.0

Run = Callable[[BatchEncoder], list[Future[Any]]]


@dataclass(frozen=True)
class Ceiling:
    """flop_a_sample: of matrix products and convolutions, and on a GPU of attention, padding included; a multiplication
    and an addition count as two, as in what makers of chips promise.
    """

    samples_per_second: float
    flop_a_sample: float

    def figures(self, peak_tflops: float | None) -> dict[str, float | None]:
        tflops = self.samples_per_second * self.flop_a_sample / 1e12
        return {
            "samples_per_second": self.samples_per_second,
            "tflops": tflops,
            "share_of_peak": tflops / peak_tflops if peak_tflops else None,
        }


def ceilings(
    encoders: Encoders,
    budgets: Budgets,
    shape: tuple[int, int, int, int],
    size: int,
    captions: list[str],
    threads: int,
    compiled: bool,
) -> dict[str, Ceiling]:
    """As many batches at a time as the job runs.

    shape: (T, H, W, 3) of a sample
    size: samples of a batch of frames
    """
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, shape, np.uint8) for _ in range(size)]
    tokens = encoders.text_encoder.tokenize(captions)
    batches = [[tokens[each] for each in batch] for batch in batches_by_length(list(map(len, tokens)), budgets.tokens)]
    rounds = 2 * max(threads, 1)

    def run_tokenizer(encoder: BatchEncoder) -> list[Future[Any]]:
        return [encoder.encode_frames(frames, BatchRecord()) for _ in range(rounds)]

    def run_text_encoder(encoder: BatchEncoder) -> list[Future[Any]]:
        return [encoder.encode_tokens(batch, BatchRecord(), len(batch)) for batch in batches]

    def ceiling(run: Run, samples: int) -> Ceiling:
        # Counted in this thread, which is the one that the counter sees, and before torch.compile hides the operations.
        with (
            BatchEncoder(encoders.tokenizer, encoders.text_encoder, 0) as inline,
            FlopCounterMode(display=False) as flop,
        ):
            run(inline)
        return Ceiling(_rounds_per_second(run, encoder) * samples, flop.get_total_flops() / samples)

    torch.set_num_threads(1)
    full = budgets.pixels if compiled else None
    with BatchEncoder(encoders.tokenizer, encoders.text_encoder, threads, full) as encoder:
        return {
            "tokenizer": ceiling(run_tokenizer, rounds * size),
            "text_encoder": ceiling(run_text_encoder, len(tokens)),
        }


def _rounds_per_second(run: Run, encoder: BatchEncoder) -> float:
    """After a first one to warm up."""
    done, started = 0, None
    while started is None or time.perf_counter() - started < _SECONDS:
        for future in run(encoder):
            future.result()
        if event := encoder.finished():
            event.synchronize()
        if started is None:
            started = time.perf_counter()
        else:
            done += 1
    return done / (time.perf_counter() - started)
