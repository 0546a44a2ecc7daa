"""The ledger: one json file a finished shard, written after the shard. What it doesn't list isn't done.

A shard that is made again is struck off before its file changes, so that no entry ever tells of other bytes than those
beside it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion_data.durable_file import (
    read_plain_file,
    remove_file,
    sha256_of_file,
    size_of_plain_file,
    write_json,
)
from diffusion_data.shard_plan import Shard


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """A finished shard. `num_rows == written + len(rejected)`, always.

    written: rows, with all their samples
    samples: of these rows, as many or more
    file: name of the tar, or None where every row was rejected: energon can't read an empty tar
    num_bytes, sha256: of the tar
    fingerprint: digest of the run that wrote it
    rejected: RejectedRow.to_json() of each
    stats: DatasetStats.to_json()
    batches_halved: BatchRecord.halved
    stage_seconds, stage_cpu_seconds: how long each stage was busy with it, wall and CPU time; they and nothing else
        differ between two runs
    """

    shard: int
    start: int
    stop: int
    file: str | None
    num_bytes: int
    sha256: str | None
    written: int
    samples: int
    captions_cut: int
    fingerprint: str
    rejected: list[dict[str, Any]] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)
    batches_halved: list[str] = field(default_factory=list)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    stage_cpu_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def retryable(self) -> list[int]:
        """Rejected rows that may succeed later."""
        return [row["row"] for row in self.rejected if row["retryable"]]

    @property
    def rejected_rows(self) -> set[int]:
        return {row["row"] for row in self.rejected}

    def __post_init__(self) -> None:
        if self.stop - self.start != self.written + len(self.rejected):
            raise ValueError(
                f"shard {self.shard}: {self.stop - self.start} rows, but {self.written} written "
                f"and {len(self.rejected)} rejected"
            )
        if self.samples < self.written or (self.samples > 0) != (self.written > 0):
            raise ValueError(f"shard {self.shard}: {self.samples} samples of {self.written} rows")


def _digest(fields: dict[str, Any]) -> str:
    """What stands in an entry beside its fields, so that an altered one is told from one that was written."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def read_entry(path: Path) -> LedgerEntry:
    """The entry in that file.

    Raises:
        ValueError: it is torn or altered, or none of ours.
        OSError: it can't be read.
    """
    try:
        fields = json.loads(read_plain_file(path))
        if fields.pop("digest") == _digest(fields):
            return LedgerEntry(**fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is torn, or none of ours ({type(error).__name__})") from error
    raise ValueError(f"{path} was altered")


def ledger_folder(output_dir: Path) -> Path:
    return output_dir / "run" / "ledger"


class Ledger:
    """The entries in `<output>/run/ledger/` of the run with this fingerprint."""

    def __init__(self, output_dir: Path, fingerprint: str) -> None:
        self._output_dir = output_dir
        self.fingerprint = fingerprint
        self._folder = ledger_folder(output_dir)

    def write(self, entry: LedgerEntry) -> None:
        fields = dataclasses.asdict(entry)
        write_json(self._path(entry.shard), {**fields, "digest": _digest(fields)})

    def remove(self, shard: Shard) -> None:
        """Strike off a shard that is about to be made again, or to lose its tar."""
        remove_file(self._path(shard.number))

    def read(self, shard: Shard) -> LedgerEntry | None:
        """The entry of a finished shard whose tar is there in full size, else None: then do it again."""
        path = self._path(shard.number)
        if size_of_plain_file(path) is None:
            return None
        try:
            entry = read_entry(path)
        except ValueError:  # its shard is made anew
            return None
        if (entry.start, entry.stop, entry.fingerprint) != (shard.start, shard.stop, self.fingerprint):
            return None
        tar = self._output_dir / shard.file_name
        if entry.file is None:
            return None if os.path.lexists(tar) else entry
        if entry.file != shard.file_name or size_of_plain_file(tar) != entry.num_bytes:
            return None
        return entry

    def has_its_bytes(self, entry: LedgerEntry) -> bool:
        """Whether the tar of `entry`, which is there in full size, also has the checksum that was entered."""
        try:
            return entry.file is None or sha256_of_file(self._output_dir / entry.file) == entry.sha256
        except OSError:  # the disk can't give it back
            return False

    def refresh(self) -> None:
        """Make a network disk show what other nodes have written: listing a folder renews what is known of it."""
        os.listdir(self._folder)

    def _path(self, shard: int) -> Path:
        return self._folder / f"shard_{shard:06d}.json"
