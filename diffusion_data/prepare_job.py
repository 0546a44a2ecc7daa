"""What is to be done: sources, models, the output folder and its lock, and which shards are missing.

Rank 0 finds out and tells the others.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from diffusion_data.batching import Budgets, free_bytes
from diffusion_data.decode_workers import DecodeWorkers
from diffusion_data.distributed import Ranks
from diffusion_data.encoders import Encoders, load_encoders, set_up_torch
from diffusion_data.errors import UserError
from diffusion_data.fingerprint import fields_before
from diffusion_data.ledger import Ledger
from diffusion_data.prepare_config import PrepareConfig
from diffusion_data.process_func_options import named_columns, row_decoder
from diffusion_data.retries import shards_that_gain
from diffusion_data.run_fingerprint import run_fingerprint
from diffusion_data.run_folder import RunFolder
from diffusion_data.run_lock import RunLock, run_lock
from diffusion_data.shard_plan import Shard, plan_shards
from diffusion_data.sources import ParquetSource, SourceFile

_ASSUMED_SIDE = 1024  # pixels, where media keep their size
_ASSUMED_TOKENS = 80


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every rank knows when it begins to encode.

    todo: shards that are to be made
    retry: shards that are there, of which rejected rows are to be tried again
    num_rejected: rows that each of `shards` rejects; None if it isn't finished
    """

    encoders: Encoders
    source: ParquetSource
    shards: list[Shard]
    todo: list[Shard]
    retry: list[Shard]
    num_rejected: list[int | None]
    ledger: Ledger
    lock: RunLock
    budgets: Budgets


def plan_job(config: PrepareConfig, ranks: Ranks, encoders: Encoders | None, until_finished: ExitStack) -> Job:
    """Rank 0 opens the source and the output folder; the others are told what it found.

    The output folder is this run's alone `until_finished`.
    """
    device = ranks.device(config.device)
    set_up_torch(device)
    source = open_source(config, ranks)
    folder = RunFolder(Path(config.output_dir))
    if ranks.rank == 0:
        folder.check()
    lock = until_finished.enter_context(run_lock(folder.output_dir, ranks))
    encoders = encoders or load_encoders(config, device)
    shards = planned_shards(config, source, encoders)
    if ranks.rank == 0:
        row_decoder(config, encoders.tokenizer)  # refuses options while no folder belongs to them yet
        before = fields_before(folder.run / "fingerprint.json").get("batching")
        budgets = config.batching.budgets(free_bytes(device), before)
        ledger = folder.open(run_fingerprint(config, source, shards, encoders, budgets), asdict(config))
        unfinished = folder.unfinished(
            shards,
            ledger,
            max_reject_rate=config.max_reject_rate,
            retry_rejected=config.retry_rejected,
            verify=config.verify,
        )
        told = {
            "todo": [shard.number for shard in unfinished.todo],
            "retry": [shard.number for shard in unfinished.retry],
            "num_rejected": unfinished.num_rejected,
            "fingerprint": ledger.fingerprint,
            "budgets": asdict(budgets),
        }
        ranks.publish("plan", told)
    plan = ranks.receive("plan")
    return Job(
        encoders=encoders,
        source=source,
        shards=shards,
        todo=[shards[number] for number in plan["todo"]],
        retry=[shards[number] for number in plan["retry"]],
        num_rejected=plan["num_rejected"],
        ledger=Ledger(folder.output_dir, plan["fingerprint"]),
        lock=lock,
        budgets=Budgets(**plan["budgets"]),
    )


def open_source(config: PrepareConfig, ranks: Ranks) -> ParquetSource:
    """Rank 0 reads the footers and checks the options that name columns; the others are told."""
    if ranks.rank == 0:
        source = ParquetSource.open(config.source.path)
        if source.num_rows == 0:
            raise UserError(f"source.path: {config.source.path} has no rows")
        source.require_columns(named_columns(config))
        ranks.publish("source", [asdict(file) for file in source.files])
        return source
    return ParquetSource([SourceFile.from_json(file) for file in ranks.receive("source")])


def planned_shards(config: PrepareConfig, source: ParquetSource, encoders: Encoders) -> list[Shard]:
    row_bytes = _estimated_row_bytes(config, encoders)
    return plan_shards(source.num_rows, config.samples_per_shard, config.split_ratio, row_bytes)


def _estimated_row_bytes(config: PrepareConfig, encoders: Encoders) -> int:
    """Of all samples of a row: as many square pictures, or clips, as it may become, with captions of usual length."""
    tokenizer, media = encoders.tokenizer, config.media
    longest, _ = media.longest_clip
    frames = 1 + ((longest or 1) - 1) // tokenizer.temporal_compression
    values = 0
    for short_side in (media.short_side or _ASSUMED_SIDE, *media.extra_short_sides):
        side = short_side // tokenizer.spatial_compression
        values += tokenizer.latent_channels * frames * side**2 + _ASSUMED_TOKENS * encoders.text_encoder.embedding_dim
    clips = 1 if media.clips.num_frames is None else media.clips.max_per_row
    return 2 * values * clips * (2 if media.mirror else 1)


def with_retries(config: PrepareConfig, ranks: Ranks, job: Job, workers: DecodeWorkers) -> Job:
    """With the shards to do, of those to retry, that can gain rows now."""
    drop = RunFolder(Path(config.output_dir)).drop_what_was_finished
    gaining = shards_that_gain(ranks, job.retry, job.ledger, job.source, workers, before_any_changes=drop)
    if ranks.rank == 0:
        print(f"rows that the network failed: in {len(gaining)} of {len(job.retry)} shards some can be had now")
    numbers = sorted(gaining.union(shard.number for shard in job.todo))
    return replace(job, todo=[job.shards[number] for number in numbers])
