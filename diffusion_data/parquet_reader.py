"""A parquet file, from a row group on -> rows, as dicts of Python values; forwards only, a batch of rows in memory.

A cell that has no Python value (text that is not UTF-8, a date beyond the calendar) becomes a BadCell.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from diffusion_data.errors import UserError

_ROWS_PER_READ = 16  # rows decoded from a row group at a time: rows may hold pictures of megabytes
_LOCAL_BUFFER_BYTES = 1 << 20  # of each column: a row group may be larger than memory, so it is never read whole
_REMOTE_BUFFER_BYTES = 8 << 20  # each fill is a request
_UNCONVERTIBLE = (ArithmeticError, ImportError, LookupError, TypeError, ValueError, pa.ArrowException)  # by as_py


@dataclass(frozen=True)
class BadCell:
    """Stands for a value that can't be had; whoever uses the column rejects the row, others need not care."""

    message: str


class ParquetReader:
    """An open file, whose rows are read forwards only, from the row group of `start` on."""

    def __init__(self, url: str, row_group_rows: Sequence[int], start: int) -> None:
        self.url = url
        self.num_rows = sum(row_group_rows)
        self._group_rows = row_group_rows
        self._group_ends = list(accumulate(row_group_rows))
        group = bisect.bisect_right(self._group_ends, start)
        self.next_row = self._group_start(start)
        self._batch_start = self._batch_end = self.next_row
        self._batch: pa.RecordBatch | None = None
        filesystem, path = fsspec.core.url_to_fs(url)
        buffer_bytes = _LOCAL_BUFFER_BYTES if "file" in filesystem.protocol else _REMOTE_BUFFER_BYTES
        try:
            # no cache of fsspec's: reads of one column would evict the other columns', at every turn
            self._opened = filesystem.open(path, "rb", cache_type="none")
        except OSError as error:
            raise self._error(error) from error
        try:
            parquet = pq.ParquetFile(self._opened, pre_buffer=False, buffer_size=buffer_bytes)
            self.num_rows_now, self.num_bytes_now = parquet.metadata.num_rows, self._opened.seek(0, 2)
            groups = list(range(group, parquet.num_row_groups))
            self._batches = parquet.iter_batches(batch_size=_ROWS_PER_READ, row_groups=groups)
        except BaseException as error:
            self.close()
            if isinstance(error, (OSError, pa.ArrowException)):
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
            for values in _python_values(self._batch.slice(first, last - first)):
                self.next_row += 1
                yield self.next_row - 1, values

    def close(self) -> None:
        self._opened.close()

    def _read_batch(self) -> None:
        try:
            batch = next(self._batches, None)
        except Exception as error:  # pyarrow's, or the client library's of a URL's filesystem
            raise self._error(error) from error
        if batch is None:
            raise UserError(f"source.path: {self.url} has changed: it has only {self._batch_end} rows now")
        self._batch, self._batch_start = batch, self._batch_end
        self._batch_end += len(batch)

    def _group_start(self, row: int) -> int:
        group = bisect.bisect_right(self._group_ends, row)
        return self._group_ends[group] - self._group_rows[group]

    def _error(self, error: BaseException) -> UserError:
        place = f"{self.url} can't be read from row {self._batch_end} on"
        return UserError(f"source.path: {place}: {one_line(error)}")


def _python_values(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except _UNCONVERTIBLE:
        cells = [[_cell(column, i) for i in range(len(batch))] for column in batch.columns]
        return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*cells, strict=True)]


def _cell(column: pa.Array, place: int) -> Any:
    try:
        return column[place].as_py()
    except _UNCONVERTIBLE as error:
        return BadCell(one_line(error))


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
