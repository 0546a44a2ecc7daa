"""The output folder at the start of a run: is it ours to go on with, and which shards are still to do."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from diffusion_data.durable_file import durable_file, remove_partial_files
from diffusion_data.energon_metadata import META_FOLDER
from diffusion_data.errors import UserError
from diffusion_data.fingerprint import check_or_write_fingerprint, fingerprint_digest
from diffusion_data.ledger import Ledger, ledger_folder
from diffusion_data.shard_plan import Shard


class RunFolder:
    """`<output>` and its `run/`. Only rank 0 opens it; the others read and write shards and ledger entries."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.run = output_dir / "run"

    def open(self, fingerprint: dict[str, Any], config: dict[str, Any]) -> Ledger:
        """Start or continue here; returns the run's ledger.

        Raises:
            UserError: the folder holds something else, or a run with other settings, or can't be written.
        """
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            if not self.run.is_dir() and any(self.output_dir.iterdir()):
                raise UserError(
                    f"output_dir: {self.output_dir} is not empty and holds no run of this tool; choose another"
                )
            if any(ledger_folder(self.output_dir).glob("*.json")) and not (self.run / "fingerprint.json").exists():
                raise UserError(
                    f"output_dir: {self.run} has a ledger but no fingerprint.json, so what made its shards can't be "
                    "told; choose another output_dir"
                )
            ledger_folder(self.output_dir).mkdir(parents=True, exist_ok=True)
            check_or_write_fingerprint(self.run / "fingerprint.json", fingerprint)
            for folder in (self.output_dir, self.run, ledger_folder(self.output_dir)):
                remove_partial_files(folder)
            with durable_file(self.run / "config.yaml") as file:
                file.write(yaml.safe_dump(config, sort_keys=False).encode())
        except OSError as error:
            raise UserError(f"output_dir: can't write to {self.output_dir}: {error}") from error
        return Ledger(self.output_dir, fingerprint_digest(fingerprint))

    def unfinished(
        self, shards: Sequence[Shard], ledger: Ledger, max_reject_rate: float, retry_rejected: str | None
    ) -> tuple[list[Shard], list[Shard]]:
        """Shards without a valid ledger entry; and those of which rejected rows are to be tried again: where an
        outage of the network spoilt many, or, if asked for, any.

        If there are any of the first kind, the metadata of an earlier end goes.
        """
        todo, retry = [], []
        for shard in shards:
            entry = ledger.read(shard)
            if entry is None:
                todo.append(shard)
            elif len(entry.retryable) > (0 if retry_rejected == "network" else max_reject_rate * shard.num_rows):
                retry.append(shard)
        if todo:
            self.drop_metadata()
        return todo, retry

    def drop_metadata(self) -> None:
        """What is about to change must not look finished."""
        metadata = self.output_dir / META_FOLDER
        if metadata.exists():
            shutil.rmtree(metadata)
