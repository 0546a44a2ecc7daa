"""Rows in, numbered; results out, in the same order: what the caller of `DecodeWorkers` and its threads share.

A row waits here for a worker, a result for its turn; both up to a number of bytes.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from diffusion_data.sources import Row


class Closed(Exception):
    """The caller is done: the attendants go home."""


class RowExchange:
    """`take`, `admit`, `finish` and `fail` are the attendants', the rest is the caller's.

    max_row_bytes: of rows that have no result yet, those in work too
    max_result_bytes: of the arrays of results
    """

    def __init__(self, num_workers: int, *, max_row_bytes: int, max_result_bytes: int) -> None:
        self._num_workers = num_workers
        self._max_row_bytes = max_row_bytes
        self._max_result_bytes = max_result_bytes
        self._rows: deque[tuple[int, Row]] = deque()
        self._row_bytes: dict[int, int] = {}  # of the rows that have no result yet
        self._results: dict[int, Any] = {}
        self._bytes: dict[int, int] = {}  # of the results that are here or on their way in
        self._next_in = self._next_out = 0
        self._busy: set[int] = set()  # attendants that hold a row
        self._failure: BaseException | None = None
        self._closed = False
        lock = threading.RLock()
        self._has_rows, self._has_room, self._has_result = (threading.Condition(lock) for _ in range(3))

    def put(self, row: Row) -> None:
        with self._has_rows:
            self._rows.append((self._next_in, row))
            self._row_bytes[self._next_in] = _num_bytes(row.values)
            self._next_in += 1
            self._has_rows.notify()

    def has_room(self) -> bool:
        """For one more row. A worker that has none always gets one, however large they are."""
        with self._has_rows:
            return not self._is_full() or self.has_idle_worker()

    def has_idle_worker(self) -> bool:
        """Whether a worker has nothing to do, and no row waits for it."""
        with self._has_rows:
            return len(self._rows) < self._num_workers - len(self._busy)

    def has_result(self) -> bool:
        """Whether the one whose turn it is has come."""
        with self._has_result:
            return self._next_out in self._results

    def next_result(self, row_is_due: Callable[[], bool]) -> Any:
        """Wait for the result whose turn it is; None if row_is_due() before it comes.

        row_is_due is asked again whenever `has_room` or `has_idle_worker` may have become true.
        Raises what an attendant failed with.
        """
        with self._has_result:
            self._has_result.wait_for(lambda: self.has_result() or self._failure or self._closed or row_is_due())
            if not self.has_result():
                if self._failure is None and not self._closed:
                    return None
                raise RuntimeError("the decode workers were ended") if self._failure is None else self._failure
            self._bytes.pop(self._next_out, None)
            self._next_out += 1
            self._has_room.notify_all()
            return self._results.pop(self._next_out - 1)

    def forget(self) -> None:
        """Drop what nobody will ask for; rows in work are dropped when they arrive."""
        with self._has_room:
            self._next_out = self._next_in
            for each in (self._rows, self._row_bytes, self._results, self._bytes):
                each.clear()
            self._has_room.notify_all()

    def take(self) -> tuple[int, Row]:
        """The next row, for an attendant that holds none; waits for it."""
        me = threading.get_ident()
        with self._has_rows:
            self._busy.discard(me)
            if self.has_idle_worker():
                self._has_result.notify()
            self._has_rows.wait_for(lambda: self._rows or self._closed)
            self.check_open()
            self._busy.add(me)
            return self._rows.popleft()

    def take_another(self) -> tuple[int, Row] | None:
        """A row to have in reserve, if there are enough for the workers that have none."""
        with self._has_rows:
            return self._rows.popleft() if len(self._rows) > self._num_workers - len(self._busy) else None

    def admit(self, number: int, num_bytes: int) -> None:
        """Wait for room for a result. The next in turn always has it, so that all get theirs in the end.

        Attendants work in the order in which they took rows, so the next in turn is never behind another.
        """
        with self._has_room:
            self._bytes.pop(number, None)  # its worker died while it was read
            self._has_room.wait_for(
                lambda: (
                    self._closed
                    or number <= self._next_out
                    or sum(self._bytes.values()) + num_bytes <= self._max_result_bytes
                )
            )
            self.check_open()
            if number >= self._next_out:
                self._bytes[number] = num_bytes

    def finish(self, number: int, result: Any) -> None:
        with self._has_result:
            was_full = self._is_full()
            self._row_bytes.pop(number, None)
            if number >= self._next_out:
                self._results[number] = result
            if number == self._next_out or was_full:
                self._has_result.notify()

    def fail(self, error: BaseException) -> None:
        with self._has_result:
            self._failure = self._failure or error
            self._has_result.notify()

    def close(self) -> None:
        with self._has_rows:
            self._closed = True
            for each in (self._has_rows, self._has_room, self._has_result):
                each.notify_all()

    def check_open(self) -> None:
        if self._closed:
            raise Closed

    def _is_full(self) -> bool:
        return sum(self._row_bytes.values()) >= self._max_row_bytes


def _num_bytes(value: Any) -> int:
    """Of what a row's values hold: media of many megabytes, or a path to them."""
    if isinstance(value, dict):
        return sum(map(_num_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_num_bytes, value))
    return sys.getsizeof(value)
