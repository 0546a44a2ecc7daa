"""How fast the job prepares rows, beside what its encoders could and beside the way of the original pipeline.

    python scripts/bench_prepare.py                                    # small models with random weights, on a CPU
    python scripts/bench_prepare.py --pixels 256
    python scripts/bench_prepare.py --tokenizer CV4x8x8 --text-encoder t5-11b --pixels 512 --rows 4096 --device cuda

Everything is measured in one run on the same rows and models. The original's way: one row at a time in float32, text
padded to 512 tokens, pixels scaled through float64, decoding and webdataset's ShardWriter in line, all processors.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from bench_ceilings import Ceiling, ceilings
from bench_material import Material, make_encoders, write_rows
from bench_original import original_way

from diffusion_data.batching import BatchingConfig, free_bytes
from diffusion_data.distributed import usable_cpus
from diffusion_data.encoders import Encoders
from diffusion_data.finish import Totals
from diffusion_data.media import MediaConfig
from diffusion_data.prepare_config import PrepareConfig, TextEncoderConfig, TokenizerConfig
from diffusion_data.prepare_energon_dataset import prepare
from diffusion_data.sources import SourceConfig
from diffusion_data.stage_times import WAITS, StageTimes


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the prepare job.")
    parser.add_argument("--tokenizer", default="small-cosmos", help="small-cosmos, CV4x8x8, ..., or a name of weights")
    parser.add_argument("--text-encoder", default="small-t5", help="small-t5, t5-11b, ..., or a name of weights")
    parser.add_argument("--random-weights", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--pixels", type=int, default=128, help="side of the pictures")
    parser.add_argument("--frames", type=int, default=1, help="more than 1: clips")
    parser.add_argument("--caption-words", default="2-12", help="fewest-most")
    parser.add_argument("--rows", type=int, default=768)
    parser.add_argument("--original-rows", type=int, default=32, help="0 leaves the original's way out")
    parser.add_argument("--repeats", type=int, default=3, help="the best counts, of the job and of the original's way")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--processes", type=int, default=1, help="ranks, one a GPU; started by torchrun")
    parser.add_argument("--num-workers", type=int, help="decode processes a rank")
    parser.add_argument("--encode-threads", type=int, help="on a CPU")
    parser.add_argument("--pixels-per-batch", type=int)
    parser.add_argument("--tokens-per-batch", type=int)
    parser.add_argument("--samples-per-shard", type=int, help="default: chosen by the number of rows")
    parser.add_argument("--compile", action="store_true", help="tokenizer.compile")
    parser.add_argument("--channels-last", action="store_true", help="tokenizer.channels_last")
    parser.add_argument(
        "--peak-tflops", type=float, help="what one device can do at most in the models' dtype, to tell the share of it"
    )
    parser.add_argument("--only-job", action="store_true", help="no ceilings and no original: for measuring memory")
    parser.add_argument("--json", type=Path, default=Path("bench_prepare.json"))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of the starter, in torchrun's processes
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    device = torch.device("cuda" if arguments.device != "cpu" and torch.cuda.is_available() else "cpu")
    if arguments.folder is not None:
        run_job(arguments, make_models(arguments, device), arguments.folder)
        return
    with tempfile.TemporaryDirectory(prefix="bench_prepare_") as folder:
        result = measure(arguments, device, Path(folder))
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print_table(result)


def make_models(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype | None = None) -> Encoders:
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    encoders = make_encoders(arguments.tokenizer, arguments.text_encoder, arguments.random_weights, device, dtype)
    if arguments.channels_last:
        encoders.tokenizer.use_channels_last()
    return encoders


def measure(arguments: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    fewest, most = map(int, arguments.caption_words.split("-"))
    material = Material(pixels=arguments.pixels, num_frames=arguments.frames, fewest_words=fewest, most_words=most)
    write_rows(folder / "rows.parquet", arguments.rows, material)
    encoders = make_models(arguments, device)
    alone = {} if arguments.only_job else _ceilings(arguments, encoders, folder)
    rows = _first_rows(folder / "rows.parquet", arguments.original_rows)
    jobs, original = [], []
    for number in range(arguments.repeats):  # alternating, since the machine may change its pace meanwhile
        if arguments.original_rows and not arguments.only_job:
            for threads in sorted({1, usable_cpus()}):  # more lose where others use the machine too
                exact = make_models(arguments, device, torch.float32)
                original.append(original_way(exact, rows, folder / f"original_{number}_{threads}", threads))
        jobs.append(
            run_job(arguments, encoders, folder / f"job_{number}")
            if arguments.processes == 1
            else run_ranks(arguments, folder / f"job_{number}")
        )
    job = min(jobs, key=lambda each: each["phases"]["encode"])
    return {
        "machine": f"{platform.processor() or platform.machine()}, {_processor()}, {usable_cpus()} cores"
        + (f", {torch.cuda.get_device_name()}" if device.type == "cuda" else ""),
        "torch": torch.__version__,
        "arguments": {name: str(value) for name, value in vars(arguments).items() if value is not None},
        "every_samples_per_second": [each["written"] / each["phases"]["encode"] for each in jobs],
        **_rates(arguments, device, job, alone, original),
    }


def _first_rows(path: Path, count: int) -> list[dict[str, Any]]:
    with pq.ParquetFile(path) as file:  # the whole table would count as the job's memory
        batch = next(file.iter_batches(max(1, count)))
    return batch.to_pylist()[:count]


def _ceilings(arguments: argparse.Namespace, encoders: Encoders, folder: Path) -> dict[str, Ceiling]:
    budgets = job_config(arguments, folder / "job").batching.budgets(free_bytes(encoders.tokenizer.device))
    shape = (arguments.frames, arguments.pixels, arguments.pixels, 3)
    captions = pq.read_table(folder / "rows.parquet", columns=["caption"])["caption"].to_pylist()
    size = max(1, min(budgets.pixels // math.prod(shape[:3]), arguments.rows))
    threads = usable_cpus() if arguments.encode_threads is None else arguments.encode_threads
    return ceilings(encoders, budgets, shape, size, list(dict.fromkeys(captions[:512])), threads, arguments.compile)


def _rates(
    arguments: argparse.Namespace,
    device: torch.device,
    job: dict[str, Any],
    alone: dict[str, Ceiling],
    original: list[dict[str, float]],
) -> dict[str, Any]:
    seconds, processors = job["phases"]["encode"], usable_cpus()
    rate = job["written"] / seconds
    cpu_seconds = job["stage_cpu_seconds"]
    if device.type == "cuda":
        each_alone = [each.samples_per_second for each in alone.values()]
        ceiling = arguments.processes / sum(1 / each for each in each_alone) if alone else None
        lanes = dict.fromkeys(("tokenizer", "text_encoder"), arguments.processes)
        used = {stage: job["stage_seconds"].get(stage, 0.0) for stage in lanes}
        used.update({stage: each for stage, each in cpu_seconds.items() if stage not in lanes})
    else:
        ceiling = job["written"] * processors / sum(cpu_seconds.values())
        lanes, used = {}, cpu_seconds
    return {
        "samples_per_second": rate,
        "ceiling_samples_per_second": ceiling,
        "fraction_of_ceiling": rate / ceiling if ceiling else None,
        "encoder_alone": {name: each.figures(arguments.peak_tflops) for name, each in alone.items()},
        "original": original,
        "speedup_over_original": rate / max(each["samples_per_second"] for each in original) if original else None,
        "cpu_seconds_a_sample": sum(cpu_seconds.values()) / job["written"],
        "stages": {
            stage: {"seconds": each, "busy_share": each / seconds / lanes.get(stage, processors)}
            for stage, each in used.items()
        },
        "waiting_share": {
            stage: job["stage_seconds"].get(stage, 0.0) / seconds / arguments.processes for stage in WAITS
        },
        "phase_seconds": job["phases"],
        "resident_bytes": job["resident_bytes"],
    }


def run_job(arguments: argparse.Namespace, encoders: Encoders, folder: Path) -> dict[str, Any]:
    """prepare() on all rows, in this process."""
    phases = StageTimes()
    totals = prepare(job_config(arguments, folder), encoders, phases)
    if totals is None:
        return {}
    job = {**_times(totals), "phases": phases.seconds(), "resident_bytes": _peak_resident_bytes()}
    folder.mkdir(exist_ok=True)
    (folder / "job.json").write_text(json.dumps(job))
    return job


def run_ranks(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """prepare() on all rows, in processes that torchrun starts."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [f"--nproc_per_node={arguments.processes}", __file__, *sys.argv[1:], "--folder", str(folder)]
    subprocess.run([*launcher, *command], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    job: dict[str, Any] = json.loads((folder / "job.json").read_text())
    return job


def job_config(arguments: argparse.Namespace, folder: Path) -> PrepareConfig:
    given = {name: getattr(arguments, name) for name in ("pixels_per_batch", "tokens_per_batch")}
    return PrepareConfig(
        output_dir=str(folder / "dataset"),
        source=SourceConfig(path=str(folder.parent / "rows.parquet")),
        process_func={"_target_": "diffusion_data.process_funcs.media_caption"},
        metadata_columns=(),
        samples_per_shard=arguments.samples_per_shard,
        split_ratio=(1, 0, 0),
        row_timeout_seconds=None,
        num_workers=arguments.num_workers,
        encode_threads=arguments.encode_threads,
        seed=0,
        empty_captions="reject",
        retry_rejected=None,
        max_reject_rate=0.0,
        verify="size",
        report=False,
        plan=False,
        plan_gpus=None,
        plan_price=None,
        media=MediaConfig(short_side=arguments.pixels),
        tokenizer=TokenizerConfig(
            name=arguments.tokenizer, compile=arguments.compile, channels_last=arguments.channels_last
        ),
        text_encoder=TextEncoderConfig(name=arguments.text_encoder),
        batching=BatchingConfig(**{name: value for name, value in given.items() if value is not None}),
        device=arguments.device,
    )


def _times(totals: Totals) -> dict[str, Any]:
    return {name: getattr(totals, name) for name in ("written", "stage_seconds", "stage_cpu_seconds")}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown processor"


def _peak_resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").exists() else ():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def print_table(result: dict[str, Any]) -> None:
    def line(name: str, value: float | None, unit: str) -> None:
        print(f"{name:42}{'not measured' if value is None else f'{value:10.3f} {unit}'}")

    print(f"{result['machine']}, torch {result['torch']}")
    line("end to end", result["samples_per_second"], "samples/s")
    for name, alone in result["encoder_alone"].items():
        line(f"{name} alone", alone["samples_per_second"], "samples/s")
        line("  its arithmetic", alone["tflops"], "TFLOP/s")
        line("  share of the device's peak", alone["share_of_peak"], "")
    line("ceiling", result["ceiling_samples_per_second"], "samples/s")
    line("fraction of the ceiling", result["fraction_of_ceiling"], "")
    line("CPU time a sample", result["cpu_seconds_a_sample"], "s")
    for rate in result["every_samples_per_second"]:
        line("end to end, each time", rate, "samples/s")
    for original in result["original"]:
        line(f"the original's way, {original['threads']} threads", original["samples_per_second"], "samples/s")
        line("  its CPU time a sample", original["cpu_seconds_a_sample"], "s")
    line("speedup over the original's way", result["speedup_over_original"], "")
    for stage, figures in result["stages"].items():
        line(f"{stage} busy", figures["busy_share"], "of its processors or device")
    for stage, share in result["waiting_share"].items():
        line(f"waiting for {WAITS[stage]}", share, "of the time")
    for phase, seconds in result["phase_seconds"].items():
        line(phase, seconds, "s")
    line("peak resident memory", result["resident_bytes"] / 1e6, "MB")


if __name__ == "__main__":
    main()
