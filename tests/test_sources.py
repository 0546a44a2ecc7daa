"""Parquet -> rows with global indices, whatever the files' number, row groups and layout."""

from __future__ import annotations

import errno
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffusion_data import parquet_reader, sources
from diffusion_data.errors import Reason, UserError
from diffusion_data.parquet_reader import BadCell, ParquetReader
from diffusion_data.sources import ParquetSource, SourceFile


def write(path: Path, values: list[int], row_group_size: int = 3) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"value": values, "caption": [f"row {value}" for value in values]})
    pq.write_table(table, path, row_group_size=row_group_size)


@pytest.fixture
def three_files(tmp_path: Path) -> Path:
    write(tmp_path / "b.parquet", list(range(10, 15)))
    write(tmp_path / "a.parquet", list(range(10)))
    write(tmp_path / "sub" / "c.parquet", list(range(15, 22)))
    return tmp_path


def values_of(source: ParquetSource, start: int, stop: int) -> list[int]:
    return [row.values["value"] for row in source.read_rows(start, stop)]


def test_rows_of_a_folder_are_numbered_in_sorted_file_order(three_files: Path) -> None:
    source = ParquetSource.open(str(three_files))
    assert [file.name for file in source.files] == ["a.parquet", "b.parquet", "sub/c.parquet"]
    assert source.num_rows == 22
    assert values_of(source, 0, 22) == list(range(22))
    assert [row.index for row in source.read_rows(0, 22)] == list(range(22))


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (2, 4), (3, 6), (9, 11), (8, 17), (21, 22), (5, 5)])
def test_a_range_reads_exactly_its_rows_across_row_groups_and_files(three_files: Path, start: int, stop: int) -> None:
    assert values_of(ParquetSource.open(str(three_files)), start, stop) == list(range(start, stop))


def test_a_row_knows_its_file_its_place_there_and_its_folder(three_files: Path) -> None:
    (row,) = ParquetSource.open(str(three_files)).read_rows(16, 17)
    assert (row.index, row.source_file, row.source_row) == (16, "sub/c.parquet", 1)
    assert row.folder == str(three_files / "sub")
    assert row.values == {"value": 16, "caption": "row 16"}


def test_a_single_file_and_a_glob_are_sources_too(three_files: Path) -> None:
    assert values_of(ParquetSource.open(str(three_files / "b.parquet")), 0, 5) == [10, 11, 12, 13, 14]
    assert ParquetSource.open(str(three_files / "*.parquet")).num_rows == 15


def test_an_fsspec_url_is_read_like_a_path(three_files: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/set/x.parquet", (three_files / "a.parquet").read_bytes())
    source = ParquetSource.open("memory://set/x.parquet")
    assert values_of(source, 2, 5) == [2, 3, 4]
    assert source.files[0].folder.startswith("memory://")


def test_hidden_underscore_and_foreign_files_are_no_part_of_a_folder(three_files: Path) -> None:
    (three_files / "_SUCCESS").write_text("")
    (three_files / "notes.txt").write_text("no parquet")
    write(three_files / "_temporary" / "x.parquet", [99])
    write(three_files / ".cache" / "x.parquet", [99])
    assert ParquetSource.open(str(three_files)).num_rows == 22


def test_a_source_survives_the_way_through_json(three_files: Path) -> None:
    import json
    from dataclasses import asdict

    source = ParquetSource.open(str(three_files))
    sent = json.loads(json.dumps([asdict(file) for file in source.files]))
    assert [SourceFile.from_json(file) for file in sent] == source.files


def test_a_replaced_file_of_the_same_size_has_another_footer_digest(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", [1, 2, 3])
    before = ParquetSource.open(str(tmp_path)).files[0]
    write(tmp_path / "x.parquet", [1, 2, 4])
    after = ParquetSource.open(str(tmp_path)).files[0]
    assert before.num_bytes == after.num_bytes
    assert before.footer_sha256 != after.footer_sha256


def test_a_missing_column_is_named_with_the_option_and_the_columns_there_are(three_files: Path) -> None:
    source = ParquetSource.open(str(three_files))
    with pytest.raises(UserError, match=r"process_func\.media_column.*'image' in a\.parquet.*value, caption"):
        source.require_columns({"image": "process_func.media_column"})


def test_nothing_there_is_an_error_that_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing at .*missing"):
        ParquetSource.open(str(tmp_path / "missing"))
    (tmp_path / "readme.md").write_text("")
    with pytest.raises(UserError, match=r"no \.parquet file in"):
        ParquetSource.open(str(tmp_path))


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    write(tmp_path / "good.parquet", [1])
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "good.parquet").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"torn\.parquet is not a readable parquet file"):
        ParquetSource.open(str(tmp_path))


