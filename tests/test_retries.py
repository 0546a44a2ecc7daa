"""Rows that the network failed are tried again, alone; a shard is made anew only to gain rows, and never loses one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from diffusion_data import durable_file, reject_limit
from diffusion_data.decode_workers import DecodeWorkers
from diffusion_data.decoded_row import DecodedRow, DecodedSample, RejectedRow
from diffusion_data.errors import Reason, RowRejected, UserError
from diffusion_data.ledger import Ledger, LedgerEntry
from diffusion_data.media import MediaLoader
from diffusion_data.prepare_config import PrepareConfig
from diffusion_data.prepare_energon_dataset import prepare
from diffusion_data.process_funcs import MediaSample, media_caption
from diffusion_data.retries import shards_that_gain
from diffusion_data.shard_plan import Shard
from diffusion_data.sources import ParquetSource, Row
from diffusion_data.verify_dataset import verify_dataset
from tests.small_source import prepare_config, source_rows, write_source
from tests.test_disk_faults import outcome
from tests.test_distributed import ranks
from tests.test_prepare import tar_bytes


def flaky(row: dict[str, Any], *, media: MediaLoader, network: str) -> MediaSample:
    """Row n fails if the file `down_n` is there; with `once_n` it succeeds once."""
    folder, number = Path(network), round(row["score"] * 10)
    with (folder / "asked").open("a") as asked:
        asked.write(f"{number}\n")
    if (folder / f"down_{number}").exists():
        raise RowRejected(Reason.timeout if number % 2 else Reason.fetch_error, "no network")
    if (folder / f"once_{number}").exists():
        (folder / f"once_{number}").rename(folder / f"down_{number}")
    return media_caption(row, media=media)


class Run:
    """A dataset of 8 rows in two shards, of which rows 1 and 6 failed, and row 7 has no caption."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.network = folder, folder / "out", folder / "network"
        self.source = folder / "source.parquet"

    def config(self, output_dir: Path, **options: Any) -> PrepareConfig:
        func = {"_target_": f"{__name__}.flaky", "network": "network"}
        options = {"process_func": func, "max_reject_rate": 1.0, "retry_rejected": "network", **options}
        return prepare_config(self.source, output_dir, **options)

    def totals(self, **options: Any) -> tuple[int, dict[str, int]]:
        (self.network / "asked").write_text("")
        totals = prepare(self.config(self.out, **options))
        assert totals is not None
        return totals.written, totals.rejected

    def down(self, *numbers: int) -> None:
        for number in numbers:
            (self.network / f"down_{number}").touch()

    def up(self, *numbers: int) -> None:
        for number in numbers:
            (self.network / f"down_{number}").unlink()

    def asked(self) -> list[int]:
        return [int(line) for line in (self.network / "asked").read_text().split()]

    def state(self) -> dict[str, int]:
        """When what was last written."""
        files = [*self.out.glob("*.tar"), *(self.out / "run/ledger").iterdir(), *(self.out / ".nv-meta").iterdir()]
        return {str(path.relative_to(self.out)): path.stat().st_mtime_ns for path in files}

    def undisturbed(self) -> dict[str, bytes]:
        """The tars of a run that begins now."""
        prepare(self.config(self.folder / "undisturbed"))
        return tar_bytes(self.folder / "undisturbed")


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = Run(tmp_path_factory.mktemp("first"))
    rows = source_rows(8)
    rows[7]["caption"] = None
    write_source(run.source, rows)
    run.network.mkdir()
    run.down(1, 6)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(run.folder)
        run.totals(retry_rejected=None)
    return run.folder


