"""prepare(config): parquet rows in, a finished dataset out. The whole job, as every rank runs it.

    rank 0 plans       sources, fingerprint, which shards are still to do
    all ranks encode   claim a shard, decode its rows, encode, write; until none is left
    rank 0 finishes    .nv-meta, statistics, one batch read back as training would

torchrun starts one rank a GPU; the same command again finishes what is missing and does nothing else.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from diffusion_data.batching import free_bytes
from diffusion_data.command_line import options_to_dataclass, run
from diffusion_data.distributed import Ranks, usable_cpus
from diffusion_data.durable_file import explained
from diffusion_data.encode_shards import decode_workers, encode_shards, num_decode_workers, num_encode_threads
from diffusion_data.encoders import Encoders, load_encoders, set_up_torch
from diffusion_data.finish import Totals, finish_dataset, read_one_batch
from diffusion_data.forecast import make_forecast
from diffusion_data.forecast_text import Machines, forecast_text
from diffusion_data.job_report import write_job_report
from diffusion_data.prepare_config import PrepareConfig
from diffusion_data.prepare_job import open_source, plan_job, planned_shards, with_retries
from diffusion_data.process_func_options import row_decoder
from diffusion_data.process_server import start_process_server
from diffusion_data.progress import Progress
from diffusion_data.stage_times import StageTimes
from diffusion_data.summary import summary


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
                job = plan_job(config, ranks, encoders, until_finished)
                if job.todo or job.retry:
                    until_encoded.enter_context(closing(job.source))
                    workers = until_encoded.enter_context(decode_workers(config, ranks, job.encoders.tokenizer))
                if job.retry:
                    job = with_retries(config, ranks, job, workers)
                num_todo = sum(shard.num_rows for shard in job.todo)
            with phases.busy("encode"), Progress(ranks, job.source.num_rows, job.source.num_rows - num_todo):
                if job.todo:
                    encode_shards(config, ranks, job, workers)
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
        if config.report:
            decoder = partial(row_decoder, config)
            told = write_job_report(output_dir, job.source, decoder, job.encoders.tokenizer, config.tokenizer)
            if told is not None:
                print(told)
    return totals


def _forecast(config: PrepareConfig, ranks: Ranks, encoders: Encoders | None) -> str:
    """What plan=true prints."""
    device = ranks.device(config.device)
    set_up_torch(device)
    with closing(open_source(config, ranks)) as source:
        encoders = encoders or load_encoders(config, device)
        shards = planned_shards(config, source, encoders)
        machines = Machines(
            num_ranks=config.plan_gpus or ranks.world_size,
            ranks_per_node=ranks.local_world_size,
            processors_per_node=usable_cpus(),
            num_workers=num_decode_workers(config, ranks),
            encode_threads=None if device.type == "cuda" else num_encode_threads(config, ranks),
            price_per_hour=config.plan_price,
        )
        with decode_workers(config, ranks, encoders.tokenizer) as workers:
            budgets = config.batching.budgets(free_bytes(device))
            forecast = make_forecast(source, workers, encoders.tokenizer, encoders.text_encoder, budgets)
    return forecast_text(forecast, shards, machines, config.text_encoder.max_length, config.max_reject_rate)


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
