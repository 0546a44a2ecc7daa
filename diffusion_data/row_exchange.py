"""Rows in, numbered; results out, in the same order: what the caller of `DecodeWorkers` and its threads share.

A row waits here for a worker, a result for its turn. Results are let in up to a number of bytes.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

from diffusion_data.sources import Row


class Closed(Exception):
    """The caller is done: the attendants go home."""


class RowExchange:
    """`put`, `next_result` and `forget` are the caller's; `take`, `admit`, `finish` and `fail` the attendants'."""

    def __init__(self, num_workers: int, max_bytes: int) -> None:
        self._num_workers = num_workers
        self._max_bytes = max_bytes
        self._rows: deque[tuple[int, Row]] = deque()
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
            self._next_in += 1
            self._has_rows.notify()

    def next_result(self) -> Any:
        with self._has_result:
            self._has_result.wait_for(lambda: self._next_out in self._results or self._failure or self._closed)
            if self._next_out not in self._results:
                raise RuntimeError("the decode workers were ended") if self._failure is None else self._failure
            self._bytes.pop(self._next_out, None)
            self._next_out += 1
            self._has_room.notify_all()
            return self._results.pop(self._next_out - 1)

    def forget(self) -> None:
        """Drop what nobody will ask for; rows in work are dropped when they arrive."""
        with self._has_room:
            self._next_out = self._next_in
            for each in (self._rows, self._results, self._bytes):
                each.clear()
            self._has_room.notify_all()

    def take(self) -> tuple[int, Row]:
        """The next row, for an attendant that holds none; waits for it."""
        me = threading.get_ident()
        with self._has_rows:
            self._busy.discard(me)
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
                    self._closed or number <= self._next_out or sum(self._bytes.values()) + num_bytes <= self._max_bytes
                )
            )
            self.check_open()
            if number >= self._next_out:
                self._bytes[number] = num_bytes

    def finish(self, number: int, result: Any) -> None:
        with self._has_result:
            if number >= self._next_out:
                self._results[number] = result
            if number == self._next_out:
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