@pytest.fixture
def run(first_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    shutil.copytree(first_run, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    return Run(tmp_path / "run")


def test_without_being_asked_few_failed_rows_are_left_alone(run: Run) -> None:
    run.up(1, 6)
    before = run.state()
    assert run.totals(retry_rejected=None) == (5, {"timeout": 1, "fetch_error": 1, "null_caption": 1})
    assert (run.asked(), run.state()) == ([], before)


def test_rows_that_still_fail_are_asked_for_alone_and_change_nothing(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    before = run.state()
    assert run.totals() == (5, {"timeout": 1, "fetch_error": 1, "null_caption": 1})
    assert (run.asked(), run.state()) == ([1, 6], before)
    said = capsys.readouterr().out
    assert "rows that the network failed: in 0 of 2 shards some can be had now" in said
    assert "; retry_rejected=network tries again what the network failed" in said


def test_a_shard_that_gains_a_row_is_what_it_had_been_if_the_row_had_succeeded_at_once(run: Run) -> None:
    run.up(1)
    before = run.state()
    assert run.totals() == (6, {"fetch_error": 1, "null_caption": 1})
    assert run.asked() == [1, 6, 0, 1, 2, 3]
    after = run.state()
    assert {name for name in before if "000001" in name and before[name] != after[name]} == set()
    assert tar_bytes(run.out) == run.undisturbed()
    assert json.loads((run.out / ".nv-meta/.info.json").read_text())["shard_counts"]["shard_000000.tar"] == 4
    stats = json.loads((run.out / "run/stats.json").read_text())
    assert (stats["written"], sum(shape[-1] for shape in stats["latent_shapes"])) == (6, 6)
    rejected = [json.loads(line)["row"] for line in (run.out / "run/rejected.jsonl").read_text().splitlines()]
    assert rejected == [6, 7]


def test_a_shard_that_gains_a_row_is_accepted_with_those_that_it_still_lacks(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are a quarter of what is decoded, and were accepted once; the limit counts from a few rows on here."""
    monkeypatch.setattr(reject_limit, "REJECT_RATE_ROWS", 4)
    run.up(6)
    assert run.totals(max_reject_rate=0.2) == (6, {"timeout": 1, "null_caption": 1})


def test_a_row_that_was_written_is_not_lost_when_the_network_fails_it_now(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run.up(1)
    run.down(2)
    before, tars = run.state(), tar_bytes(run.out)
    assert run.totals() == (5, {"timeout": 1, "fetch_error": 1, "null_caption": 1})
    assert run.asked() == [1, 6, 0, 1, 2, 3]
    assert tar_bytes(run.out) == tars
    assert "shard_000000.tar stays as it was: now other rows of it failed" in capsys.readouterr().out
    assert {name for name in before if before[name] != run.state().get(name)} <= {
        name for name in before if name.startswith(".nv-meta")
    }
    run.up(2)
    assert run.totals() == (6, {"fetch_error": 1, "null_caption": 1})
    assert tar_bytes(run.out) == run.undisturbed()


def test_a_row_that_fails_again_while_its_shard_is_made_leaves_the_old_shard(run: Run) -> None:
    run.up(1)
    (run.network / "once_1").touch()
    tars = tar_bytes(run.out)
    assert run.totals() == (5, {"timeout": 1, "fetch_error": 1, "null_caption": 1})
    assert tar_bytes(run.out) == tars


def test_a_disk_that_fails_while_a_shard_gains_a_row_leaves_the_old_one_and_its_rows(run: Run) -> None:
    run.up(1)
    tars, fsync = tar_bytes(run.out), os.fsync

    def full(descriptor: int) -> None:
        if "shard_000000.tar." in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(durable_file.os, "fsync", full)
        with pytest.raises(UserError, match=r"can't write shard_000000\.tar: .*No space left"):
            run.totals()
    run.down(0)  # it had been written
    assert run.totals() == (5, {"timeout": 1, "fetch_error": 1, "null_caption": 1})
    assert tar_bytes(run.out) == tars


def test_retries_come_along_with_what_is_missing(run: Run) -> None:
    run.up(1, 6)
    (run.out / "shard_000001.tar").unlink()
    assert run.totals() == (7, {"null_caption": 1})
    assert sorted(run.asked()) == sorted([1, *range(8)])
    assert tar_bytes(run.out) == run.undisturbed()


def test_metadata_of_what_a_shard_was_before_it_gained_a_row_is_made_anew(run: Run) -> None:
    """What a run leaves that is killed at the wrong moment, if anything does."""
    stale = [run.out / ".nv-meta", run.out / "run/metadata.json", run.out / "shard_000000.tar.idx"]
    for path in stale:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, run.folder / path.name)
    run.up(1)
    run.totals()
    whole = outcome(run.out)
    for path in stale:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        (run.folder / path.name).rename(path)
    assert outcome(run.out) != whole
    assert "run/metadata.json: missing, or of other shards; run the job again, which makes it" in (
        verify_dataset(run.out, num_workers=1).faults
    )
    run.totals(retry_rejected=None)
    assert outcome(run.out) == whole


def test_a_shard_of_failed_rows_alone_gets_a_tar_when_some_can_be_had(run: Run) -> None:
    run.down(*range(8))
    out = run.folder / "others"
    with pytest.raises(UserError, match="every row was rejected"):
        prepare(run.config(out))
    run.up(5)
    totals = prepare(run.config(out))
    assert totals is not None
    assert (totals.written, sorted(tar_bytes(out))) == (1, ["shard_000001.tar"])


def test_after_an_outage_rows_are_tried_again_unasked_and_none_is_lost(run: Run) -> None:
    """Half of shard 0 failed, more than max_reject_rate; now one of these comes, and one of the others does not."""
    out = run.folder / "outage"
    run.down(0)
    options: dict[str, Any] = {"retry_rejected": None, "max_reject_rate": 0.3}
    prepare(run.config(out, **options))
    tars = tar_bytes(out)
    run.up(0)
    run.down(2)
    prepare(run.config(out, **options))
    assert tar_bytes(out) == tars
    run.up(2)
    totals = prepare(run.config(out, **options))
    assert totals is not None
    assert totals.rejected == {"timeout": 1, "fetch_error": 1, "null_caption": 1}


def test_an_unknown_value_is_refused_by_name(run: Run) -> None:
    with pytest.raises(UserError, match="retry_rejected: expected network or null, got 'all'"):
        replace(run.config(run.out), retry_rejected="all")


def test_ranks_share_the_rows_and_learn_the_same(tmp_path: Path) -> None:
    source = ParquetSource.open(str(write_source(tmp_path / "source.parquet", source_rows(40))))
    shards = [Shard(number=number, start=4 * number, stop=4 * number + 4) for number in range(10)]
    (tmp_path / "run/ledger").mkdir(parents=True)
    ledger = Ledger(tmp_path, "fingerprint")
    for shard in shards:
        rejected = [
            {"row": shard.start + place, "reason": "fetch_error", "retryable": place != 2} for place in range(4)
        ]
        ledger.write(
            LedgerEntry(shard=shard.number, start=shard.start, stop=shard.stop, file=None, num_bytes=0, sha256=None,
                        written=0, samples=0, captions_cut=0, fingerprint="fingerprint", rejected=rejected)
        )  # fmt: skip
    tried: list[int] = []

    def decode(row: Row) -> DecodedRow | RejectedRow:
        tried.append(row.index)
        if row.index in (9, 21, 38):  # 38 is not one to try again
            pixels = np.zeros((1, 1, 1, 3), np.uint8)
            sample = DecodedSample(
                pixels=pixels, framerate=None, image_height=1, image_width=1, caption="", metadata={}
            )
            return DecodedRow(row=row.index, source_file="", source_row=0, samples=(sample,))
        return RejectedRow(row=row.index, source_file="", source_row=0, reason=Reason.fetch_error, message="")

    found: dict[int, set[int]] = {}
    dropped: list[int] = []
    found_when_dropped: list[int] = []

    def work(one: Any) -> None:
        def drop_metadata() -> None:
            time.sleep(0.5)  # as long as the others would need to go on
            found_when_dropped.extend(found)
            dropped.append(one.rank)

        own_source = ParquetSource(source.files)
        with DecodeWorkers(decode, 0) as workers:
            found[one.rank] = shards_that_gain(one, shards, ledger, own_source, workers, drop_metadata)

    everybody = ranks(3)
    threads = [Thread(target=work, args=(one,)) for one in everybody]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: {2, 5}, 1: {2, 5}, 2: {2, 5}}
    assert (dropped, found_when_dropped) == ([0], [])  # no shard changes beside metadata of what it was
    assert sorted(tried) == sorted({row for row in range(40) if row % 4 != 2} - {11, 23})
