"""prepare(config): parquet rows in, a finished dataset out. The whole job, as every rank runs it.

    rank 0 plans       sources, fingerprint, which shards are still to do
    all ranks encode   claim a shard, decode its rows, encode, write; until none is left
    rank 0 finishes    .nv-meta, statistics, one batch read back as training would

torchrun starts one rank a GPU; the same command again finishes what is missing and does nothing else.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from diffusion_data.batching import Budgets, fingerprint_fields, free_bytes
from diffusion_data.busy_shares import BusyShares
from diffusion_data.captions import template_columns
from diffusion_data.command_line import options_to_dataclass, run
from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.decode_workers import DecodeWorkers
from diffusion_data.distributed import Ranks, usable_cpus
from diffusion_data.durable_file import explained
from diffusion_data.encode_pipeline import EncodedShard, EncodePipeline
from diffusion_data.errors import UserError
from diffusion_data.fingerprint import fields_before, files_digest, library_versions, module_digest
from diffusion_data.finish import Totals, finish_dataset, read_one_batch
from diffusion_data.forecast import make_forecast
from diffusion_data.forecast_text import Machines, forecast_text
from diffusion_data.job_report import write_job_report
from diffusion_data.latent_sample import FORMAT_VERSION, RESERVED_FIELDS
from diffusion_data.ledger import Ledger, LedgerEntry
from diffusion_data.prepare_config import PrepareConfig
from diffusion_data.process_server import start_process_server
from diffusion_data.progress import Progress
from diffusion_data.reject_limit import RejectLimit
from diffusion_data.resize import resampler
from diffusion_data.retries import shards_that_gain
from diffusion_data.row_decoder import RowDecoder, handed_over, resolve_process_func
from diffusion_data.run_folder import RunFolder
from diffusion_data.run_lock import RunLock, run_lock
from diffusion_data.shard_plan import Shard, plan_shards
from diffusion_data.shard_writer import ShardWriter
from diffusion_data.sources import ParquetSource, SourceFile
from diffusion_data.stage_times import StageTimes
from diffusion_data.summary import summary
from diffusion_data.t5_text_encoder import T5TextEncoder

_SHARDS_BEING_WRITTEN = 2  # finished by the device, not yet on disk: bounds memory if the disk is slow

_ASSUMED_SIDE = 1024  # pixels, where media keep their size
_ASSUMED_TOKENS = 80

# Options that decide whether a row's media can be had, but not what comes of it.
_WAYS_TO_FETCH = (
    "allowed_roots", "allowed_hosts", "fetch_timeout_seconds", "fetch_retries", "max_redirects",
    "max_connections_per_host", "max_fetch_bytes",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """The two models, on this rank's device."""

    tokenizer: CosmosTokenizer
    text_encoder: T5TextEncoder


def prepare(config: PrepareConfig, encoders: Encoders | None = None, phases: StageTimes | None = None) -> Totals | None:
    """Run the job on this rank. Returns the dataset's totals on rank 0, None on the others, and after plan=true.

    encoders: ready ones instead of those that the config names
    phases: gets the seconds of "start up", "encode" and "finish"

    Raises:
        UserError: whatever the user can mend; nothing that was finished is lost by it.
    """
    start_process_server()
    with Ranks.connect() as ranks:
        if config.plan:
            if ranks.rank == 0:
                print(_forecast(config, ranks, encoders))
            return None
        return _prepare(config, ranks, encoders, phases or StageTimes())


