"""The same command on what an earlier run left, altered or not: made good, or refused by name; links never followed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_data import durable_file, ledger, reject_limit
from diffusion_data.encoders import Encoders, load_encoders
from diffusion_data.errors import UserError
from diffusion_data.media import MediaLoader
from diffusion_data.prepare_config import PrepareConfig
from diffusion_data.prepare_energon_dataset import prepare
from diffusion_data.process_funcs import MediaSample, media_caption
from tests.small_source import prepare_config, source_rows, write_source
from tests.test_disk_faults import outcome
from tests.test_prepare import tar_bytes


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Encoders:
    folder = tmp_path_factory.mktemp("any")
    return load_encoders(prepare_config(folder, folder), torch.device("cpu"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, encoders: Encoders) -> Path:
    """Ten rows in three shards, one row rejected."""
    folder = tmp_path_factory.mktemp("finished")
    rows = source_rows(10)
    rows[5]["caption"] = None
    write_source(folder / "source.parquet", rows)
    prepare(prepare_config(folder / "source.parquet", folder / "dataset"), encoders)
    return folder / "dataset"


@pytest.fixture
def dataset(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "dataset")


def config(finished: Path, dataset: Path, **options: Any) -> PrepareConfig:
    return prepare_config(finished.parent / "source.parquet", dataset, **options)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def edit_text(path: Path, before: str, after: str) -> None:
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))


ALTERED: dict[str, Callable[[Path], object]] = {
    "tar with a flipped byte": lambda d: flip(d / "shard_000000.tar", 9000),
    "tar with a damaged header": lambda d: flip(d / "shard_000001.tar", 0),
    "tar of zeros": lambda d: (d / "shard_000002.tar").write_bytes(bytes((d / "shard_000002.tar").stat().st_size)),
    "index": lambda d: flip(d / "shard_000001.tar.idx", 9),
    "energon's database": lambda d: flip(d / ".nv-meta/index.sqlite", 5000),
    "counts": lambda d: edit_text(d / ".nv-meta/.info.json", '"shard_000001.tar": 3', '"shard_000001.tar": 2'),
}


@pytest.mark.parametrize("altered", ALTERED)
def test_full_verification_makes_good_what_has_its_size_but_other_bytes(
    finished: Path, dataset: Path, encoders: Encoders, altered: str
) -> None:
    ALTERED[altered](dataset)
    assert outcome(dataset) != outcome(finished) or altered == "energon's database"
    prepare(config(finished, dataset, verify="full"), encoders)
    assert outcome(dataset) == outcome(finished)
    kept = (dataset / "shard_000000.tar.idx").stat().st_mtime_ns
    prepare(config(finished, dataset, verify="full"), encoders)  # all holds now: nothing is made again
    assert (dataset / "shard_000000.tar.idx").stat().st_mtime_ns == kept


SHORTENED: dict[str, Callable[[Path], object]] = {
    **{
        f"tar cut at {size}": lambda d, size=size: os.truncate(d / "shard_000001.tar", size)
        for size in (0, 1, 511, 512, 10_240, 20_000)
    },
    "tar with more": lambda d: (d / "shard_000001.tar").open("ab").write(b"\0" * 512),
    "no tar": lambda d: (d / "shard_000001.tar").unlink(),
    "no ledger entry": lambda d: (d / "run/ledger/shard_000001.json").unlink(),
    "ledger entry altered": lambda d: edit_text(
        d / "run/ledger/shard_000001.json", '"captions_cut": 0', '"captions_cut": 7'
    ),
    "ledger entry of another shard": lambda d: shutil.copy(
        d / "run/ledger/shard_000000.json", d / "run/ledger/shard_000001.json"
    ),
    "no index": lambda d: (d / "shard_000001.tar.idx").unlink(),
    "index cut": lambda d: os.truncate(d / "shard_000001.tar.idx", 8),
    "no dataset.yaml": lambda d: (d / ".nv-meta/dataset.yaml").unlink(),
    "no .info.json": lambda d: (d / ".nv-meta/.info.json").unlink(),
    "something planted in .nv-meta": lambda d: (d / ".nv-meta/filter.py").write_text("print('run')"),
    "no record of the metadata": lambda d: (d / "run/metadata.json").unlink(),
    "rejected rows gone": lambda d: (d / "run/rejected.jsonl").unlink(),
    "statistics torn": lambda d: os.truncate(d / "run/stats.json", 10),
}


@pytest.mark.parametrize("shortened", SHORTENED)
def test_what_is_gone_or_of_another_size_is_made_again(
    finished: Path, dataset: Path, encoders: Encoders, shortened: str
) -> None:
    SHORTENED[shortened](dataset)
    prepare(config(finished, dataset), encoders)
    assert outcome(dataset) == outcome(finished)


@pytest.mark.parametrize(
    "name",
    [
        "shard_000001.tar", "shard_000001.tar.idx", "run/ledger/shard_000001.json", "run/config.yaml",
        "run/rejected.jsonl", "run/stats.json", "run/empty_caption.pickle", "run/metadata.json", ".nv-meta",
        ".nv-meta/dataset.yaml", ".nv-meta/index.sqlite",
    ],
)  # fmt: skip
@pytest.mark.parametrize("target", ["what was there", "a stranger's file"])
def test_a_link_planted_under_a_final_name_is_replaced_and_never_followed(
    finished: Path, dataset: Path, encoders: Encoders, name: str, target: str
) -> None:
    planted, elsewhere = dataset / name, dataset.parent / "elsewhere"
    is_folder = planted.is_dir()
    planted.rename(elsewhere)
    if target != "what was there" and not is_folder:
        elsewhere.write_text("precious")
    before = tree(elsewhere)
    planted.symlink_to(elsewhere)
    prepare(config(finished, dataset), encoders)
    assert tree(elsewhere) == before
    assert not planted.is_symlink()
    assert outcome(dataset) == outcome(finished)


def tree(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return {str(each): each.read_bytes() for each in files}


@pytest.mark.parametrize("name", ["run", "run/ledger", "run/locks", "run/fingerprint.json"])
def test_a_link_in_place_of_what_decides_about_the_run_is_refused_by_name(
    finished: Path, dataset: Path, encoders: Encoders, name: str
) -> None:
    planted, elsewhere = dataset / name, dataset.parent / "elsewhere"
    planted.rename(elsewhere)
    before = tree(elsewhere)
    planted.symlink_to(elsewhere)
    with pytest.raises(UserError, match=rf"output_dir: {planted} is a link"):
        prepare(config(finished, dataset), encoders)
    assert tree(elsewhere) == before


def test_a_shard_of_something_else_is_refused_by_name(finished: Path, dataset: Path, encoders: Encoders) -> None:
    shutil.copy(dataset / "shard_000000.tar", dataset / "shard_000003.tar")
    with pytest.raises(UserError, match=r"shard_000003\.tar is none of this run's 3 shards; move it away"):
        prepare(config(finished, dataset), encoders)
    (dataset / "shard_000003.tar").unlink()
    (dataset / "shard_000004.tar").symlink_to("shard_000000.tar")
    with pytest.raises(UserError, match=r"shard_000004\.tar is none of this run's 3 shards"):
        prepare(config(finished, dataset), encoders)


def plant_shard(row: dict[str, Any], *, media: MediaLoader, output_dir: str) -> MediaSample:
    """A process function during which a foreign shard appears."""
    Path(output_dir, "shard_000077.tar").write_bytes(b"anything")
    return media_caption(row, media=media)


def test_a_shard_that_appears_during_the_run_is_not_indexed(finished: Path, tmp_path: Path, encoders: Encoders) -> None:
    func = {"_target_": f"{__name__}.plant_shard", "output_dir": str(tmp_path / "out")}
    with pytest.raises(UserError, match=r"shard_000077\.tar is none of this run's 3 shards"):
        prepare(config(finished, tmp_path / "out", process_func=func), encoders)
    assert not (tmp_path / "out/.nv-meta").exists()


def test_a_torn_shard_of_the_right_size_is_not_indexed(finished: Path, dataset: Path, encoders: Encoders) -> None:
    """energon takes it for a shorter one; the ledger knows how many samples there should be."""
    shutil.rmtree(dataset / ".nv-meta")
    second_sample = int.from_bytes((dataset / "shard_000000.tar.idx").read_bytes()[8:16], "little")
    flip(dataset / "shard_000000.tar", second_sample)
    with pytest.raises(UserError, match=r"shard_000000\.tar: 1 samples, 4 were written.*verify=full"):
        prepare(config(finished, dataset), encoders)
    assert not (dataset / ".nv-meta").exists()
    prepare(config(finished, dataset, verify="full"), encoders)
    assert outcome(dataset) == outcome(finished)


def test_a_shard_made_again_is_struck_off_first(
    finished: Path, dataset: Path, encoders: Encoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run cut short between the shard and its entry leaves an entry of other bytes, maybe of the same size."""
    (dataset / "shard_000001.tar").unlink()
    entry = dataset / "run/ledger/shard_000001.json"
    there: list[bool] = []
    replace = Path.replace

    def note(self: Path, target: Path) -> Path:
        if target.name == "shard_000001.tar":
            there.append(entry.exists())
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", note)
    prepare(config(finished, dataset), encoders)
    assert there == [False]


