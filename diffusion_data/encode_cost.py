"""A few batches of each shape through the encoders -> seconds a sample, for sizes that were tried and for others."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean

import numpy as np
import torch

from diffusion_data.batching import Budgets
from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.encode_pipeline import batches_by_length
from diffusion_data.errors import UserError
from diffusion_data.t5_text_encoder import T5TextEncoder

_BATCHES_KEPT = 16  # of all shapes: bounds memory
_SECONDS = 15.0  # for the tokenizer, and as many for the text encoder


class EncodeCost:
    """Device seconds on a GPU, CPU seconds of one thread on a CPU.

    budgets: the run's; a clip that is longer than a batch is tried with as many frames as fit
    """

    def __init__(self, tokenizer: CosmosTokenizer, text_encoder: T5TextEncoder, budgets: Budgets) -> None:
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._tokens_per_batch = budgets.tokens
        self._pixels_per_batch = budgets.pixels
        self._batches: dict[tuple[int, int, int], list[np.ndarray]] = {}
        self._pixels: Counter[tuple[int, int, int]] = Counter()
        self._kept_pixels = 0
        self._captions: list[list[int]] = []

    def add(self, pixels: np.ndarray, token_ids: list[int]) -> None:
        """A decoded row: uint8 (T, H, W, 3) and its caption's ids, cut to what is encoded."""
        self._captions.append(token_ids)
        frames, height, width, _ = pixels.shape
        self._pixels[frames, height, width] += frames * height * width
        batch = self._batches.setdefault((frames, height, width), [])
        tried = pixels[: self._frames_that_fit(height, width)]
        size = tried.size // 3
        if (len(batch) + 1) * size <= max(self._pixels_per_batch, size) and (
            not batch or self._kept_pixels + size <= _BATCHES_KEPT * self._pixels_per_batch
        ):
            batch.append(tried.copy())
            self._kept_pixels += size

    def frame_seconds(self) -> float:
        """Of the tokenizer, summed over the rows that were added. The shapes with most pixels are tried."""
        deadline = time.monotonic() + _SECONDS
        per_pixel: dict[tuple[int, int, int], float] = {}
        for shape, _ in self._pixels.most_common():
            if per_pixel and time.monotonic() > deadline:
                break
            per_pixel[shape] = self._seconds_per_pixel(self._batches[shape])
        return sum(pixels * _nearest(per_pixel, shape) for shape, pixels in self._pixels.items())

    def caption_seconds(self) -> float:
        """Of the text encoder, summed over the rows that were added, each caption counted once."""
        captions = list({tuple(ids): ids for ids in self._captions}.values())
        batches = list(batches_by_length([len(ids) for ids in captions], self._tokens_per_batch))
        deadline = time.monotonic() + _SECONDS
        seconds, tokens = 0.0, 0
        for number, batch in enumerate(batches):
            if number and time.monotonic() > deadline:
                break
            ids = [captions[index] for index in batch]
            seconds += self._timed(partial(self._text_encoder.encode_tokens, ids), warm_up=number == 0)
            tokens += sum(map(len, ids))
        return seconds * sum(map(len, captions)) / tokens

    def _frames_that_fit(self, height: int, width: int) -> int:
        """1 + k * t, of a batch's pixels; at least the first latent frame that is made of several."""
        step = self._tokenizer.temporal_compression
        return 1 + step * max(1, (self._pixels_per_batch // (height * width) - 1) // step)

    def _seconds_per_pixel(self, batch: Sequence[np.ndarray]) -> float:
        """As the run does, it goes on with half a batch where memory doesn't suffice for the whole."""
        frames = torch.from_numpy(np.stack(batch))
        try:
            return self._timed(partial(self._tokenizer.encode, frames), warm_up=True) / (frames.numel() // 3)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise UserError(
                    f"{self._tokenizer.device} has too little memory for one sample of {tuple(batch[0].shape)} pixels"
                ) from error
        return self._seconds_per_pixel(batch[: (len(batch) + 1) // 2])

    def _timed(self, encode: Callable[[], object], warm_up: bool) -> float:
        """warm_up: run it once before, as kernels are chosen and memory is found in the first run of a shape."""
        if warm_up:
            encode()
        is_cuda = self._tokenizer.device.type == "cuda"
        if is_cuda:
            torch.cuda.synchronize(self._tokenizer.device)
        started, cpu_started = time.perf_counter(), time.thread_time()
        encode()
        if is_cuda:
            torch.cuda.synchronize(self._tokenizer.device)
            return time.perf_counter() - started
        return time.thread_time() - cpu_started


def _nearest(per_pixel: dict[tuple[int, int, int], float], shape: tuple[int, int, int]) -> float:
    """Seconds a pixel of the shape, or of those tried that are pictures or clips as it is, or else of all."""
    if shape in per_pixel:
        return per_pixel[shape]
    alike = [seconds for tried, seconds in per_pixel.items() if (tried[0] == 1) == (shape[0] == 1)]
    return fmean(alike or per_pixel.values())