def _prepare(config: PrepareConfig, ranks: Ranks, encoders: Encoders | None, phases: StageTimes) -> Totals | None:
    output_dir = Path(config.output_dir)
    with ExitStack() as until_finished:
        with ExitStack() as until_encoded:
            with phases.busy("start up"):
                job = _plan(config, ranks, encoders, until_finished)
                if job.todo or job.retry:
                    until_encoded.enter_context(closing(job.source))
                    workers = until_encoded.enter_context(_decode_workers(config, ranks, job.encoders.tokenizer))
                if job.retry:
                    job = _with_retries(config, ranks, job, workers)
                num_todo = sum(shard.num_rows for shard in job.todo)
            with phases.busy("encode"), Progress(ranks, job.source.num_rows, job.source.num_rows - num_todo):
                if job.todo:
                    _encode_shards(config, ranks, job, workers)
                ranks.publish(f"finished/{ranks.rank}", True)
                if ranks.rank != 0:
                    return None
                for rank in range(ranks.world_size):
                    ranks.receive(f"finished/{rank}", publisher=rank)
        with phases.busy("finish"), explained(output_dir):
            job.lock.check()
            empty_caption = job.encoders.text_encoder.encode([""])[0]
            totals = finish_dataset(
                output_dir,
                job.ledger,
                job.shards,
                config.split_ratio,
                config.seed,
                empty_caption,
                verify_full=config.verify == "full",
            )
            read_one_batch(output_dir, config.split_ratio)
        print(summary(config, totals, num_todo, phases.seconds()), flush=True)
        if config.report and num_todo:
            decoder = partial(row_decoder, config)
            print(write_job_report(output_dir, job.source, decoder, job.encoders.tokenizer, config.tokenizer))
    return totals


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What every rank knows when it begins to encode.

    todo: shards that are to be made
    retry: shards that are there, of which rejected rows are to be tried again
    """

    encoders: Encoders
    source: ParquetSource
    shards: list[Shard]
    todo: list[Shard]
    retry: list[Shard]
    ledger: Ledger
    lock: RunLock
    budgets: Budgets


def _plan(config: PrepareConfig, ranks: Ranks, encoders: Encoders | None, until_finished: ExitStack) -> _Job:
    """Rank 0 opens the source and the output folder; the others are told what it found.

    The output folder is this run's alone `until_finished`.
    """
    device = ranks.device(config.device)
    _set_up_torch(device)
    source = _open_source(config, ranks)
    folder = RunFolder(Path(config.output_dir))
    if ranks.rank == 0:
        folder.check()
    lock = until_finished.enter_context(run_lock(folder.output_dir, ranks))
    encoders = encoders or load_encoders(config, device)
    shards = _planned(config, source, encoders)
    if ranks.rank == 0:
        before = fields_before(folder.run / "fingerprint.json").get("batching")
        budgets = config.batching.budgets(free_bytes(device), before)
        ledger = folder.open(_fingerprint(config, source, shards, encoders, budgets), asdict(config))
        todo, retry = (
            [shard.number for shard in some]
            for some in folder.unfinished(
                shards,
                ledger,
                max_reject_rate=config.max_reject_rate,
                retry_rejected=config.retry_rejected,
                verify=config.verify,
            )
        )
        told = {"todo": todo, "retry": retry, "fingerprint": ledger.fingerprint, "budgets": asdict(budgets)}
        ranks.publish("plan", told)
    plan = ranks.receive("plan")
    return _Job(
        encoders=encoders,
        source=source,
        shards=shards,
        todo=[shards[number] for number in plan["todo"]],
        retry=[shards[number] for number in plan["retry"]],
        ledger=Ledger(folder.output_dir, plan["fingerprint"]),
        lock=lock,
        budgets=Budgets(**plan["budgets"]),
    )


def _planned(config: PrepareConfig, source: ParquetSource, encoders: Encoders) -> list[Shard]:
    sample_bytes = _estimated_sample_bytes(config, encoders)
    return plan_shards(source.num_rows, config.samples_per_shard, config.split_ratio, sample_bytes)


def _estimated_sample_bytes(config: PrepareConfig, encoders: Encoders) -> int:
    """Of a square picture, or of a clip of `media.num_frames`, with a caption of usual length."""
    tokenizer = encoders.tokenizer
    side = (config.media.short_side or _ASSUMED_SIDE) // tokenizer.spatial_compression
    frames = 1 + ((config.media.num_frames or 1) - 1) // tokenizer.temporal_compression
    values = tokenizer.latent_channels * frames * side**2 + _ASSUMED_TOKENS * encoders.text_encoder.embedding_dim
    return 2 * values


def _forecast(config: PrepareConfig, ranks: Ranks, encoders: Encoders | None) -> str:
    """What plan=true prints."""
    device = ranks.device(config.device)
    _set_up_torch(device)
    with closing(_open_source(config, ranks)) as source:
        encoders = encoders or load_encoders(config, device)
        shards = _planned(config, source, encoders)
        machines = Machines(
            num_ranks=config.plan_gpus or ranks.world_size,
            num_workers=_num_workers(config, ranks),
            threads=None if device.type == "cuda" else _share_of_processors(ranks),
            price_per_hour=config.plan_price,
        )
        with _decode_workers(config, ranks, encoders.tokenizer) as workers:
            budgets = config.batching.budgets(free_bytes(device))
            forecast = make_forecast(source, workers, encoders.tokenizer, encoders.text_encoder, budgets)
    return forecast_text(forecast, shards, machines, config.text_encoder.max_length, config.max_reject_rate)


def _with_retries(config: PrepareConfig, ranks: Ranks, job: _Job, workers: DecodeWorkers) -> _Job:
    """With the shards to do, of those to retry, that can gain rows now."""
    gaining = shards_that_gain(ranks, job.retry, job.ledger, job.source, workers)
    if ranks.rank == 0:
        print(f"rows that the network failed: in {len(gaining)} of {len(job.retry)} shards some can be had now")
        if gaining:
            RunFolder(Path(config.output_dir)).drop_metadata()
    numbers = sorted(gaining.union(shard.number for shard in job.todo))
    return replace(job, todo=[job.shards[number] for number in numbers])


def load_encoders(config: PrepareConfig, device: torch.device) -> Encoders:
    """The models that the config names, read from disk or fetched."""
    tokenizer, text_encoder = config.tokenizer, config.text_encoder
    return Encoders(
        tokenizer=CosmosTokenizer.from_pretrained(
            tokenizer.name, tokenizer.cache_dir, device, tokenizer.torch_dtype, decoder=False
        ),
        text_encoder=T5TextEncoder.from_pretrained(
            text_encoder.name, text_encoder.cache_dir, text_encoder.max_length, device, text_encoder.torch_dtype
        ),
    )


def _set_up_torch(device: torch.device) -> None:
    """Make results repeatable: on a CPU they depend on the number of threads, on a GPU on cuDNN's choice."""
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = True


