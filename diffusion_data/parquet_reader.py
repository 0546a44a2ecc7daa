"""A parquet file, from a row group on -> rows, as dicts of Python values; forwards only, a batch of rows in memory.

A cell that can't be had becomes a BadCell: one without a Python value (text that is not UTF-8, a date beyond the
calendar), and, where a row group is damaged, those of the damaged columns from the damage to the row group's end.
Trouble with reading the bytes, a network's for one, is no damage: it ends the run, to be tried again.
"""

from __future__ import annotations

import bisect
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from diffusion_data.errors import Reason, UserError

_ROWS_PER_READ = 16  # rows decoded from a row group at a time: rows may hold pictures of megabytes
_LOCAL_BUFFER_BYTES = 1 << 20  # of each column: a row group may be larger than memory, so it is never read whole
_REMOTE_BUFFER_BYTES = 8 << 20  # each fill is a request
_UNCONVERTIBLE = (ArithmeticError, ImportError, LookupError, TypeError, ValueError, pa.ArrowException)  # by as_py
_UNDECODABLE = (OSError, ValueError, pa.ArrowException)  # by pyarrow, which has its own words for damage, OSError too


@dataclass(frozen=True)
class BadCell:
    """Stands for a value that can't be had; whoever uses the column rejects the row, others need not care."""

    message: str
    reason: Reason = Reason.decode_error


