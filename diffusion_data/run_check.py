"""`run/` of a finished dataset -> what is wrong with it, a line each: ledger, fingerprint, rejects, statistics."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from diffusion_data.durable_file import read_plain_file
from diffusion_data.fingerprint import fingerprint_digest
from diffusion_data.ledger import LedgerEntry, ledger_folder, read_entry
from diffusion_data.shard_plan import Shard


def check_ledger(dataset: Path, faults: list[str]) -> list[LedgerEntry]:
    """The ledger, in order of the rows; empty where there is none.

    faults: gets a line for what is wrong with it in itself
    """
    entries: list[LedgerEntry] = []
    for path in sorted(ledger_folder(dataset).glob("*.json")):
        entry = _entry_or_fault(path)
        if isinstance(entry, LedgerEntry):
            entries.append(entry)
        else:
            faults.append(entry)
    if not entries:
        return []
    next_row = 0
    for number, entry in enumerate(entries):
        name = f"run/ledger/shard_{entry.shard:06d}.json"
        shard = Shard(number=entry.shard, start=entry.start, stop=entry.stop)
        if entry.start != next_row or (entry.shard != number and len(entries) > entry.shard):
            faults.append(f"{name}: begins at row {entry.start}, expected row {next_row}")
        if entry.file not in (shard.file_name, None):
            faults.append(f"{name}: tells of {entry.file}, expected {shard.file_name}")
        wrong_rows = [row["row"] for row in entry.rejected if not entry.start <= row["row"] < entry.stop]
        if wrong_rows or len({row["row"] for row in entry.rejected}) != len(entry.rejected):
            faults.append(f"{name}: rejected rows are not of this shard, or there twice")
        next_row = entry.stop
    _compare_with_fingerprint(dataset, entries, faults)
    return entries


def rejected_faults(dataset: Path, entries: Sequence[LedgerEntry]) -> Iterator[str]:
    """Of rejected.jsonl, which has the ledger's rejected rows in order."""
    name = "run/rejected.jsonl"
    try:
        lines = read_plain_file(dataset / name).splitlines()
    except OSError as error:
        yield f"{name}: can't be read: {error}"
        return
    expected = [row for entry in entries for row in entry.rejected]
    for line, row in zip_longest(lines, expected):
        try:
            found = None if line is None else json.loads(line)
        except ValueError:
            found = line
        if found != row:
            told = f"row {row['row']} is missing or altered" if row else "more rows than the ledger rejected"
            yield f"{name}: {told}"
            return


def stats_faults(dataset: Path, entries: Sequence[LedgerEntry], latent_shapes: Counter[str]) -> Iterator[str]:
    """Of stats.json, which has the ledger's sums; latent_shapes: samples of each "CxTxHxW" in the shards."""
    name = "run/stats.json"
    try:
        stats = json.loads(read_plain_file(dataset / name))
        shapes = {"x".join(map(str, shape[:-1])): shape[-1] for shape in stats["latent_shapes"]}
        told = {field: stats[field] for field in ("rows", "written", "samples", "rejected")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        yield f"{name}: can't be read ({type(error).__name__}: {error})"
        return
    expected: dict[str, Any] = {
        "rows": sum(entry.stop - entry.start for entry in entries),
        "written": sum(entry.written for entry in entries),
        "samples": sum(entry.samples for entry in entries),
        "rejected": dict(Counter(row["reason"] for entry in entries for row in entry.rejected)),
    }
    for field_name, value in expected.items():
        if told[field_name] != value:
            yield f"{name}: {field_name} is {told[field_name]}, the ledger has {value}"
    if shapes != latent_shapes:
        yield f"{name}: latent_shapes are not those of the shards"


def _entry_or_fault(path: Path) -> LedgerEntry | str:
    try:
        return read_entry(path)
    except (ValueError, OSError) as error:
        return f"run/ledger/{path.name}: {str(error).removeprefix(f'{path} ')}"


def _compare_with_fingerprint(dataset: Path, entries: Sequence[LedgerEntry], faults: list[str]) -> None:
    try:
        fingerprint = json.loads(read_plain_file(dataset / "run" / "fingerprint.json"))
        num_rows = sum(file["num_rows"] for file in fingerprint["source"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        faults.append(f"run/fingerprint.json: can't be read ({type(error).__name__}: {error})")
        return
    digest = fingerprint_digest(fingerprint)
    others = [entry for entry in entries if entry.fingerprint != digest]
    faults += [f"run/ledger/shard_{entry.shard:06d}.json: of a run with other settings" for entry in others]
    if entries[-1].stop != num_rows:
        faults.append(f"run/ledger: ends at row {entries[-1].stop} of the source's {num_rows}")