def _open_source(config: PrepareConfig, ranks: Ranks) -> ParquetSource:
    """Rank 0 reads the footers and checks the options that name columns; the others are told."""
    if ranks.rank == 0:
        source = ParquetSource.open(config.source.path)
        if source.num_rows == 0:
            raise UserError(f"source.path: {config.source.path} has no rows")
        source.require_columns(_named_columns(config))
        ranks.publish("source", [asdict(file) for file in source.files])
        return source
    return ParquetSource([SourceFile.from_json(file) for file in ranks.receive("source")])


def _named_columns(config: PrepareConfig) -> dict[str, str]:
    """Columns that options name, and the option of each."""
    arguments = _arguments(config)
    columns = dict.fromkeys(config.metadata_columns, "metadata_columns")
    for name, value in arguments.items():
        if name.endswith(("_column", "_columns")):
            for column in [value] if isinstance(value, str) else value or ():
                columns[column] = f"process_func.{name}"
        if name.endswith("_template") and value is not None:
            for column in template_columns(value, f"process_func.{name}"):
                columns[column] = f"process_func.{name}"
    taken = RESERVED_FIELDS.intersection(config.metadata_columns)
    if taken:
        raise UserError(
            f"metadata_columns: {', '.join(sorted(taken))} would overwrite fields that every sample's json has"
        )
    return columns


def _arguments(config: PrepareConfig) -> dict[str, Any]:
    """The process function's arguments, with the defaults of those that the recipe leaves out.

    Raises:
        UserError: there is no such function, or it can't be called with these.
    """
    target = config.process_func.get("_target_")
    if not isinstance(target, str):
        raise UserError("process_func._target_: name the function, e.g. my_dataset.process_row")
    function = resolve_process_func(target)
    signature = inspect.signature(function)
    given = {name: value for name, value in config.process_func.items() if name != "_target_"}
    ours = dict.fromkeys(handed_over(function))
    try:
        bound = signature.bind({}, **given, **ours)
    except TypeError as error:
        raise UserError(f"process_func: {target}{signature} can't be called: {error}") from error
    bound.apply_defaults()
    row, *_ = bound.arguments
    variadic = [name for name, each in signature.parameters.items() if each.kind is each.VAR_KEYWORD]
    named = {name: value for name, value in bound.arguments.items() if name not in (row, *ours, *variadic)}
    return named | {name: value for each in variadic for name, value in bound.arguments[each].items()}


def row_decoder(config: PrepareConfig, tokenizer: CosmosTokenizer) -> RowDecoder:
    return RowDecoder(
        process_func=config.process_func["_target_"],
        arguments=_arguments(config),
        metadata_columns=tuple(config.metadata_columns),
        media=config.media,
        temporal_compression=tokenizer.temporal_compression,
        # A DiT cuts latents into patches of 2 x 2, so sides are multiples of two latent pixels.
        size_multiple=2 * tokenizer.spatial_compression,
        empty_captions=config.empty_captions,
        seed=config.seed,
    )


