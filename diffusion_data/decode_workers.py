"""Rows -> decoded or rejected rows, in order, from worker processes that run ahead.

    rows ─ map ─▶ RowExchange ◀─▶ _Attendant (a thread) ◀─ pipe ─▶ WorkerProcess
                    └─ results, in order ─▶ map's caller

Order in is order out, so what is batched later depends on the rows alone, not on which worker was quick.
Each worker has its own pipe and its own thread here: a worker that dies, at whatever moment, concerns nobody else.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, TypeVar

from diffusion_data.decode_worker_process import Raised, WorkerDied, WorkerProcess, WorkerTraceback
from diffusion_data.decoded_row import DecodedRow, RejectedRow
from diffusion_data.errors import Reason, UserError
from diffusion_data.row_exchange import Closed, RowExchange
from diffusion_data.sources import Row

_RUN_AHEAD_ROWS = 16  # per worker: covers a row that takes as long as 16 others
_ROWS_IN_STOCK = 2  # per worker, when another group is begun: one in work, and one for the caller meanwhile
_ROW_BYTES = 256 << 20  # of rows that wait or are in work: media may lie in them; at least a row for each worker
_RUN_AHEAD_BYTES = 2 << 30  # of decoded frames waiting in this process
_ROWS_HELD = 2  # by a worker: the one in work, and the one that it goes on with
_TRIES = 2  # of a row whose worker died: the machine may have been short of memory just then
_START_TRIES = 3  # of a worker
_SECONDS_OF_ONE_WAIT = 1.0

Tag = TypeVar("Tag")
Decoder = Callable[[Row], "DecodedRow | RejectedRow"]


class DecodeWorkers:
    """A set of decode processes, used as a context manager.

    num_workers = 0 decodes in this process. A worker that dies is replaced; the row it worked on is tried
    again and then rejected as `worker_killed`. row_timeout_seconds: a row that takes longer costs its worker
    and is rejected as `timeout`; a worker's first row includes importing the process function.
    """

    def __init__(self, decoder: Decoder, num_workers: int, row_timeout_seconds: float | None = None) -> None:
        if row_timeout_seconds is not None and not num_workers:
            raise ValueError("row_timeout_seconds needs worker processes: without them nothing can be stopped")
        self._decoder = decoder
        self._exchange = RowExchange(num_workers, max_row_bytes=_ROW_BYTES, max_result_bytes=_RUN_AHEAD_BYTES)
        self._attendants = [_Attendant(self._exchange, decoder, row_timeout_seconds) for _ in range(num_workers)]

    def __enter__(self) -> DecodeWorkers:
        for attendant in self._attendants:
            attendant.start()
        for attendant in self._attendants[:1]:
            attendant.ready.wait()  # starting is not decoding, for those who measure
        return self

    def __exit__(self, *exception: object) -> None:
        self._exchange.close()
        running = [attendant for attendant in self._attendants if attendant.ident is not None]
        while running:
            for attendant in running:
                attendant.kill_worker()  # again, for it may just have been replaced
            running[0].join(0.05)
            running = [attendant for attendant in running if attendant.is_alive()]

    def map(self, rows: Iterable[tuple[Tag, Row]]) -> Iterator[tuple[Tag, DecodedRow | RejectedRow]]:
        """Decode tagged rows; yields (tag, result) in the order of `rows`. One call at a time.

        Reads `rows` only as far ahead as the workers need, bounded in rows, in their bytes and in bytes of frames.
        Raises what `rows` raises, and what the decoder raises, at that row's place in the order.
        """
        return self.map_groups([rows])

    def map_groups(self, groups: Iterable[Iterable[tuple[Tag, Row]]]) -> Iterator[tuple[Tag, DecodedRow | RejectedRow]]:
        """`map` for the rows of one group after the other, where a group that was asked for is nobody else's.

        So the next one is asked for as late as the caller isn't kept waiting by it: when a worker has nothing to do,
        and the caller is waiting, or is about to be.
        """
        if not self._attendants:
            for tag, row in chain.from_iterable(groups):
                yield tag, self._decode_here(row)
            return
        ahead = _RunAhead(groups, self._exchange, len(self._attendants))
        try:
            while True:
                while ahead.row_is_due():
                    ahead.read()
                if not ahead.tags:
                    return
                result = self._exchange.next_result(ahead.row_is_due)
                if isinstance(result, Raised):
                    raise result.error from WorkerTraceback(f"\n{result.traceback}")
                if result is not None:
                    yield ahead.tags.popleft(), result
        finally:
            self._exchange.forget()

    def _decode_here(self, row: Row) -> DecodedRow | RejectedRow:
        try:
            return self._decoder(row)
        except MemoryError as error:  # what would end a worker must not end the job
            return _rejected(row, Reason.worker_killed, f"without workers: {error!r}")


class _RunAhead(Generic[Tag]):
    """Reads the rows of groups into the exchange, as far ahead as is due.

    tags: of the rows on their way, whose results are still to be had, in order
    """

    def __init__(self, groups: Iterable[Iterable[tuple[Tag, Row]]], exchange: RowExchange, num_workers: int) -> None:
        self.tags: deque[Tag] = deque()
        self._groups = iter(groups)
        self._rows: Iterator[tuple[Tag, Row]] | None = None  # of the group that was asked for last, if it has more
        self._exhausted = False
        self._exchange = exchange
        self._max_rows = _RUN_AHEAD_ROWS * num_workers
        self._stock = _ROWS_IN_STOCK * num_workers

    def row_is_due(self) -> bool:
        if self._exhausted or len(self.tags) >= self._max_rows or not self._exchange.has_room():
            return False
        return self._rows is not None or self._group_is_due()

    def _group_is_due(self) -> bool:
        if not self.tags:
            return True
        running_out = len(self.tags) < self._stock or not self._exchange.has_result()
        return running_out and self._exchange.has_idle_worker()

    def read(self) -> None:
        """A row, unless the group, or the last of the groups, turns out to be at its end."""
        if self._rows is None:
            group = next(self._groups, None)
            if group is None:
                self._exhausted = True
                return
            self._rows = iter(group)
        entry = next(self._rows, None)
        if entry is None:
            self._rows = None
            return
        tag, row = entry
        self.tags.append(tag)
        self._exchange.put(row)


@dataclass
class _HeldRow:
    """A row that an attendant took.

    sent: to the worker that is there now
    waited_seconds: for its result, of this worker
    deaths: of workers, that it has cost
    """

    number: int
    row: Row
    sent: bool = False
    waited_seconds: float = 0.0
    deaths: int = 0


class _Attendant(threading.Thread):
    """Keeps one worker process busy, takes its results, replaces it when it dies."""

    def __init__(self, exchange: RowExchange, decoder: Decoder, row_timeout_seconds: float | None) -> None:
        super().__init__(name="decode worker attendant", daemon=True)
        self._exchange = exchange
        self._decoder = decoder
        self._timeout_seconds = row_timeout_seconds
        self._worker: WorkerProcess | None = None
        self.ready = threading.Event()  # it works, or has failed
        self._held: deque[_HeldRow] = deque()  # the first is the one in work

    def run(self) -> None:
        try:
            self._start_worker()
            self.ready.set()
            while True:
                self._step()
        except Closed:
            pass
        except BaseException as error:  # noqa: BLE001 - the caller's thread raises it
            self._exchange.fail(error if isinstance(error, Exception) else RuntimeError(repr(error)))
        finally:
            self.ready.set()
            self.kill_worker()
            if self._worker is not None:
                self._worker.end()

    def kill_worker(self) -> None:
        worker = self._worker
        if worker is not None:
            worker.kill()

    def _step(self) -> None:
        assert self._worker is not None
        try:
            self._send_or_receive(self._worker)
        except WorkerDied:
            self._bury_worker(self._worker)

    def _send_or_receive(self, worker: WorkerProcess) -> None:
        if unsent := next((held for held in self._held if not held.sent), None):
            worker.send(unsent.row)
            unsent.sent = True
        elif not self._held:
            self._held.append(_HeldRow(*self._exchange.take()))
            if worker.has_something(0):  # it owes nothing: it died while it had nothing to do
                worker.end()
                self._start_worker()
        elif len(self._held) < _ROWS_HELD and (another := self._exchange.take_another()):
            self._held.append(_HeldRow(*another))
        else:
            self._receive(worker)

    def _receive(self, worker: WorkerProcess) -> None:
        in_work = self._held[0]
        timeout = math.inf if self._timeout_seconds is None else self._timeout_seconds
        wait_seconds = min(timeout - in_work.waited_seconds, _SECONDS_OF_ONE_WAIT)
        began = time.monotonic()
        if worker.has_something(wait_seconds):
            self._finish(worker.receive(functools.partial(self._exchange.admit, in_work.number)))
            return
        # A wait that took far too long was a stop of this process, its workers with it: no row runs out of time then.
        if time.monotonic() - began < wait_seconds + _SECONDS_OF_ONE_WAIT:
            in_work.waited_seconds += wait_seconds
        if in_work.waited_seconds < timeout:
            return
        worker.kill()
        worker.end()
        self._reject(Reason.timeout, f"not decoded after {self._timeout_seconds:g} seconds")
        self._start_worker()

    def _bury_worker(self, worker: WorkerProcess) -> None:
        """The row in work is to blame, unless it was bad luck: it gets a second try."""
        end = worker.end()
        self._exchange.check_open()  # or it was killed because the caller is done
        in_work = self._held[0]
        in_work.deaths += 1
        if in_work.deaths == _TRIES:
            self._reject(Reason.worker_killed, f"its worker died {_TRIES} times, last: {end}")
        self._start_worker()

    def _start_worker(self) -> None:
        """A new process; it will be sent the rows that the last one held."""
        for _ in range(_START_TRIES):
            self._exchange.check_open()
            self._worker = WorkerProcess(self._decoder)
            try:
                self._worker.wait_until_started()
            except WorkerDied:
                end = self._worker.end()
                continue
            for held in self._held:
                held.sent, held.waited_seconds = False, 0.0
            return
        self._exchange.check_open()
        raise UserError(f"decode workers can't be started: {_START_TRIES} died at once, the last one: {end}")

    def _reject(self, reason: Reason, message: str) -> None:
        self._finish(_rejected(self._held[0].row, reason, message))

    def _finish(self, result: Any) -> None:
        self._exchange.finish(self._held.popleft().number, result)


def _rejected(row: Row, reason: Reason, message: str) -> RejectedRow:
    return RejectedRow(
        row=row.index,
        source_file=row.source_file,
        source_row=row.source_row,
        reason=reason,
        message=message,
    )