class ParquetReader:
    """An open file, whose rows are read forwards only, from the row group of `start` on."""

    def __init__(self, url: str, row_group_rows: Sequence[int], start: int) -> None:
        self.url = url
        self.num_rows = sum(row_group_rows)
        self._group_rows = row_group_rows
        self._group_ends = list(accumulate(row_group_rows))
        self.next_row = self._group_start(start)
        self._batch_start = self._batch_end = self.next_row
        self._batch: _Batch | None = None
        self._group: _RowGroup | None = None
        filesystem, path = fsspec.core.url_to_fs(url)
        buffer_bytes = _LOCAL_BUFFER_BYTES if "file" in filesystem.protocol else _REMOTE_BUFFER_BYTES
        try:
            # no cache of fsspec's: reads of one column would evict the other columns', at every turn
            self._opened = filesystem.open(path, "rb", cache_type="none")
        except OSError as error:
            raise self._error(error) from error
        try:
            self._file = _WatchedFile(self._opened)
            self._parquet = pq.ParquetFile(
                pa.PythonFile(self._file, "r"),
                pre_buffer=False,
                buffer_size=buffer_bytes,
                page_checksum_verification=True,  # of files that have checksums
            )
            self.num_rows_now, self.num_bytes_now = self._parquet.metadata.num_rows, self._file.size
        except BaseException as error:
            self.close()
            if isinstance(error, _UNDECODABLE):
                raise self._error(error) from error
            raise

    def comes_to(self, start: int) -> bool:
        """Whether reading on gets to row `start` no later than opening the file anew would."""
        return self._group_start(start) <= self.next_row <= start

    def rows(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """(row within the file, values) of the rows [start, stop)."""
        self.next_row = start
        while self.next_row < stop:
            while self.next_row >= self._batch_end:
                self._read_batch()
            assert self._batch is not None
            first, last = self.next_row - self._batch_start, min(stop, self._batch_end) - self._batch_start
            for values in self._batch.python_values(first, last):
                self.next_row += 1
                yield self.next_row - 1, values

    def close(self) -> None:
        self._opened.close()

    def _read_batch(self) -> None:
        number = bisect.bisect_right(self._group_ends, self._batch_end)
        if self._group is None or self._group.number != number:
            self._group = self._row_group(number)
        try:
            self._batch = self._group.next_batch()
        except Exception as error:  # the client library's of a URL's filesystem
            raise self._error(error) from error
        self._batch_start = self._batch_end
        self._batch_end += self._batch.num_rows

    def _row_group(self, number: int) -> _RowGroup:
        if self._parquet.metadata.row_group(number).num_rows != self._group_rows[number]:
            raise UserError(f"source.path: {self.url} has changed: its row group {number} has other rows now")
        return _RowGroup(self._parquet, self._file, number)

    def _group_start(self, row: int) -> int:
        group = bisect.bisect_right(self._group_ends, row)
        return self._group_ends[group] - self._group_rows[group]

    def _error(self, error: BaseException) -> UserError:
        place = f"{self.url} can't be read from row {self._batch_end} on"
        return UserError(f"source.path: {place}: {one_line(error)}")


@dataclass(frozen=True)
class _Batch:
    """Some rows; damaged: instead of the columns that `columns` lacks."""

    num_rows: int
    columns: pa.Table
    damaged: dict[str, BadCell]

    def python_values(self, first: int, last: int) -> list[dict[str, Any]]:
        if not self.columns.num_columns:
            return [dict(self.damaged) for _ in range(first, last)]
        return [row | self.damaged for row in _python_values(self.columns.slice(first, last - first))]


class _RowGroup:
    """A row group, whose columns are read together, and one by one once there is damage in it.

    Its batches begin at its first row, whoever reads it: so it is always the same cells that are lost.
    """

    def __init__(self, parquet: pq.ParquetFile, file: _WatchedFile, number: int) -> None:
        self.number = number
        self._parquet = parquet
        self._file = file
        self._rows_left = self._num_rows = parquet.metadata.row_group(number).num_rows
        self._together: Iterator[pa.Table] | None = self._read(None)
        self._one_by_one: dict[str, Iterator[pa.Table]] = {}
        self._batches_done = 0
        self._damaged: dict[str, BadCell] = {}

    def next_batch(self) -> _Batch:
        """The next rows. Raises what reading the bytes raised, never what decoding them did."""
        num_rows = min(_ROWS_PER_READ, self._rows_left)
        columns = self._next_together(num_rows)
        if columns is None:
            columns = self._next_one_by_one(num_rows)
        self._rows_left -= num_rows
        self._batches_done += 1
        return _Batch(num_rows, columns, self._damaged)

    def _next_together(self, num_rows: int) -> pa.Table | None:
        if self._together is None:
            return None
        columns = self._decoded(self._together, num_rows)
        if not isinstance(columns, BadCell):
            return columns
        self._together = None
        names = dict.fromkeys(self._parquet.schema_arrow.names)
        self._one_by_one = {name: islice(self._read([name]), self._batches_done, None) for name in names}
        return None

    def _next_one_by_one(self, num_rows: int) -> pa.Table:
        columns = {}
        for name, tables in list(self._one_by_one.items()):
            decoded = self._decoded(tables, num_rows)
            if isinstance(decoded, BadCell):
                del self._one_by_one[name]
                self._damaged = {**self._damaged, name: decoded}
            else:
                columns[name] = decoded.column(name)
        return pa.table(columns)

    def _decoded(self, tables: Iterator[pa.Table], num_rows: int) -> pa.Table | BadCell:
        try:
            table = next(tables)
        except _UNDECODABLE as error:
            if self._file.trouble is not None:
                raise self._file.trouble from error
            return self._bad_cell(one_line(error))
        assert len(table) == num_rows, "one reading of a row group after the other"
        return table

    def _bad_cell(self, message: str) -> BadCell:
        return BadCell(f"row group {self.number} of the file is damaged: {message}", Reason.damaged_source)

    def _read(self, columns: list[str] | None) -> Iterator[pa.Table]:
        """The rows, _ROWS_PER_READ at a time; pyarrow splits some that hold more than 2 GB."""
        batches = self._parquet.iter_batches(batch_size=_ROWS_PER_READ, row_groups=[self.number], columns=columns)
        for start in range(0, self._num_rows, _ROWS_PER_READ):
            left = min(_ROWS_PER_READ, self._num_rows - start)
            parts = []
            while left > 0:
                batch = next(batches, None)
                if batch is None:
                    raise ValueError("it has fewer rows than its footer says")
                parts.append(batch)
                left -= len(batch)
            yield pa.Table.from_batches(parts)


class _WatchedFile(io.RawIOBase):
    """Remembers what reading raised, which pyarrow reports like damage; a read that gives too little is trouble too."""

    def __init__(self, file: BinaryIO) -> None:
        self.trouble: Exception | None = None
        self._file = file
        self.size = file.seek(0, os.SEEK_END)
        file.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        try:
            expected = max(0, self.size - self._file.tell())
            expected = expected if size < 0 else min(size, expected)
            content = self._file.read(size)
            if len(content) < expected:
                raise OSError(f"it gave {len(content)} of {expected} bytes")
        except Exception as error:
            self.trouble = error
            raise
        return content


def _python_values(table: pa.Table) -> list[dict[str, Any]]:
    try:
        return table.to_pylist()
    except _UNCONVERTIBLE:
        cells = [[_cell(column, i) for i in range(len(table))] for column in table.columns]
        return [dict(zip(table.column_names, row, strict=True)) for row in zip(*cells, strict=True)]


def _cell(column: pa.ChunkedArray, place: int) -> Any:
    try:
        return column[place].as_py()
    except _UNCONVERTIBLE as error:
        return BadCell(one_line(error))


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