# Damage


def damage(path: Path, row_group: int, column: str) -> None:
    """Overwrite the middle of a column's bytes in a row group."""
    metadata = pq.read_metadata(path).row_group(row_group)
    chunk = next(c for c in map(metadata.column, range(metadata.num_columns)) if c.path_in_schema == column)
    raw = bytearray(path.read_bytes())
    first = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)))
    raw[first : first + 60] = b"\xff" * 60
    path.write_bytes(raw)


def test_a_name_that_is_not_utf_8_is_refused_before_it_is_to_be_written(three_files: Path) -> None:
    odd = three_files / os.fsdecode(b"caf\xe9.parquet")
    try:
        write(three_files / "x.parquet", [1])
        (three_files / "x.parquet").rename(odd)
    except OSError:
        pytest.skip("this file system has no such names")
    with pytest.raises(UserError, match=r"source\.path: the name 'caf\\udce9\.parquet' is not UTF-8"):
        ParquetSource.open(str(three_files))


def write_pages(path: Path, num_rows: int = 300, row_group_size: int = 100, **options: Any) -> None:
    """Rows of three columns, eight to a page."""
    table = pa.table({name: [f"{name}{row:05d}" for row in range(num_rows)] for name in ("a", "b", "c")})
    options = {"use_dictionary": False, "data_page_size": 1, "write_batch_size": 8, "compression": "none", **options}
    pq.write_table(table, path, row_group_size=row_group_size, **options)


def lost(path: Path, start: int, stop: int) -> dict[str, set[int]]:
    """The rows that are damaged, by column; every row is there and has every other cell."""
    found: dict[str, set[int]] = {"a": set(), "b": set(), "c": set()}
    rows = list(ParquetSource.open(str(path)).read_rows(start, stop))
    assert [row.index for row in rows] == list(range(start, stop))
    for row in rows:
        assert set(row.values) == {"a", "b", "c"}
        for name, value in row.values.items():
            if isinstance(value, BadCell):
                assert value.reason is Reason.damaged_source
                found[name].add(row.index)
            else:
                assert value == f"{name}{row.index:05d}"
    return found


def test_damage_costs_the_cells_of_its_column_up_to_the_end_of_the_row_group(tmp_path: Path) -> None:
    write_pages(tmp_path / "x.parquet")
    damage(tmp_path / "x.parquet", 1, "b")
    assert lost(tmp_path, 0, 300) == {"a": set(), "b": set(range(100, 200)), "c": set()}
    row = next(ParquetSource.open(str(tmp_path)).read_rows(100, 101))
    assert row.values["b"].message.startswith("row group 1 of the file is damaged: OSError: ")


def test_damage_of_every_column_costs_the_row_group_and_no_other(tmp_path: Path) -> None:
    write_pages(tmp_path / "x.parquet")
    for name in "abc":
        damage(tmp_path / "x.parquet", 0, name)
    assert lost(tmp_path, 0, 300) == {name: set(range(100)) for name in "abc"}
    assert lost(tmp_path, 95, 120) == {name: set(range(95, 100)) for name in "abc"}


def test_rows_before_the_damage_are_read_and_the_same_wherever_reading_begins(tmp_path: Path) -> None:
    write_pages(tmp_path / "x.parquet", row_group_size=150)
    raw = (tmp_path / "x.parquet").read_bytes()
    place = raw.index(b"b00203") - 30  # the header of its page
    (tmp_path / "x.parquet").write_bytes(raw[:place] + b"\xff" * 25 + raw[place + 25 :])
    whole = lost(tmp_path, 0, 300)
    assert whole["a"] == whole["c"] == set()
    assert whole["b"] == set(range(min(whole["b"]), 300))
    assert 182 <= min(whole["b"]) <= 203
    for start, stop in [(0, 160), (160, 300), (190, 260), (205, 206), (0, 1)]:
        assert lost(tmp_path, start, stop)["b"] == whole["b"] & set(range(start, stop))