def test_the_rejects_of_a_shard_that_was_missing_are_a_share_of_all_rows(
    finished: Path, dataset: Path, encoders: Encoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of its own; the limit counts from a few rows on here."""
    monkeypatch.setattr(reject_limit, "REJECT_RATE_ROWS", 4)
    (dataset / "shard_000001.tar").unlink()
    prepare(config(finished, dataset, max_reject_rate=0.15), encoders)
    assert outcome(dataset) == outcome(finished)


def test_an_option_that_is_neither_size_nor_full_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="verify: expected size or full, got 'some'"):
        config(finished, tmp_path, verify="some")


def two_files(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, first in (("a", 0), ("b", 3)):
        write_source(folder / f"{name}.parquet", source_rows(6)[first : first + 3])
    return folder


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "appended": (lambda d: write_source(d / "b.parquet", source_rows(7)[3:]), r"source\.b\.parquet\.num_rows: 3 -> 4"),
    "replaced": (
        lambda d: write_source(d / "b.parquet", source_rows(9)[6:]),
        r"source\.b\.parquet\.footer_sha256: ",
    ),
    "renamed": (lambda d: (d / "b.parquet").rename(d / "c.parquet"), r"source\.b\.parquet\.name: 'b\.parquet' -> None"),
    "one more": (lambda d: write_source(d / "c.parquet", source_rows(1)), r"source\.c\.parquet\.name: None -> "),
    "one less": (lambda d: (d / "b.parquet").unlink(), r"source\.b\.parquet\.num_rows: 3 -> None"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_input_that_changed_between_runs_is_refused_by_the_file_s_name(
    tmp_path: Path, encoders: Encoders, change: str
) -> None:
    source = two_files(tmp_path / "source")
    prepare(prepare_config(source, tmp_path / "out"), encoders)
    before = tar_bytes(tmp_path / "out")
    do, told = CHANGES[change]
    do(source)
    with pytest.raises(UserError, match=rf"holds a run with other settings .*{told}"):
        prepare(prepare_config(source, tmp_path / "out"), encoders)
    assert tar_bytes(tmp_path / "out") == before


def append_to_source(row: dict[str, Any], *, media: MediaLoader, file: str) -> MediaSample:
    """A process function during which a source file that is not yet open gets another row."""
    write_source(Path(file), source_rows(7)[3:])
    return media_caption(row, media=media)


def test_input_that_changes_during_the_run_ends_it_by_the_file_s_name(tmp_path: Path, encoders: Encoders) -> None:
    source = two_files(tmp_path / "source")
    func = {"_target_": f"{__name__}.append_to_source", "file": str(source / "b.parquet")}
    with pytest.raises(UserError, match=r"b\.parquet has changed: it has \d+ bytes now"):
        prepare(prepare_config(source, tmp_path / "out", process_func=func, samples_per_shard=3), encoders)


def test_after_a_failed_flush_the_file_is_given_up(
    finished: Path, tmp_path: Path, encoders: Encoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system may have dropped what it could not write, and call the next flush of the same file a success."""
    fsync, flushed = os.fsync, []

    def fail_once(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        flushed.append(path)
        if "shard_000001.tar" in path and not any("shard_000001.tar" in each for each in flushed[:-1]):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(durable_file.os, "fsync", fail_once)
    with pytest.raises(UserError, match=r"can't write shard_000001\.tar: .*Input/output error.*same command again"):
        prepare(config(finished, tmp_path / "out"), encoders)
    assert "shard_000001.tar" not in os.listdir(tmp_path / "out")
    assert not (tmp_path / "out/run/ledger/shard_000001.json").exists()
    prepare(config(finished, tmp_path / "out"), encoders)
    tries = [path for path in flushed if "shard_000001.tar." in path and path.endswith(".partial")]
    assert len(tries) == len(set(tries)) == 2  # another file each time
    assert outcome(tmp_path / "out") == outcome(finished)


def test_a_ledger_entry_tells_when_it_was_altered(dataset: Path) -> None:
    path = dataset / "run/ledger/shard_000000.json"
    assert ledger.read_entry(path).written == 4
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "captions_cut": 1}))
    with pytest.raises(ValueError, match="was altered"):
        ledger.read_entry(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is torn, or none of ours"):
        ledger.read_entry(path)
