"""Samples are what energon's own reader gives, or come from it."""

from __future__ import annotations

import dataclasses
import gc
import io
import os
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader
from megatron.energon.flavors.webdataset.structs import ShardInfo

from diffusion_data.sample_reader import LocalTarReader, _adds_up
from tests.tiny_dataset import tiny_sample, write_dataset, write_raw_dataset


def readers(folder: Path, cache: int = 5, **options) -> tuple[ShardInfosITarReader, LocalTarReader]:
    shards = sorted(folder.glob("*.tar"))
    infos = [
        ShardInfo(name=path.name, path=EPath(path), count=path.with_suffix(".tar.idx").stat().st_size // 8 - 1)
        for path in shards
    ]
    options |= {"itar_cache_size": cache}
    return ShardInfosITarReader(EPath(folder), infos, **options), LocalTarReader(EPath(folder), infos, **options)


def as_bytes(sample: dict) -> dict:
    return {name: bytes(value) if isinstance(value, memoryview) else value for name, value in sample.items()}


@pytest.fixture(scope="module")
def ten(tmp_path_factory) -> Path:
    samples = [tiny_sample(row, tokens=1 + row % 3, note="é" * row) for row in range(10)]
    return write_dataset(tmp_path_factory.mktemp("ten") / "ds", samples)


@pytest.mark.parametrize("cache", [1, 5])
def test_every_sample_is_what_energon_reads_in_any_order(ten, cache):
    theirs, ours = readers(ten, cache)
    assert len(ours) == len(theirs) == 10
    for index in [*range(10), 9, 0, 5, 5, 4, 3]:
        assert as_bytes(ours[index]) == theirs[index]
        assert list(ours[index]) == list(theirs[index])  # and in the same order
    assert all(not value.readonly for value in ours[3].values() if isinstance(value, memoryview))
    assert {type(value) for name, value in ours[3].items() if not name.startswith("__")} == {memoryview}


def test_samples_keep_their_own_memory(ten):
    _, reader = readers(ten)
    first = reader[0]
    copied = as_bytes(first)
    reader[1], reader[0]
    assert as_bytes(first) == copied


def test_filters_of_parts_and_samples_are_asked(ten):
    options = {
        "part_filter": lambda part: part != "pth",
        "sample_filter": lambda key: key != "shard_000000.tar/samples/sample_000000001",
    }
    theirs, ours = readers(ten, **options)
    assert ours[1] is theirs[1] is None
    assert set(ours[0]) == set(theirs[0]) >= {"pickle", "json"}
    assert "pth" not in ours[0]
    assert ours[0]["__sources__"] == theirs[0]["__sources__"]


def test_indices_beyond_the_end_are_refused_as_by_energon(ten):
    for reader in readers(ten):
        for index in (10, -1):
            with pytest.raises(IndexError):
                reader[index]


def rewrite(folder: Path, change: Callable[[tarfile.TarInfo], None], format: int = tarfile.PAX_FORMAT) -> None:
    """Write the shards again with changed headers; energon's index is made again with them."""
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            members = [(member, tar.extractfile(member).read()) for member in tar]
        with tarfile.open(path, "w", format=format) as tar:
            for member, content in members:
                change(member)
                tar.addfile(member, io.BytesIO(content))


def indexed(folder: Path, change: Callable[[tarfile.TarInfo], None], format: int = tarfile.PAX_FORMAT) -> Path:
    source = folder / "source"
    parts = {f"samples/sample_{row}": {"json": b"{}", "pickle": bytes([row])} for row in range(3)}
    write_raw_dataset(source, parts)
    rewrite(source, change, format)
    names = sorted(path.name for path in source.glob("*.tar"))
    from megatron.energon import BaseWebdatasetFactory

    for old in (source / ".nv-meta").iterdir():
        old.unlink()
    BaseWebdatasetFactory.prepare_dataset(
        EPath(source), names, split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=1
    )
    return source


def long_name(member: tarfile.TarInfo) -> None:
    base, dot, extension = member.name.partition(".")
    member.name = f"{'folder/' * 30}{base}{'x' * 60}{dot}{extension}"


def prefixed_name(member: tarfile.TarInfo) -> None:
    base, dot, extension = member.name.partition(".")
    member.name = f"{'folder/' * 15}{base}{dot}{extension}"


def foreign_name(member: tarfile.TarInfo) -> None:
    member.name = member.name.replace("sample_", "épreuve_")


def timed(member: tarfile.TarInfo) -> None:
    member.pax_headers = {"mtime": "1700000000.25"}
    member.mtime = 1700000000.25


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("change", [long_name, prefixed_name, foreign_name, timed])
@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_of_other_writers_are_read_as_energon_reads_them(tmp_path, change, format, capfd):
    if change is long_name and format == tarfile.USTAR_FORMAT:
        pytest.skip("that format has no names so long")
    theirs, ours = readers(indexed(tmp_path, change, format))
    for index in range(3):
        assert as_bytes(ours[index]) == theirs[index]


def outcome(reader: ShardInfosITarReader, index: int) -> dict | type:
    """The sample, or what kind of error came instead."""
    try:
        return as_bytes(reader[index])
    except (ValueError, OSError, tarfile.TarError) as error:
        return type(error)


@pytest.mark.parametrize("damage", ["truncated", "header", "empty"])
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_damaged_tars_fail_as_with_energon(tmp_path, damage):
    folder = write_dataset(tmp_path / "ds", [tiny_sample(row) for row in range(3)])
    (tar,) = folder.glob("*.tar")
    raw = bytearray(tar.read_bytes())
    if damage == "header":
        raw[0] ^= 1
    tar.write_bytes(raw if damage == "header" else raw[: 1000 if damage == "truncated" else 0])
    theirs, ours = readers(folder)
    failures = [outcome(reader, index) for reader in (theirs, ours) for index in range(3)]
    assert failures[:3] == failures[3:]
    assert any(isinstance(found, type) for found in failures)


@pytest.mark.parametrize("seed", range(3))
def test_checksums_are_those_of_tarfile(seed):
    noise = np.random.default_rng(seed)
    for _ in range(50):
        header = bytearray(noise.bytes(512))
        if seed == 0:
            header = bytearray(b"\xff" * 512)  # the largest sum
        header[148:156] = b" " * 8
        expected = sum(header)
        for claimed in (expected, expected + 1, expected - 65536, expected + 65536):
            if claimed >= 0:
                stated = f"{claimed:06o}\0 ".encode()
                header[148:156] = stated
                assert _adds_up(bytes(header), stated) == (claimed == expected)


def sparse(member: tarfile.TarInfo) -> None:
    """512 bytes of holes by the headers, which might as well say a terabyte."""
    if member.name.endswith(".json"):
        member.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,2",
                              "GNU.sparse.size": "1000000000000", "GNU.sparse.name": member.name}  # fmt: skip


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_sparse_file_is_refused_by_name_before_it_fills_the_memory(tmp_path):
    folder = indexed(tmp_path, sparse)
    _, ours = readers(folder)
    with pytest.raises(ValueError, match=r"shard_000000\.tar: samples/sample_0\.json is a sparse file"):
        ours[0]


