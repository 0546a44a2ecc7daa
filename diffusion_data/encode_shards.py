"""Shards that are to be made -> tars and ledger entries: the main loop of every rank."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

from diffusion_data.busy_shares import BusyShares
from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.decode_workers import DecodeWorkers
from diffusion_data.distributed import Ranks, usable_cpus
from diffusion_data.encode_pipeline import EncodedShard, EncodePipeline
from diffusion_data.encoded_share import EncodedCounts
from diffusion_data.errors import UserError
from diffusion_data.ledger import LedgerEntry
from diffusion_data.prepare_config import PrepareConfig
from diffusion_data.prepare_job import Job
from diffusion_data.process_func_options import row_decoder
from diffusion_data.reject_limit import RejectLimit, Standing
from diffusion_data.shard_writer import ShardWriter

_SHARDS_BEING_WRITTEN = 2  # finished by the device, not yet on disk: bounds memory if the disk is slow


def encode_shards(config: PrepareConfig, ranks: Ranks, job: Job, workers: DecodeWorkers) -> None:
    """Claim, decode, encode and write until no shard is left; the four run at the same time."""
    threads = num_encode_threads(config, ranks)
    encoders, compiled = job.encoders, config.tokenizer.compile
    counts = EncodedCounts(ranks)
    pipeline = EncodePipeline(encoders.tokenizer, encoders.text_encoder, job.budgets, threads, compiled, counts.add)
    num_encoders = 1 if encoders.tokenizer.device.type == "cuda" else max(1, threads)
    num_decoders = max(1, num_decode_workers(config, ranks))
    busy = BusyShares(ranks, {"decoding": num_decoders, "encoders": num_encoders, "writing": 1})
    writer = ShardWriter(Path(config.output_dir), job.ledger)
    shards = ranks.claimed(job.todo, "shards_claimed")
    rows_of_shards = (zip(repeat(shard), job.source.read_rows(shard.start, shard.stop)) for shard in shards)
    standing = Standing.of(job.shards, job.todo, job.num_rejected)
    limit = RejectLimit(ranks, config.max_reject_rate, standing)
    with ThreadPoolExecutor(1, thread_name_prefix="shard writer") as writing:
        pending: deque[Future[LedgerEntry | None]] = deque()

        def finish_oldest() -> None:
            if (entry := pending.popleft().result()) is not None:
                limit.shard_written(entry)

        for encoded in pipeline.run(limit.watch(workers.map_groups(rows_of_shards))):
            pending.append(writing.submit(_write, writer, job, busy, encoded))
            while len(pending) > _SHARDS_BEING_WRITTEN or (pending and pending[0].done()):
                finish_oldest()
        while pending:
            finish_oldest()
        limit.count()
        counts.tell()


def _write(writer: ShardWriter, job: Job, busy: BusyShares, encoded: EncodedShard) -> LedgerEntry | None:
    """The shard's entry, or None if it stays as it was."""
    try:
        job.lock.check()
        before = job.ledger.read(encoded.shard) if encoded.shard in job.retry else None
        entry = writer.write(encoded, before)
    except OSError as error:
        raise UserError(
            f"output_dir: can't write {encoded.shard.file_name}: {error}; what is finished is kept: "
            "make room or mend the disk and run the same command again"
        ) from error
    if entry is before:
        print(f"{encoded.shard.file_name} stays as it was: now other rows of it failed")
        return None
    busy.add(entry.stage_seconds)
    return entry


def decode_workers(config: PrepareConfig, ranks: Ranks, tokenizer: CosmosTokenizer) -> DecodeWorkers:
    number = num_decode_workers(config, ranks)
    timeout_seconds = config.row_timeout_seconds if number else None  # in this process nothing can be stopped
    return DecodeWorkers(row_decoder(config, tokenizer), number, timeout_seconds)


def num_decode_workers(config: PrepareConfig, ranks: Ranks) -> int:
    return share_of_processors(ranks) if config.num_workers is None else config.num_workers


def num_encode_threads(config: PrepareConfig, ranks: Ranks) -> int:
    """On a CPU; 0 encodes in line."""
    return share_of_processors(ranks) if config.encode_threads is None else config.encode_threads


def share_of_processors(ranks: Ranks) -> int:
    return max(1, usable_cpus() // ranks.local_world_size)
