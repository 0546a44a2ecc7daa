"""The ledger's entries -> what stands beside the shards: rejected rows, statistics, energon's metadata.

Nothing here reads a shard again, but for energon's index and one batch.
"""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from diffusion_data.dataset_stats import DatasetStats
from diffusion_data.durable_file import durable_file, write_json
from diffusion_data.energon_metadata import META_FOLDER, write_energon_metadata
from diffusion_data.errors import UserError
from diffusion_data.ledger import Ledger, LedgerEntry
from diffusion_data.shard_plan import Shard, asked_splits, assign_splits

EMPTY_CAPTION = "empty_caption.pickle"


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over the ledger."""

    rows: int
    written: int
    rejected: dict[str, int]
    captions_cut: int
    shards: int
    num_bytes: int
    batches_halved: int
    stage_seconds: dict[str, float]
    stage_cpu_seconds: dict[str, float]
    splits: dict[str, int]


def finish_dataset(
    output_dir: Path,
    ledger: Ledger,
    shards: Sequence[Shard],
    split_ratio: Sequence[float],
    seed: int,
    empty_caption: np.ndarray,
) -> Totals:
    """Write everything beside the shards.

    Raises:
        UserError: a shard has no ledger entry, or no row was written at all.
    """
    entries = _all_entries(ledger, shards)
    run = output_dir / "run"
    with durable_file(run / "rejected.jsonl") as file:
        for entry in entries:
            for row in entry.rejected:
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    reasons = Counter(row["reason"] for entry in entries for row in entry.rejected)
    files = [entry.file for entry in entries if entry.file is not None]
    if not files:
        raise UserError(
            f"every row was rejected ({format_reasons(reasons)}); {run / 'rejected.jsonl'} says why, row by row"
        )
    with durable_file(run / EMPTY_CAPTION) as file:
        file.write(pickle.dumps(empty_caption, protocol=5))
    splits = _write_metadata(output_dir, files, split_ratio, seed)
    counts = {entry.file: entry.written for entry in entries}
    totals = Totals(
        rows=shards[-1].stop,
        written=sum(entry.written for entry in entries),
        rejected=dict(reasons.most_common()),
        captions_cut=sum(entry.captions_cut for entry in entries),
        shards=len(files),
        num_bytes=sum(entry.num_bytes for entry in entries),
        batches_halved=sum(len(entry.batches_halved) for entry in entries),
        stage_seconds=_summed(entry.stage_seconds for entry in entries),
        stage_cpu_seconds=_summed(entry.stage_cpu_seconds for entry in entries),
        splits={name: sum(counts[file] for file in names) for name, names in splits.items()},
    )
    stats = DatasetStats.sum_of(entry.stats for entry in entries)
    write_json(run / "stats.json", {**vars(totals), **stats.report()})
    return totals


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


def _all_entries(ledger: Ledger, shards: Sequence[Shard]) -> list[LedgerEntry]:
    entries = [ledger.read(shard) for shard in shards]
    missing = [shard.file_name for shard, entry in zip(shards, entries, strict=True) if entry is None]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(shards)} shards are not finished ({', '.join(missing[:3])} ...); "
            "run the same command again to finish them"
        )
    return [entry for entry in entries if entry is not None]


def _summed(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for seconds in parts:
        total.update(seconds)
    return {stage: round(seconds, 3) for stage, seconds in total.items()}


def _write_metadata(
    output_dir: Path, files: Sequence[str], split_ratio: Sequence[float], seed: int
) -> dict[str, list[str]]:
    """Make `.nv-meta`, unless it is there already with these splits: then nothing has changed."""
    splits = assign_splits(files, split_ratio, seed)
    folder = output_dir / META_FOLDER
    if (folder / "dataset.yaml").exists():
        written = yaml.safe_load((folder / "split.yaml").read_text())
        if written["split_parts"] == splits:
            return splits
    return write_energon_metadata(output_dir, files, split_ratio, seed)
