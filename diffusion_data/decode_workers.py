"""Rows -> decoded or rejected rows, in order, from worker processes that run ahead.

Order in is order out, so what is batched later depends on the rows alone, not on which worker was quick.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

from pebble import ProcessExpired, ProcessPool

from diffusion_data.errors import Reason
from diffusion_data.process_server import process_context
from diffusion_data.row_decoder import DecodedRow, RejectedRow, RowDecoder
from diffusion_data.sources import Row

_RUN_AHEAD_ROWS = 16  # per worker: covers a row that takes as long as 16 others
_RUN_AHEAD_BYTES = 2 << 30  # of decoded frames waiting in this process
_TRIES = 2  # of a row whose worker died: the machine may have been short of memory just then

Tag = TypeVar("Tag")


class DecodeWorkers:
    """A pool of decode processes, used as a context manager.

    num_workers = 0 decodes in this process. A worker that is killed costs the row that it held, which is
    tried again and then rejected as `worker_killed`; the pool replaces the worker.
    """

    def __init__(self, decoder: RowDecoder, num_workers: int) -> None:
        self._decoder = decoder
        self._num_workers = num_workers
        self._pool: ProcessPool | None = None

    def __enter__(self) -> DecodeWorkers:
        if self._num_workers:
            self._pool = ProcessPool(
                max_workers=self._num_workers,
                initializer=_start_worker,
                initargs=(self._decoder, os.getpid()),
                context=process_context(),
            )
            self._pool.schedule(_nothing).result()  # until one is up: starting is not decoding
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()

    def map(self, rows: Iterable[tuple[Tag, Row]]) -> Iterator[tuple[Tag, DecodedRow | RejectedRow]]:
        """Decode tagged rows; yields (tag, result) in the order of `rows`.

        Reads `rows` only as far ahead as the workers need, bounded in rows and in bytes of frames.
        """
        if self._pool is None:
            for tag, row in rows:
                yield tag, self._decoder(row)
            return
        waiting: deque[tuple[Tag, Row, Future]] = deque()
        largest_bytes = 1
        source = iter(rows)
        exhausted = False
        while True:
            limit = min(_RUN_AHEAD_ROWS * self._num_workers, _RUN_AHEAD_BYTES // largest_bytes)
            while not exhausted and len(waiting) < max(limit, self._num_workers + 1):
                entry = next(source, None)
                if entry is None:
                    exhausted = True
                else:
                    waiting.append((*entry, self._pool.schedule(_decode_in_worker, args=[entry[1]])))
            if not waiting:
                return
            tag, row, future = waiting.popleft()
            result = self._result(row, future)
            if isinstance(result, DecodedRow):
                largest_bytes = max(largest_bytes, result.pixels.nbytes)
            yield tag, result

    def _result(self, row: Row, future: Future) -> DecodedRow | RejectedRow:
        assert self._pool is not None
        deaths = 0
        while True:
            try:
                return future.result()
            except ProcessExpired as death:
                deaths += 1
                if deaths == _TRIES:
                    return RejectedRow(
                        row=row.index,
                        source_file=row.source_file,
                        source_row=row.source_row,
                        reason=Reason.worker_killed,
                        message=f"its worker died {_TRIES} times, last with exit code {death.exitcode}",
                    )
            future = self._pool.schedule(_decode_in_worker, args=[row])


_decode: Callable[[Row], DecodedRow | RejectedRow]


def _start_worker(decoder: RowDecoder, parent: int) -> None:
    """Set up a worker process: one thread, deaf to Ctrl-C (the parent ends it), gone with its parent."""
    global _decode
    _decode = decoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    """A rank that is killed can't stop its workers, and they would wait for work for ever."""
    while True:
        try:
            os.kill(parent, 0)
        except OSError:  # no such process, or its number now belongs to somebody else's
            os._exit(1)
        time.sleep(1.0)


def _nothing() -> None:
    """A task that any worker that has started can do."""


def _decode_in_worker(row: Row) -> DecodedRow | RejectedRow:
    return _decode(row)