def _fingerprint(
    config: PrepareConfig, source: ParquetSource, shards: list[Shard], encoders: Encoders, budgets: Budgets
) -> dict[str, Any]:
    """Everything that changes a shard's bytes. Not in it: ranks, workers, splits, where models are cached."""
    tokenizer, text_encoder = encoders.tokenizer, encoders.text_encoder
    function = resolve_process_func(config.process_func["_target_"])
    return {
        "format_version": FORMAT_VERSION,
        "source": [
            {
                "name": file.name,
                "num_rows": file.num_rows,
                "num_bytes": file.num_bytes,
                "footer_sha256": file.footer_sha256,
            }
            for file in source.files
        ],
        "samples_per_shard": shards[0].num_rows,
        "process_func": {
            "_target_": config.process_func["_target_"],
            **_arguments(config),
            "module_sha256": module_digest(function),
            **({"seed": config.seed} if "rng" in handed_over(function) else {}),
        },
        "metadata_columns": list(config.metadata_columns),
        "empty_captions": config.empty_captions,
        "media": {name: value for name, value in asdict(config.media).items() if name not in _WAYS_TO_FETCH},
        "versions": library_versions(),
        "resampler": resampler(),
        "tokenizer": {
            "files_sha256": files_digest(tokenizer.weight_files),
            "dtype": str(tokenizer.dtype),
            "compile": config.tokenizer.compile,
        },
        "text_encoder": {
            "files_sha256": files_digest(text_encoder.weight_files),
            "dtype": str(text_encoder.dtype),
            "max_length": config.text_encoder.max_length,
        },
        "batching": fingerprint_fields(budgets),
        "device": tokenizer.device.type,
    }


def _encode_shards(config: PrepareConfig, ranks: Ranks, job: _Job, workers: DecodeWorkers) -> None:
    """Claim, decode, encode and write until no shard is left; the four run at the same time."""
    threads = _share_of_processors(ranks) if config.encode_threads is None else config.encode_threads
    encoders, compiled = job.encoders, config.tokenizer.compile
    pipeline = EncodePipeline(encoders.tokenizer, encoders.text_encoder, job.budgets, threads, compiled)
    num_encoders = 1 if encoders.tokenizer.device.type == "cuda" else max(1, threads)
    busy = BusyShares(ranks, {"decoding": max(1, _num_workers(config, ranks)), "encoders": num_encoders, "writing": 1})
    writer = ShardWriter(Path(config.output_dir), job.ledger)
    before = {shard.number: job.ledger.read(shard) for shard in job.retry}
    shards = ranks.claimed(job.todo, "shards_claimed")
    rows = ((shard, row) for shard in shards for row in job.source.read_rows(shard.start, shard.stop))
    limit = RejectLimit(ranks, config.max_reject_rate)
    with ThreadPoolExecutor(1, thread_name_prefix="shard writer") as writing:
        pending: deque[Future[LedgerEntry | None]] = deque()

        def finish_oldest() -> None:
            if (entry := pending.popleft().result()) is not None:
                limit.shard_written(entry)

        for encoded in pipeline.run(limit.watch(workers.map(rows))):
            pending.append(writing.submit(_write, writer, job.lock, busy, encoded, before.get(encoded.shard.number)))
            while len(pending) > _SHARDS_BEING_WRITTEN or (pending and pending[0].done()):
                finish_oldest()
        while pending:
            finish_oldest()
        limit.count()


def _write(
    writer: ShardWriter, lock: RunLock, busy: BusyShares, encoded: EncodedShard, before: LedgerEntry | None
) -> LedgerEntry | None:
    """The shard's entry, or None if it stays as it was `before`."""
    try:
        lock.check()
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


def _decode_workers(config: PrepareConfig, ranks: Ranks, tokenizer: CosmosTokenizer) -> DecodeWorkers:
    number = _num_workers(config, ranks)
    timeout_seconds = config.row_timeout_seconds if number else None  # in this process nothing can be stopped
    return DecodeWorkers(row_decoder(config, tokenizer), number, timeout_seconds)


def _num_workers(config: PrepareConfig, ranks: Ranks) -> int:
    return _share_of_processors(ranks) if config.num_workers is None else config.num_workers


def _share_of_processors(ranks: Ranks) -> int:
    return max(1, usable_cpus() // ranks.local_world_size)


def prepare_from_command_line(options: DictConfig) -> None:
    prepare(options_to_dataclass(PrepareConfig, options, ""))


def main() -> None:
    """Entry point of scripts/prepare_energon_dataset.py and of diffusion-data-prepare."""
    sys.path.insert(0, os.getcwd())  # a process_func beside the user's recipe is found as `python -m` finds it
    run(
        prepare_from_command_line,
        "prepare",
        hints={"source.path": "a parquet file, folder, glob or URL", "output_dir": "the dataset's folder"},
        interrupted="interrupted; what is finished is kept: run the same command again to go on",
    )
