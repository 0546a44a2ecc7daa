"""Parquet -> rows with global indices, whatever the files' number, row groups and layout."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffusion_data.errors import UserError
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


def test_a_damaged_page_is_an_error_that_names_file_and_row(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", list(range(3000)), row_group_size=1000)
    raw = bytearray((tmp_path / "x.parquet").read_bytes())
    place = len(raw) // 2
    raw[place : place + 200] = bytes(200)
    (tmp_path / "x.parquet").write_bytes(raw)
    source = ParquetSource.open(str(tmp_path))
    with pytest.raises(UserError, match=r"x\.parquet can't be read from row"):
        list(source.read_rows(0, 3000))
