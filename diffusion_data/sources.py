"""Parquet (file, folder, glob, fsspec URL) -> rows, as dicts of Python values, with global indices.

The rows of all files, in sorted file order, are numbered 0 .. num_rows - 1. Opening reads footers only;
`read_rows` reads the row groups that a range touches, a batch of rows at a time.
"""

from __future__ import annotations

import bisect
import hashlib
import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from diffusion_data.assets import SAMPLE_PARQUET
from diffusion_data.errors import UserError

BUNDLED_SAMPLE = "bundled-sample"

_FOOTER_READERS = 16  # footers are small: opening them is all latency on network disks
_ROWS_PER_READ = 16  # rows decoded from a row group at a time: rows may hold pictures of megabytes


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """path: a parquet file, a folder of them, a glob, an fsspec URL of any (hf://, s3://), or `bundled-sample`."""

    path: str


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """What a parquet footer tells.

    name: path below the folder that all files share; it goes into metadata and the fingerprint
    footer_sha256: of the footer's bytes, which hold every row group's place and size
    """

    url: str
    name: str
    num_bytes: int
    row_group_rows: tuple[int, ...]
    columns: tuple[str, ...]
    footer_sha256: str

    @property
    def num_rows(self) -> int:
        return sum(self.row_group_rows)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> SourceFile:
        """The file again, from its `asdict` that went through json: lists become tuples."""
        lists = {name: tuple(fields[name]) for name in ("row_group_rows", "columns")}
        return cls(**{**fields, **lists})

    @property
    def folder(self) -> str:
        """Where relative media paths of its rows start."""
        return posixpath.dirname(self.url)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the input: `index` is global, `source_row` counts within `source_file`."""

    index: int
    source_file: str
    source_row: int
    folder: str
    values: dict[str, Any]


class ParquetSource:
    """All rows of one or many parquet files, in sorted file order."""

    def __init__(self, files: list[SourceFile]) -> None:
        self.files = files
        self._ends = list(accumulate(file.num_rows for file in files))

    @classmethod
    def open(cls, path: str) -> ParquetSource:
        """Find the files and read their footers.

        Raises:
            UserError: nothing there, no parquet file in the folder, or an unreadable one, by name.
        """
        filesystem, paths = _find(str(SAMPLE_PARQUET) if path == BUNDLED_SAMPLE else path)
        shared = posixpath.commonpath([posixpath.dirname(each) for each in paths])
        with ThreadPoolExecutor(_FOOTER_READERS) as readers:
            return cls(list(readers.map(lambda each: _read_footer(filesystem, each, shared), paths)))

    @property
    def num_rows(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def columns(self) -> list[str]:
        """Columns that every file has, in the first file's order."""
        common = set(self.files[0].columns).intersection(*(file.columns for file in self.files))
        return [column for column in self.files[0].columns if column in common]

    def require_columns(self, columns: dict[str, str]) -> None:
        """Check columns that the configuration names; `columns` maps a column to the option naming it."""
        for column, option in columns.items():
            for file in self.files:
                if column not in file.columns:
                    raise UserError(
                        f"{option}: there is no column {column!r} in {file.name}; "
                        f"its columns are {', '.join(file.columns)}"
                    )

    def read_rows(self, start: int, stop: int) -> Iterator[Row]:
        """The rows of the global range [start, stop), in order."""
        index = start
        while index < stop:
            number = bisect.bisect_right(self._ends, index)
            file = self.files[number]
            first_of_file = self._ends[number] - file.num_rows
            last = min(stop - first_of_file, file.num_rows)
            for source_row, values in _read_file_rows(file, index - first_of_file, last):
                yield Row(
                    index=first_of_file + source_row,
                    source_file=file.name,
                    source_row=source_row,
                    folder=file.folder,
                    values=values,
                )
            index = first_of_file + last


def _find(path: str) -> tuple[fsspec.AbstractFileSystem, list[str]]:
    try:
        filesystem, root = fsspec.core.url_to_fs(path)
        if any(character in root for character in "*?["):
            found = filesystem.glob(root)
        elif filesystem.isdir(root):
            found = filesystem.find(root)
        elif filesystem.exists(root):
            return filesystem, [root]
        else:
            raise UserError(f"source.path: there is nothing at {path}")
    except UserError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"source.path: can't look into {path}: {_one_line(error)}") from error
    below = len(posixpath.commonpath([posixpath.dirname(each) for each in found])) if found else 0
    paths = sorted(each for each in found if _is_data(each[below:]))
    if not paths:
        raise UserError(f"source.path: no .parquet file in {path}, which has {len(found)} other files")
    return filesystem, paths


def _is_data(path: str) -> bool:
    """By rule: files named .parquet; nothing hidden or with an underscore, which are others' (_SUCCESS, .cache)."""
    return path.endswith(".parquet") and not any(part.startswith(("_", ".")) for part in path.split("/"))


def _read_footer(filesystem: fsspec.AbstractFileSystem, path: str, shared: str) -> SourceFile:
    url = filesystem.unstrip_protocol(path) if "file" not in filesystem.protocol else path
    try:
        with filesystem.open(path, "rb") as file:
            metadata = pq.read_metadata(file)
            num_bytes = file.seek(0, 2)
            file.seek(num_bytes - 8 - metadata.serialized_size)
            footer = file.read(metadata.serialized_size)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors or OSErrors
        raise UserError(f"source.path: {url} is not a readable parquet file: {_one_line(error)}") from error
    return SourceFile(
        url=url,
        name=posixpath.relpath(path, shared),
        num_bytes=num_bytes,
        row_group_rows=tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)),
        columns=tuple(metadata.schema.to_arrow_schema().names),
        footer_sha256=hashlib.sha256(footer).hexdigest(),
    )


def _read_file_rows(file: SourceFile, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row within the file, values) of the rows [start, stop), from the row groups they lie in."""
    group_ends = list(accumulate(file.row_group_rows))
    first_group = bisect.bisect_right(group_ends, start)
    last_group = bisect.bisect_left(group_ends, stop)
    source_row = group_ends[first_group] - file.row_group_rows[first_group]
    try:
        with fsspec.open(file.url, "rb") as opened:
            batches = pq.ParquetFile(opened).iter_batches(
                batch_size=_ROWS_PER_READ, row_groups=list(range(first_group, last_group + 1))
            )
            for batch in batches:
                skipped = min(max(start - source_row, 0), len(batch))
                wanted = batch.slice(skipped, min(stop - source_row, len(batch)) - skipped)
                yield from enumerate(wanted.to_pylist(), source_row + skipped)
                source_row += len(batch)
                if source_row >= stop:
                    return
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"source.path: {file.url} can't be read from row {source_row} on: {_one_line(error)}"
        ) from error


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
