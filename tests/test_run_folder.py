"""What a start finds of a run that was there before."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest

from diffusion_data import run_folder
from diffusion_data.ledger import Ledger, LedgerEntry
from diffusion_data.run_folder import RunFolder
from diffusion_data.shard_plan import Shard

SHARDS = [Shard(number=number, start=4 * number, stop=4 * number + 4) for number in range(40)]


def entry(shard: Shard, num_retryable: int = 0, num_others: int = 0) -> LedgerEntry:
    """Of a shard of rejected rows alone, which has no tar, or of one whose tar is empty."""
    num_rejected = num_retryable + num_others
    rejected = [{"row": shard.start + place, "retryable": place < num_retryable} for place in range(num_rejected)]
    written = shard.num_rows - num_rejected
    return LedgerEntry(
        shard=shard.number,
        start=shard.start,
        stop=shard.stop,
        file=shard.file_name if written else None,
        num_bytes=0,
        sha256="of nothing" if written else None,
        written=written,
        samples=written,
        captions_cut=0,
        fingerprint="fingerprint",
        rejected=rejected,
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """All shards are finished but 3. Of 5 all rows were rejected, two of them retryable, of 6 one that is."""
    (tmp_path / "run/ledger").mkdir(parents=True)
    ledger = Ledger(tmp_path, "fingerprint")
    rejects = {5: (2, 2), 6: (1, 0), 7: (0, 3)}
    for shard in SHARDS:
        if shard.number != 3:
            ledger.write(entry(shard, *rejects.get(shard.number, (0, 0))))
        if shard.number != 5:
            (tmp_path / shard.file_name).touch()
    return ledger


def found(output_dir: Path, ledger: Ledger, **options: Any) -> tuple[list[int], list[int]]:
    options = {"max_reject_rate": 0.25, "retry_rejected": None, "verify": "size", **options}
    unfinished = RunFolder(output_dir).unfinished(SHARDS, ledger, **options)
    assert [place for place, rejected in enumerate(unfinished.num_rejected) if rejected is None] == [
        shard.number for shard in unfinished.todo
    ]
    return [shard.number for shard in unfinished.todo], [shard.number for shard in unfinished.retry]


def test_what_is_missing_and_what_an_outage_spoilt_is_told_apart(tmp_path: Path, ledger: Ledger) -> None:
    assert found(tmp_path, ledger) == ([3], [5])
    assert found(tmp_path, ledger, retry_rejected="network") == ([3], [5, 6])


def test_what_the_finished_shards_reject_is_told(tmp_path: Path, ledger: Ledger) -> None:
    options: dict[str, Any] = {"max_reject_rate": 0.25, "retry_rejected": None, "verify": "size"}
    unfinished = RunFolder(tmp_path).unfinished(SHARDS, ledger, **options)
    assert unfinished.num_rejected[:9] == [0, 0, 0, None, 0, 4, 1, 3, 0]


def test_a_shard_of_other_bytes_is_struck_off(tmp_path: Path, ledger: Ledger) -> None:
    todo, retry = found(tmp_path, ledger, verify="full")
    assert (todo, retry) == ([number for number in range(40) if number != 5], [5])
    assert [shard.number for shard in SHARDS if ledger.read(shard) is not None] == [5]


@pytest.mark.parametrize("verify", ["size", "full"])
def test_entries_are_held_a_few_at_a_time(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, verify: str
) -> None:
    """Each has all its rejected rows with their messages; those of all shards together are gigabytes."""
    monkeypatch.setattr(run_folder, "usable_cpus", lambda: 2)
    alive: weakref.WeakSet[LedgerEntry] = weakref.WeakSet()
    most, read = 0, Ledger.read

    def count(self: Ledger, shard: Shard) -> LedgerEntry | None:
        nonlocal most
        entry = read(self, shard)
        if entry is not None:
            alive.add(entry)
        most = max(most, len(alive))
        return entry

    monkeypatch.setattr(LedgerEntry, "__hash__", object.__hash__)  # its lists have none
    monkeypatch.setattr(Ledger, "read", count)
    found(tmp_path, ledger, verify=verify)
    assert 1 <= most <= 2
