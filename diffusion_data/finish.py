"""The ledger's entries -> what stands beside the shards: rejected rows, statistics, energon's metadata.

Nothing here reads a shard again, but for energon's index and one batch.
"""

from __future__ import annotations

import json
import pickle
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml

from diffusion_data.dataset_stats import DatasetStats
from diffusion_data.durable_file import durable_file, write_json
from diffusion_data.energon_metadata import META_FOLDER, metadata_faults, record_metadata, write_energon_metadata
from diffusion_data.errors import UserError
from diffusion_data.latent_sample import EMPTY_CAPTION_FILE
from diffusion_data.ledger import Ledger, LedgerEntry
from diffusion_data.run_folder import refuse_foreign_shards
from diffusion_data.shard_plan import Shard, asked_splits, assign_splits

_SECONDS_UNTIL_FILES_SHOW = 60.0


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over the ledger: rows = written + rejected. A row may have several samples; splits count samples."""

    rows: int
    written: int
    samples: int
    rejected: dict[str, int]
    captions_cut: int
    shards: int
    num_bytes: int
    batches_halved: int
    stage_seconds: dict[str, float]
    stage_cpu_seconds: dict[str, float]
    splits: dict[str, int]
    left_out: dict[str, float]


def finish_dataset(
    output_dir: Path,
    ledger: Ledger,
    shards: Sequence[Shard],
    split_ratio: Sequence[float],
    seed: int,
    empty_caption: np.ndarray,
    verify_full: bool = False,
) -> Totals:
    """Write everything beside the shards.

    verify_full: of what energon has made of them before, compare checksums too

    Raises:
        UserError: a shard has no ledger entry, or no row was written at all, or there are shards of something else.
    """
    run = output_dir / "run"
    refuse_foreign_shards(output_dir, shards)
    sums = _LedgerSums()
    with durable_file(run / "rejected.jsonl") as file:
        for entry in _all_entries(ledger, shards):
            for row in entry.rejected:
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            sums.add(entry)
    if not sums.counts:
        raise UserError(
            f"every row was rejected ({format_reasons(sums.reasons)}); {run / 'rejected.jsonl'} says why, row by row"
        )
    with durable_file(output_dir / EMPTY_CAPTION_FILE) as file:
        file.write(pickle.dumps(empty_caption, protocol=5))
    splits = _write_metadata(output_dir, sums, split_ratio, seed, verify_full)
    totals = Totals(
        rows=shards[-1].stop,
        written=sums.written,
        samples=sum(sums.counts.values()),
        rejected=dict(sums.reasons.most_common()),
        captions_cut=sums.captions_cut,
        shards=len(sums.counts),
        num_bytes=sums.num_bytes,
        batches_halved=sums.batches_halved,
        stage_seconds=_rounded(sums.stage_seconds),
        stage_cpu_seconds=_rounded(sums.stage_cpu_seconds),
        left_out=sums.stats.report()["left_out"],
        splits={name: sum(sums.counts[file] for file in files) for name, files in splits.items()},
    )
    write_json(run / "stats.json", {**vars(totals), **sums.stats.report()})
    return totals


@dataclass
class _LedgerSums:
    """What is added up entry by entry. counts: samples of each tar; sha256: of each."""

    counts: dict[str, int] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    stage_seconds: Counter[str] = field(default_factory=Counter)
    stage_cpu_seconds: Counter[str] = field(default_factory=Counter)
    written: int = 0
    captions_cut: int = 0
    batches_halved: int = 0
    num_bytes: int = 0
    stats: DatasetStats = field(default_factory=DatasetStats)

    def add(self, entry: LedgerEntry) -> None:
        if entry.file is not None:
            assert entry.sha256 is not None
            self.counts[entry.file] = entry.samples
            self.sha256[entry.file] = entry.sha256
        self.written += entry.written
        self.reasons.update(row["reason"] for row in entry.rejected)
        self.stage_seconds.update(entry.stage_seconds)
        self.stage_cpu_seconds.update(entry.stage_cpu_seconds)
        self.batches_halved += len(entry.batches_halved)
        self.captions_cut += entry.captions_cut
        self.num_bytes += entry.num_bytes
        self.stats.add_json(entry.stats)


def read_one_batch(output_dir: Path, split_ratio: Sequence[float]) -> None:
    """Open the dataset as training will and take a batch: what can't be read back was not written."""
    if "train" not in asked_splits(split_ratio):
        return
    from diffusion_data.diffusion_energon_datamodule import DiffusionDataModule
    from diffusion_data.parallel_ranks import DataParallel

    datamodule = DiffusionDataModule(
        str(output_dir),
        global_batch_size=1,
        num_workers=0,
        pin_memory=False,
        parallel=DataParallel(rank=0, size=1),  # only this rank reads, however many have written
    )
    next(iter(datamodule.train_dataloader()))


def format_reasons(reasons: dict[str, int]) -> str:
    """ "not_found 3, truncated 1"."""
    return ", ".join(f"{reason} {count}" for reason, count in reasons.items())


def _all_entries(ledger: Ledger, shards: Sequence[Shard]) -> Iterator[LedgerEntry]:
    """The entries in order of the shards.

    Raises:
        UserError: some are missing, also after the time that a network disk may take to show another node's files.
    """
    deadline = time.monotonic() + _SECONDS_UNTIL_FILES_SHOW
    for number, shard in enumerate(shards):
        while (entry := ledger.read(shard)) is None:
            if time.monotonic() > deadline:
                missing = sum(ledger.read(each) is None for each in shards[number:])
                raise UserError(
                    f"{missing} of {len(shards)} shards are not finished ({shard.file_name} is the first); "
                    "run the same command again to finish them"
                )
            time.sleep(0.5)
            ledger.refresh()
        yield entry


def _rounded(seconds: Counter[str]) -> dict[str, float]:
    return {stage: round(total, 3) for stage, total in seconds.items()}


def _write_metadata(
    output_dir: Path, sums: _LedgerSums, split_ratio: Sequence[float], seed: int, full: bool
) -> dict[str, list[str]]:
    """Make `.nv-meta`, unless it is there already of these shards, with these splits, as it was written."""
    files = list(sums.counts)
    splits = assign_splits(files, split_ratio, seed)
    if metadata_faults(output_dir, sums.sha256, full) == []:
        written = yaml.safe_load((output_dir / META_FOLDER / "split.yaml").read_text())
        if written["split_parts"] == splits:
            return splits
    try:
        write_energon_metadata(output_dir, files, split_ratio, seed, sums.counts)
    except RuntimeError as error:
        raise UserError(
            f"output_dir: {error}; make room or mend the disk, and run the same command again with verify=full"
        ) from error
    record_metadata(output_dir, sums.sha256)
    return splits