def test_a_flipped_bit_is_found_where_the_pages_have_checksums(tmp_path: Path) -> None:
    write_pages(tmp_path / "x.parquet", write_page_checksum=True)
    raw = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(raw.replace(b"c00150", b"d00150"))
    assert min(lost(tmp_path, 0, 300)["c"]) in range(136, 151)


def test_no_random_damage_stops_the_reading_or_loses_a_row(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    write_pages(tmp_path / "x.parquet", compression="snappy")
    raw, end = (tmp_path / "x.parquet").read_bytes(), pq.read_metadata(tmp_path / "x.parquet").serialized_size + 8
    damaged = 0
    for _ in range(60):
        spoilt = bytearray(raw)
        place = int(random.integers(4, len(raw) - end - 40))
        spoilt[place : place + 40] = random.bytes(40)
        (tmp_path / "x.parquet").write_bytes(spoilt)
        rows = list(ParquetSource.open(str(tmp_path)).read_rows(0, 300))
        assert [row.index for row in rows] == list(range(300))
        damaged += any(isinstance(value, BadCell) for row in rows for value in row.values.values())
    assert damaged > 20


def test_trouble_with_the_disk_or_the_network_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

    write_pages(tmp_path / "x.parquet")
    MemoryFileSystem().pipe("/flaky/x.parquet", (tmp_path / "x.parquet").read_bytes())
    source = ParquetSource.open("memory://flaky/x.parquet")
    for what, said in [("fail", "Input/output error"), ("short", r"it gave 1 of \d+ bytes")]:
        reads: list[int] = []

        def flaky(file: MemoryFile, size: int = -1, what: str = what, reads: list[int] = reads) -> bytes:
            reads.append(size)
            if len(reads) > 5 and what == "fail":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return BytesIO.read(file, 1 if len(reads) > 5 else size)

        with monkeypatch.context() as patched:
            patched.setattr(MemoryFile, "read", flaky, raising=False)
            patched.setattr(parquet_reader, "_REMOTE_BUFFER_BYTES", 500)
            with pytest.raises(UserError, match=rf"/flaky/x\.parquet can't be read from row \d+ on: .*{said}"):
                list(source.read_rows(0, 300))
    assert [row.index for row in source.read_rows(0, 300)] == list(range(300))


def test_a_footer_that_contradicts_itself_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pages(tmp_path / "x.parquet")
    real = pq.read_metadata

    class Contradicting:
        def __init__(self, file: object) -> None:
            self._real = real(file)

        def __getattr__(self, name: str) -> Any:
            return 299 if name == "num_rows" else getattr(self._real, name)

    monkeypatch.setattr(pq, "read_metadata", Contradicting)
    with pytest.raises(UserError, match=r"x\.parquet is not a readable parquet file.* 299 rows, its row groups 300"):
        ParquetSource.open(str(tmp_path))


# Layouts


def test_files_may_differ_in_types_of_columns_and_their_order(tmp_path: Path) -> None:
    captions = ["same", "same", "other"]
    dictionary = pa.array(captions).dictionary_encode()
    tables = [
        pa.table({"caption": captions, "media": [b"1", b"2", b"3"]}),
        pa.table({"media": pa.array([b"1", b"2", b"3"], pa.large_binary()), "caption": dictionary}),
        pa.table({"extra": [0, 1, 2], "media": pa.array([b"1", b"2", b"3"], pa.binary(1)),
                  "caption": pa.array(captions, pa.large_string())}),
    ]  # fmt: skip
    for number, table in enumerate(tables):
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=2)
    source = ParquetSource.open(str(tmp_path))
    source.require_columns({"caption": "x", "media": "x"})
    assert source.columns == ["caption", "media"]
    rows = [(row.values["caption"], row.values["media"]) for row in source.read_rows(0, 9)]
    assert rows == [("same", b"1"), ("same", b"2"), ("other", b"3")] * 3


