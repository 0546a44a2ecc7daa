"""Batches of frames and of token ids -> latents and embeddings on the host, perhaps not yet there.

On a GPU a call only puts work on the device's queue: copies in, computation and copies out have a stream each and
overlap. On a CPU batches run in threads, each batch wholly in one of them, so that their number changes no bit.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch

from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.errors import UserError
from diffusion_data.stage_times import StageTimes
from diffusion_data.t5_text_encoder import T5TextEncoder

_BATCHES_AHEAD = 2  # per thread: one that runs and one that is ready

Item = TypeVar("Item")


class BatchEncoder:
    """Both encoders on one device; a context manager, whose threads end with it.

    num_threads: on a CPU; 0 encodes in the caller's thread, as a GPU does
    compile_full_batches: of so many pixels that another sample would exceed them; None compiles nothing. Smaller ones,
        the last of a shard, come in too many sizes
    on_done: told of each batch when the device is done with it, in whatever thread: "frames" or "tokens", of how many
        samples, and the seconds that the device took
    """

    def __init__(
        self,
        tokenizer: CosmosTokenizer,
        text_encoder: T5TextEncoder,
        num_threads: int,
        compile_full_batches: int | None = None,
        on_done: Callable[[str, int, float], None] | None = None,
    ) -> None:
        self.device = tokenizer.device
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._compile_full_batches = compile_full_batches
        self._num_threads = 0 if self.device.type == "cuda" else num_threads
        self._on_done = on_done
        self._threads: ThreadPoolExecutor | None = None
        self._watcher: ThreadPoolExecutor | None = None  # waits for a GPU, so that nobody else has to
        self._running: deque[Future[Any]] = deque()
        self._fits: dict[tuple[str, int], int] = {}  # batches that did, after a larger one had not
        if self.device.type == "cuda":
            self._copies_in, self._copies_out = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)

    def __enter__(self) -> BatchEncoder:
        if self._num_threads:
            # A new thread has torch's setting only after its first parallel region: too late for oneDNN.
            self._threads = ThreadPoolExecutor(self._num_threads, "encoder", torch.set_num_threads, (1,))
        if self.device.type == "cuda" and self._on_done is not None:
            self._watcher = ThreadPoolExecutor(1, "batches done")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for threads in (self._threads, self._watcher):
            if threads is not None:
                threads.shutdown(cancel_futures=error is not None)

    def encode_frames(self, batch: list[np.ndarray], record: BatchRecord) -> Future[Sequence[torch.Tensor]]:
        """uint8 (T, H, W, 3) each, all alike -> bfloat16 (C, t, h, w) each."""
        return self._run("frames", self._frames, batch, batch[0].size, record, len(batch))

    def encode_tokens(
        self, batch: list[list[int]], record: BatchRecord, num_samples: int
    ) -> Future[Sequence[torch.Tensor]]:
        """Ids of each caption -> float16 (S, D) each. num_samples: that have one of these captions."""
        return self._run("tokens", self._tokens, batch, max(map(len, batch)), record, num_samples)

    def finished(self) -> torch.cuda.Event | None:
        """What to wait for, besides the futures, until results are on the host."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(self._copies_out)
        return event

    def _run(
        self,
        kind: str,
        encode: Callable[[list[Item], BatchRecord], Sequence[torch.Tensor]],
        batch: list[Item],
        size: int,
        record: BatchRecord,
        num_samples: int,
    ) -> Future[Sequence[torch.Tensor]]:
        job = partial(self._halving, kind, encode, batch, size, record)
        if self._on_done is not None:
            job = partial(self._telling, job, partial(self._on_done, kind, num_samples))
        if self._threads is None:
            done: Future[Sequence[torch.Tensor]] = Future()
            done.set_result(job())
            return done
        while self._running and self._running[0].done():
            self._running.popleft()
        if len(self._running) >= _BATCHES_AHEAD * self._num_threads:
            with record.times.busy("wait_for_encoders"):
                self._running.popleft().result()
        future = self._threads.submit(job)
        self._running.append(future)
        return future

    def _telling(
        self, job: Callable[[], Sequence[torch.Tensor]], tell: Callable[[float], None]
    ) -> Sequence[torch.Tensor]:
        """What `job` returns; `tell` gets its seconds as soon as its results are on the host."""
        if self._watcher is None:
            started = time.perf_counter()
            results = job()
            tell(time.perf_counter() - started)
            return results
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True, blocking=True)
        begin.record()
        results = job()
        end.record(self._copies_out)
        self._watcher.submit(_tell_when_done, begin, end, tell)
        return results

    def _halving(
        self,
        kind: str,
        encode: Callable[[list[Item], BatchRecord], Sequence[torch.Tensor]],
        batch: list[Item],
        size: int,
        record: BatchRecord,
    ) -> Sequence[torch.Tensor]:
        """`encode`, of half the batch at a time where memory doesn't suffice for the whole."""
        if len(batch) <= self._fits.get((kind, size), len(batch)):
            try:
                return encode(batch, record)
            except torch.OutOfMemoryError as error:
                if len(batch) == 1:
                    raise UserError(
                        f"{self.device} has too little memory for one sample's {kind}: {' '.join(str(error).split())}"
                    ) from error
            # Only now, when the traceback no longer holds what the failed batch had allocated.
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        middle = (len(batch) + 1) // 2
        self._fits[kind, size] = min(middle, self._fits.get((kind, size), middle))
        record.halved.append(f"{len(batch)} {kind}")
        halves = batch[:middle], batch[middle:]
        return [result for half in halves for result in self._halving(kind, encode, half, size, record)]

    def _frames(self, batch: list[np.ndarray], record: BatchRecord) -> Sequence[torch.Tensor]:
        frames = self._to_device(torch.from_numpy(np.stack(batch)))
        with record.times.busy("tokenizer", self.device):
            encode = self._tokenizer.encode_compiled if self._is_full(frames.shape) else self._tokenizer.encode
            latents = encode(frames)
        return self._to_host(latents).unbind()

    def _is_full(self, shape: torch.Size) -> bool:
        """A batch that was halved for lack of memory is none either."""
        size, *pixels, _ = shape
        budget = self._compile_full_batches
        return budget is not None and (size + 1) * math.prod(pixels) > budget

    def _tokens(self, batch: list[list[int]], record: BatchRecord) -> Sequence[torch.Tensor]:
        with record.times.busy("text_encoder", self.device):
            flat = torch.cat(self._text_encoder.encode_tokens(batch))
        # One copy for the whole batch; the captions' own rows are cut from it on the host.
        return self._to_host(flat).split([len(each) for each in batch])

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type != "cuda":
            return tensor
        with torch.cuda.stream(self._copies_in):
            moved = tensor.pin_memory().to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._copies_in)
        moved.record_stream(current)
        return moved

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type != "cuda":
            return tensor
        self._copies_out.wait_stream(torch.cuda.current_stream(self.device))
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        with torch.cuda.stream(self._copies_out):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._copies_out)
        return host


def _tell_when_done(begin: torch.cuda.Event, end: torch.cuda.Event, tell: Callable[[float], None]) -> None:
    end.synchronize()
    tell(begin.elapsed_time(end) / 1000)


class BatchRecord:
    """What the ledger tells of a shard's batches.

    halved: "16 frames" for each batch of 16 that the memory didn't suffice for, the one thing that may make a
        shard differ from what another machine writes
    """

    def __init__(self) -> None:
        self.times = StageTimes()
        self.halved: list[str] = []
