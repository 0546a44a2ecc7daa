"""The output folder at the start of a run: is it ours to go on with, and which shards are still to do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from diffusion_data.distributed import usable_cpus
from diffusion_data.durable_file import durable_file, explained, make_folder, remove_folder, remove_partial_files
from diffusion_data.energon_metadata import remove_energon_metadata
from diffusion_data.errors import UserError
from diffusion_data.fingerprint import check_or_write_fingerprint, fingerprint_digest
from diffusion_data.job_report import report_folder
from diffusion_data.ledger import Ledger, ledger_folder
from diffusion_data.run_lock import lock_folder
from diffusion_data.shard_plan import Shard


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """What a start finds to do.

    todo: shards that are not there as the ledger tells
    retry: shards of which rejected rows are to be tried again
    num_rejected: rows that each of all shards rejects; None if it isn't finished
    """

    todo: list[Shard]
    retry: list[Shard]
    num_rejected: list[int | None]


class RunFolder:
    """`<output>` and its `run/`. Only rank 0 opens it; the others read and write shards and ledger entries."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.run = output_dir / "run"

    def check(self) -> None:
        """Look whether it can be started or continued here; nothing is written.

        Raises:
            UserError: the folder holds something else, or what is no plain file or folder under a name of ours.
        """
        with explained(self.output_dir):
            for folder in (self.run, ledger_folder(self.output_dir), lock_folder(self.output_dir)):
                if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
                    raise UserError(f"output_dir: {folder} is a link or a file where this tool has a folder; remove it")
            if not self.output_dir.is_dir():
                return
            if not self.run.is_dir() and any(self.output_dir.iterdir()):
                raise UserError(
                    f"output_dir: {self.output_dir} is not empty and holds no run of this tool; choose another"
                )
            fingerprint = self.run / "fingerprint.json"
            if fingerprint.is_symlink():
                raise UserError(f"output_dir: {fingerprint} is a link, and this tool makes none; choose another")
            if any(ledger_folder(self.output_dir).glob("*.json")) and not fingerprint.exists():
                raise UserError(
                    f"output_dir: {self.run} has a ledger but no fingerprint.json, so what made its shards can't be "
                    "told; choose another output_dir"
                )

    def open(self, fingerprint: dict[str, Any], config: dict[str, Any]) -> Ledger:
        """Start or continue here; returns the run's ledger.

        Raises:
            UserError: as `check`, or the folder holds a run with other settings, or can't be written.
        """
        self.check()
        with explained(self.output_dir):
            make_folder(ledger_folder(self.output_dir))
            check_or_write_fingerprint(self.run / "fingerprint.json", fingerprint)
            for folder in (self.output_dir, self.run, ledger_folder(self.output_dir)):
                remove_partial_files(folder)
            with durable_file(self.run / "config.yaml") as file:
                file.write(yaml.safe_dump(config, sort_keys=False).encode())
        return Ledger(self.output_dir, fingerprint_digest(fingerprint))

    def unfinished(
        self,
        shards: Sequence[Shard],
        ledger: Ledger,
        *,
        max_reject_rate: float,
        retry_rejected: str | None,
        verify: str,
    ) -> Unfinished:
        """What is still to do, if there are `shards` in all.

        max_reject_rate: rows of a shard that an outage spoilt more of than this share are tried again
        retry_rejected: "network" tries those of any shard again
        verify: "size" compares each tar's size with the ledger's, "full" its checksum too

        If a shard is to be made, the metadata and the report of an earlier end go.

        Raises:
            UserError: there are shards of something else.
        """
        refuse_foreign_shards(self.output_dir, shards)
        with explained(self.output_dir):
            with ThreadPoolExecutor(usable_cpus()) as readers:
                states = list(readers.map(lambda shard: _look_at(ledger, shard, verify == "full"), shards))
            todo, retry, damaged = [], [], []
            for shard, state in zip(shards, states, strict=True):
                if state is None:
                    todo.append(shard)
                elif state.is_damaged:
                    todo.append(shard)
                    damaged.append(shard)
                elif state.num_retryable > (0 if retry_rejected == "network" else max_reject_rate * shard.num_rows):
                    retry.append(shard)
            if todo:
                self.drop_what_was_finished()
            for shard in damaged:
                ledger.remove(shard)
        num_rejected = [None if state is None or state.is_damaged else state.num_rejected for state in states]
        return Unfinished(todo=todo, retry=retry, num_rejected=num_rejected)

    def drop_what_was_finished(self) -> None:
        """What is about to change must not look finished, nor be described as it was."""
        with explained(self.output_dir):
            remove_energon_metadata(self.output_dir)
            remove_folder(report_folder(self.output_dir))


def refuse_foreign_shards(output_dir: Path, shards: Sequence[Shard]) -> None:
    """Raises UserError if the folder has a shard that is none of `shards`: it would be taken for one of them."""
    planned = {shard.file_name for shard in shards}
    foreign = sorted(path.name for path in output_dir.glob("shard_*.tar") if path.name not in planned)
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UserError(
            f"output_dir: {output_dir / foreign[0]}{more} is none of this run's {len(shards)} shards; move it away"
        )


@dataclass(frozen=True, kw_only=True)
class _State:
    """What matters of a ledger entry, which with its rejected rows may be large.

    is_damaged: the tar doesn't have the bytes that were written
    """

    num_rejected: int
    num_retryable: int
    is_damaged: bool


def _look_at(ledger: Ledger, shard: Shard, full: bool) -> _State | None:
    """Of a shard that is there as the ledger tells, else None. full: compare checksums."""
    entry = ledger.read(shard)
    if entry is None:
        return None
    return _State(
        num_rejected=len(entry.rejected),
        num_retryable=len(entry.retryable),
        is_damaged=full and not ledger.has_its_bytes(entry),
    )