def test_nested_columns_are_dicts_and_lists_with_damage_too(tmp_path: Path) -> None:
    rows = [
        {"media": {"bytes": b"x%d" % row, "path": None}, "tags": [{"name": "a"}] * row, "b.c": row} for row in range(9)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", use_dictionary=False)
    assert [row.values for row in ParquetSource.open(str(tmp_path)).read_rows(0, 9)] == rows
    damage(tmp_path / "x.parquet", 0, "media.bytes")
    values = [row.values for row in ParquetSource.open(str(tmp_path)).read_rows(0, 9)]
    assert all(isinstance(value.pop("media"), BadCell) for value in values)
    assert values == [{"tags": row["tags"], "b.c": row["b.c"]} for row in rows]


def test_empty_files_and_files_without_row_groups_are_no_hindrance(tmp_path: Path) -> None:
    schema = pa.schema({"value": pa.int64(), "caption": pa.string()})
    write(tmp_path / "b.parquet", [1, 2])
    write(tmp_path / "d.parquet", [3])
    for name in ("a", "c", "e"):
        with pq.ParquetWriter(tmp_path / f"{name}.parquet", schema):
            pass
    pq.write_table(schema.empty_table(), tmp_path / "c2.parquet")
    source = ParquetSource.open(str(tmp_path))
    assert values_of(source, 0, 3) == [1, 2, 3]


@pytest.mark.parametrize("name", ["data[1].parquet", "what?.parquet", "a*.parquet", "set[1]/x.parquet"])
def test_a_path_that_is_there_is_no_pattern(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, [1, 2])
    for other in ("a1", "what1", "data1", "set1/x"):  # what the name would match as a pattern
        write(tmp_path / f"{other}.parquet", [3])
    source = ParquetSource.open(str(tmp_path / name))
    assert values_of(source, 0, source.num_rows) == [1, 2]


def test_a_folder_whose_name_looks_like_a_pattern_is_searched(tmp_path: Path) -> None:
    write(tmp_path / "set[1]" / "x.parquet", [1])
    write(tmp_path / "set[1]" / "sub" / "y.parquet", [2])
    write(tmp_path / "set1" / "x.parquet", [3])
    assert values_of(ParquetSource.open(str(tmp_path / "set[1]")), 0, 2) == [2, 1]
    assert values_of(ParquetSource.open(str(tmp_path / "set[1]" / "*.parquet")), 0, 1) == [1]
    assert values_of(ParquetSource.open(str(tmp_path / "set[1]" / "*" / "y.parquet")), 0, 1) == [2]
    assert ParquetSource.open(str(tmp_path / "set[0-9]" / "*.parquet")).num_rows == 1


def test_a_cell_without_a_python_value_is_carried_and_its_row_stays(tmp_path: Path) -> None:
    caption = pa.Array.from_buffers(  # as other writers leave it: pyarrow's own would refuse these bytes
        pa.string(), 3, [None, pa.array([0, 3, 5, 9], pa.int32()).buffers()[1], pa.py_buffer(b"one\xff\xfelast")]
    )
    taken = pa.array([0, 2**62, None], pa.timestamp("us"))
    pq.write_table(pa.table({"caption": caption, "taken": taken, "value": [7, 8, 9]}), tmp_path / "x.parquet")
    first, second, third = (row.values for row in ParquetSource.open(str(tmp_path)).read_rows(0, 3))
    assert (first["caption"], first["taken"].year, first["value"]) == ("one", 1970, 7)
    assert isinstance(second["caption"], BadCell)
    assert second["caption"].message.startswith("UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff")
    assert isinstance(second["taken"], BadCell)
    assert second["taken"].message.startswith("OverflowError: ")
    assert second["value"] == 8
    assert third == {"caption": "last", "taken": None, "value": 9}


def test_few_rows_of_a_large_row_group_read_little_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

    random = np.random.default_rng(0)
    table = pa.table({"image": [random.bytes(2000) for _ in range(1000)]})
    pq.write_table(table, tmp_path / "x.parquet", write_batch_size=8, data_page_size=16_000, use_dictionary=False)
    MemoryFileSystem().pipe("/large/x.parquet", (tmp_path / "x.parquet").read_bytes())
    source = ParquetSource.open("memory://large/x.parquet")
    read: list[int] = []

    def counting(file: MemoryFile, size: int = -1) -> bytes:
        content = BytesIO.read(file, size)
        read.append(len(content))
        return content

    monkeypatch.setattr(MemoryFile, "read", counting, raising=False)
    monkeypatch.setattr(parquet_reader, "_REMOTE_BUFFER_BYTES", 32_000)
    assert len(list(source.read_rows(0, 32))) == 32
    assert 64_000 < sum(read) < 400_000  # of 2 million


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[ParquetReader]:
    """The readers that a source made, in order."""
    readers: list[ParquetReader] = []

    def open_reader(*arguments: Any) -> ParquetReader:
        readers.append(ParquetReader(*arguments))
        return readers[-1]

    monkeypatch.setattr(sources, "ParquetReader", open_reader)
    return readers


def is_open(reader: ParquetReader) -> bool:
    return not reader._opened.closed


def test_the_next_range_goes_on_in_the_open_file(tmp_path: Path, opened: list[ParquetReader]) -> None:
    write(tmp_path / "x.parquet", list(range(200)), row_group_size=100)
    source = ParquetSource.open(str(tmp_path))
    for start, stop in ((0, 5), (5, 30), (30, 30), (47, 49), (49, 101), (101, 103)):
        assert values_of(source, start, stop) == list(range(start, stop))
    assert len(opened) == 1
    assert values_of(source, 103, 200) == list(range(103, 200))
    assert not is_open(opened[0])  # nothing is left in it


def test_a_range_elsewhere_opens_the_file_anew(tmp_path: Path, opened: list[ParquetReader]) -> None:
    write(tmp_path / "x.parquet", list(range(200)), row_group_size=100)
    write(tmp_path / "y.parquet", list(range(200, 210)))
    source = ParquetSource.open(str(tmp_path))
    for start, stop in ((0, 5), (4, 6), (150, 152), (201, 203), (7, 9)):  # back, another row group, file, and back
        assert values_of(source, start, stop) == list(range(start, stop))
        assert [is_open(reader) for reader in opened] == [False] * (len(opened) - 1) + [True]
    assert len(opened) == 5
    source.close()
    assert not any(map(is_open, opened))


def test_a_range_given_up_half_way_loses_and_repeats_no_row(tmp_path: Path, opened: list[ParquetReader]) -> None:
    write(tmp_path / "x.parquet", list(range(100)), row_group_size=100)
    source = ParquetSource.open(str(tmp_path))
    given_up = source.read_rows(0, 50)
    assert [next(given_up).index for _ in range(20)] == list(range(20))
    given_up.close()
    assert values_of(source, 20, 40) == list(range(20, 40))
    assert values_of(source, 10, 12) == [10, 11]
    assert len(opened) == 2
    late = source.read_rows(12, 50)
    next(late)
    source.close()
    late.close()
    assert not any(map(is_open, opened))


def test_ranges_read_in_turns_do_not_mix(tmp_path: Path, opened: list[ParquetReader]) -> None:
    write(tmp_path / "x.parquet", list(range(100)), row_group_size=100)
    source = ParquetSource.open(str(tmp_path))
    pairs = zip(source.read_rows(0, 40), source.read_rows(0, 40), strict=True)
    assert [(one.index, other.index) for one, other in pairs] == [(i, i) for i in range(40)]
    source.close()
    assert not any(map(is_open, opened))


def test_a_failed_read_closes_the_file(tmp_path: Path, opened: list[ParquetReader]) -> None:
    write(tmp_path / "x.parquet", list(range(100)))
    source = ParquetSource.open(str(tmp_path))
    write(tmp_path / "x.parquet", list(range(50)))
    with pytest.raises(UserError, match=r"x\.parquet has changed: it has only 50 rows now"):
        values_of(source, 40, 60)
    assert not is_open(opened[0])


class _ClientError(Exception):
    """As an HTTP library's: neither OSError nor ValueError."""


def test_a_network_that_fails_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def fail(self: object, path: str, **options: object) -> bool:
        raise _ClientError("Name or service not known")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "isdir", fail)
    with pytest.raises(UserError, match=r"can't look into memory://x\.parquet: _ClientError: Name or service"):
        ParquetSource.open("memory://x.parquet")
