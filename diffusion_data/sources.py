"""Parquet (file, folder, glob, fsspec URL) -> rows, as dicts of Python values, with global indices.

The rows of all files, in sorted file order, are numbered 0 .. num_rows - 1. Opening reads footers only;
`read_rows` reads a range a batch of rows at a time, and goes on in the open file when the next range follows.
"""

from __future__ import annotations

import bisect
import glob
import hashlib
import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import fsspec
import pyarrow.parquet as pq

from diffusion_data.assets import SAMPLE_PARQUET
from diffusion_data.errors import UserError
from diffusion_data.parquet_reader import ParquetReader, one_line

BUNDLED_SAMPLE = "bundled-sample"

_FOOTER_READERS = 16  # footers are small: opening them is all latency on network disks


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
    """One row of the input: `index` is global, `source_row` counts within `source_file`.

    values: Python values by column, a BadCell where there is none
    """

    index: int
    source_file: str
    source_row: int
    folder: str
    values: dict[str, Any]


class ParquetSource:
    """All rows of one or many parquet files, in sorted file order. Read by one thread; `close` when done."""

    def __init__(self, files: list[SourceFile]) -> None:
        self.files = files
        self._ends = list(accumulate(file.num_rows for file in files))
        self._kept: ParquetReader | None = None
        self._closed = False

    @classmethod
    def open(cls, path: str) -> ParquetSource:
        """Find the files and read their footers.

        Raises:
            UserError: nothing there, no parquet file in the folder, or one that is unreadable or whose name isn't
                UTF-8, by name.
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

    def row_group_start(self, row: int) -> int:
        """The first row of the row group that holds `row`: from there on, nothing is decoded in vain."""
        number = bisect.bisect_right(self._ends, row)
        start = self._ends[number] - self.files[number].num_rows
        for num_rows in self.files[number].row_group_rows:
            if row < start + num_rows:
                break
            start += num_rows
        return start

    def read_rows(self, start: int, stop: int) -> Iterator[Row]:
        """The rows of the global range [start, stop), in order.

        A range after the last one, in the same row group, is read on to: opening anew would decode the
        row group from its start. Any other range, and any two at the same time, are read as well.
        """
        index = start
        while index < stop:
            number = bisect.bisect_right(self._ends, index)
            file = self.files[number]
            first_of_file = self._ends[number] - file.num_rows
            last = min(stop - first_of_file, file.num_rows)
            reader = self._take_reader(file, index - first_of_file)
            try:
                for source_row, values in reader.rows(index - first_of_file, last):
                    yield Row(
                        index=first_of_file + source_row,
                        source_file=file.name,
                        source_row=source_row,
                        folder=file.folder,
                        values=values,
                    )
            except GeneratorExit:  # whoever reads has had enough, maybe only for now
                self._keep(reader)
                raise
            except BaseException:  # raised again, once the file is closed
                reader.close()
                raise
            self._keep(reader)
            index = first_of_file + last

    def close(self) -> None:
        """Close the file that was kept open. Rows can still be read, but no file is kept open any more."""
        self._closed = True
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def _take_reader(self, file: SourceFile, start: int) -> ParquetReader:
        """The kept reader where it helps. Its new owner has it alone, so ranges read in turns don't mix."""
        kept, self._kept = self._kept, None
        if kept is not None:
            if kept.url == file.url and kept.comes_to(start):
                return kept
            kept.close()
        reader = ParquetReader(file.url, file.row_group_rows, start)
        if reader.num_bytes_now != file.num_bytes:
            reader.close()
            fewer = reader.num_rows_now < file.num_rows
            now = f"only {reader.num_rows_now} rows" if fewer else f"{reader.num_bytes_now} bytes"
            raise UserError(f"source.path: {file.url} has changed: it has {now} now, and had others when the run began")
        return reader

    def _keep(self, reader: ParquetReader) -> None:
        if self._closed or self._kept is not None or reader.next_row == reader.num_rows:
            reader.close()
        else:
            self._kept = reader


def _find(path: str) -> tuple[fsspec.AbstractFileSystem, list[str]]:
    try:
        filesystem, root = fsspec.core.url_to_fs(path)
        if filesystem.isdir(root):
            found = filesystem.find(root)
        elif filesystem.exists(root):
            return filesystem, [root]
        elif glob.has_magic(root):
            found = filesystem.glob(_literal_folder(filesystem, root))
        else:
            raise UserError(f"source.path: there is nothing at {path}")
    except UserError:
        raise
    except Exception as error:  # what a URL's filesystem raises is its client library's choice
        raise UserError(f"source.path: can't look into {path}: {one_line(error)}") from error
    below = len(posixpath.commonpath([posixpath.dirname(each) for each in found])) if found else 0
    paths = sorted(each for each in found if _is_data(each[below:]))
    if not paths:
        raise UserError(f"source.path: no .parquet file in {path}, which has {len(found)} other files")
    return filesystem, paths


def _literal_folder(filesystem: fsspec.AbstractFileSystem, pattern: str) -> str:
    """The pattern with what names a folder that is there escaped: data[1]/*.parquet is about data[1]."""
    folder = posixpath.dirname(pattern)
    while glob.has_magic(folder):
        if filesystem.isdir(folder):
            return glob.escape(folder) + pattern.removeprefix(folder)
        folder = posixpath.dirname(folder)
    return pattern


def _is_data(path: str) -> bool:
    """By rule: files named .parquet; nothing hidden or with an underscore, which are others' (_SUCCESS, .cache)."""
    return path.endswith(".parquet") and not any(part.startswith(("_", ".")) for part in path.split("/"))


def _read_footer(filesystem: fsspec.AbstractFileSystem, path: str, shared: str) -> SourceFile:
    url = filesystem.unstrip_protocol(path) if "file" not in filesystem.protocol else path
    name = posixpath.relpath(path, shared)
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"source.path: the name {name!r} is not UTF-8, as samples' json needs it; rename it") from error
    try:
        with filesystem.open(path, "rb") as file:
            metadata = pq.read_metadata(file)
            num_bytes = file.seek(0, 2)
            file.seek(num_bytes - 8 - metadata.serialized_size)
            footer = file.read(metadata.serialized_size)
            row_group_rows = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
            if min(row_group_rows, default=0) < 0 or sum(row_group_rows) != metadata.num_rows:
                raise ValueError(f"its footer says {metadata.num_rows} rows, its row groups {sum(row_group_rows)}")
    except Exception as error:  # pyarrow's, or the client library's of a URL's filesystem
        raise UserError(f"source.path: {url} is not a readable parquet file: {one_line(error)}") from error
    return SourceFile(
        url=url,
        name=name,
        num_bytes=num_bytes,
        row_group_rows=row_group_rows,
        columns=tuple(metadata.schema.to_arrow_schema().names),
        footer_sha256=hashlib.sha256(footer).hexdigest(),
    )