def test_an_index_that_names_places_beyond_the_tar_takes_no_memory(tmp_path):
    folder = write_dataset(tmp_path / "ds", [tiny_sample(row) for row in range(3)])
    (index,) = folder.glob("*.tar.idx")
    index.write_bytes(struct.pack("<4Q", 0, 1 << 62, 1 << 63, (1 << 64) - 1))
    theirs, ours = readers(folder)
    assert [outcome(ours, number) for number in range(3)] == [outcome(theirs, number) for number in range(3)]


def test_files_are_closed_with_their_readers_and_kept_few(ten, monkeypatch):
    def open_files() -> int:
        return sum("/ds/" in os.readlink(f"/proc/self/fd/{number}") for number in opened())

    def opened() -> list[str]:
        return [number for number in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{number}")]

    gc.collect()  # what other tests left
    monkeypatch.setattr("diffusion_data.open_shards.MOST_OPEN", 2)
    before = open_files()
    two_readers = [readers(ten)[1] for _ in range(2)]
    for index in range(10):
        for reader in two_readers:
            reader[index]
    assert open_files() - before == 2 * 2  # two shards, though both readers have three: a tar and an index each
    del reader, two_readers
    gc.collect()
    assert open_files() == before


def test_energons_reader_has_the_fields_that_are_copied(ten):
    theirs, ours = readers(ten)
    for name in ("base_path", "shard_infos", "part_filter", "itar_cache_size", "sample_filter", "shard_count_cumsum"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert dataclasses.asdict(theirs.shard_infos[0])["count"] == 4
