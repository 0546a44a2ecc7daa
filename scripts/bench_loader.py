"""How fast batches come, beside what disk and energon allow. Makes its own datasets; needs no GPU.

    python scripts/bench_loader.py
    python scripts/bench_loader.py --workers 0 1 2 4 --rounds 9 --json bench_loader.json

Cases: latents of a picture with texts of 1 to 512, of 512 and of few tokens, and of a clip. In one run, by turns,
in samples/s:

    bare read        the same tars, read from start to end into one buffer
    energon raw      energon's loader with decoding turned off: parts as bytes, in a list
    energon default  energon's decoder, then the original's task encoder (original_task_encoder.py)
    DataModule       ours, for each number of workers

All with micro batches of 1 (--batch), a shuffle buffer of 100 and one rank; medians over the rounds. The tars are in
the page cache once the first round has read them, so this measures the CPU's part; with --folder on a disk that is
slower than that and datasets larger than memory (--samples) it measures the disk's. On a machine that others use too,
compare with --cpu-time --workers 0: wall-clock rates then say more about the others.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron.energon
import numpy as np
import torch
import webdataset
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    WorkerConfig,
    get_savable_loader,
    get_train_dataset,
)
from original_task_encoder import Crude, OriginalTaskEncoder, cook

from diffusion_data import open_shards
from diffusion_data.diffusion_energon_datamodule import DiffusionDataModule
from diffusion_data.energon_loaders import use_pinned_memory
from diffusion_data.energon_metadata import write_energon_metadata
from diffusion_data.latent_sample import LatentSample, build_metadata, sample_key

SHUFFLE_BUFFER = 100
READ_AHEAD = 4  # the default
TEXT_LENGTH = 512
TEXT_WIDTH = 1024  # of T5-11B, which DiTs are made for
READ_BLOCK = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Case:
    """What the samples of one dataset are: `text_tokens` fewest and most."""

    name: str
    latent_shape: tuple[int, int, int, int]
    text_tokens: tuple[int, int]

    @property
    def seq_length(self) -> int:
        _, frames, height, width = self.latent_shape
        return frames * height * width // 4


CASES = {
    case.name: case
    for case in (
        Case(name="image", latent_shape=(16, 1, 64, 64), text_tokens=(1, 512)),
        Case(name="image_full_text", latent_shape=(16, 1, 64, 64), text_tokens=(512, 512)),
        Case(name="image_short_text", latent_shape=(16, 1, 64, 64), text_tokens=(16, 120)),
        Case(name="video", latent_shape=(16, 5, 64, 64), text_tokens=(16, 120)),
    )
}


def random_sample(case: Case, row: int) -> LatentSample:
    rng = np.random.default_rng(row)
    tokens = int(rng.integers(case.text_tokens[0], case.text_tokens[1] + 1))
    _, frames, height, width = case.latent_shape
    latent = torch.from_numpy(rng.standard_normal(case.latent_shape, dtype=np.float32)).to(torch.bfloat16)
    return LatentSample(
        key=sample_key(row),
        latent=latent,
        text_embedding=rng.standard_normal((tokens, TEXT_WIDTH), dtype=np.float32).astype(np.float16),
        metadata=build_metadata(
            caption="a caption of usual length, " * 4,
            image_height=height * 8 + 5,
            image_width=width * 8 + 5,
            height=height * 8,
            width=width * 8,
            num_frames=1 + 8 * (frames - 1),
            framerate=None if frames == 1 else 24.0,
            num_text_tokens=tokens,
            source_file="bench.parquet",
            source_row=row,
            extra={"aesthetic_score": 5.5},
        ),
    )


def write_dataset(folder: Path, case: Case, num_samples: int, samples_per_shard: int) -> Path:
    """A prepared dataset of random samples."""
    folder.mkdir(parents=True)
    names = []
    for start in range(0, num_samples, samples_per_shard):
        names.append(f"shard_{start // samples_per_shard:06d}.tar")
        with webdataset.TarWriter(str(folder / names[-1]), encoder=False, mtime=0) as tar:
            for row in range(start, min(start + samples_per_shard, num_samples)):
                sample = random_sample(case, row)
                tar.write({"__key__": sample.key, **sample.to_parts()})
    write_energon_metadata(folder, names, [1, 0, 0], seed=0)
    return folder


class RawTaskEncoder(DefaultTaskEncoder[Crude, Crude, Any, Any]):
    """Does nothing with the bytes of a sample."""

    cookers = (Cooker(cook),)
    decoder = None


def energon_loader(path: Path, encoder: DefaultTaskEncoder, batch_size: int | None, **options: Any) -> Iterator[Any]:
    """Endless, in energon's own order, in this process."""
    dataset = get_train_dataset(
        str(path),
        split_part="train",
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=batch_size,
        shuffle_buffer_size=SHUFFLE_BUFFER,
        max_samples_per_sequence=None,
        task_encoder=encoder,
    )
    loader = get_savable_loader(dataset, watchdog_timeout_seconds=None, **options)
    use_pinned_memory(loader, wanted=True)
    return iter(loader)


def datamodule_batches(
    path: Path, case: Case, batch_size: int, workers: int, read_ahead: int = READ_AHEAD
) -> Iterator[Any]:
    module = DiffusionDataModule(
        path,
        seq_length=case.seq_length,
        micro_batch_size=batch_size,
        global_batch_size=batch_size,
        num_workers=workers,
        shuffle_buffer_size=SHUFFLE_BUFFER,
        read_ahead=read_ahead,
    )
    loader = module.train_dataloader()
    while True:
        yield from loader


def bare_read(path: Path) -> Iterator[int]:
    """The bytes of a shard, after it was read; over and over."""
    block = memoryview(bytearray(READ_BLOCK))
    while True:
        for tar in sorted(path.glob("*.tar")):
            with open(tar, "rb", buffering=0) as file:
                while file.readinto(block):
                    pass
            yield tar.stat().st_size


def forget(path: Path) -> None:
    """Have the system read the tars from the disk again, as in training.

    In its memory, what was written piece by piece lies in small pages, which take three times as long to copy.
    """
    for tar in path.glob("*.tar"):
        with tar.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def wait_before_reads(seconds: float) -> None:
    """As a disk or network does that is slow to answer, but answers any number of requests at a time."""
    read = open_shards.Place.read

    def slow(place: open_shards.Place) -> memoryview | None:
        time.sleep(seconds)
        return read(place)

    setattr(open_shards.Place, "read", slow)  # noqa: B010 - mypy takes an assignment for a method
    setattr(open_shards.Place, "read_from_memory", lambda place: None)  # noqa: B010


def rate(source: Iterator[Any], steps: int, samples_per_step: int, clock: Callable[[], float]) -> float:
    """Samples/s over so many steps."""
    start = clock()
    for _ in range(steps):
        next(source)
    return steps * samples_per_step / (clock() - start)


def measure(case: Case, path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Rates of one case, and ours beside the others."""
    batch, count = arguments.batch, arguments.samples
    sizes = [tar.stat().st_size for tar in path.glob("*.tar")]
    # The raw rate is energon's best: collation and collecting garbage every 10 batches are left out.
    sources: dict[str, tuple[Iterator[Any], int]] = {
        "bare_read": (bare_read(path), arguments.samples_per_shard),
        "energon_raw": (energon_loader(path, RawTaskEncoder(), None, gc_collect_every_n_steps=0), 1),
        "energon_default": (energon_loader(path, OriginalTaskEncoder(case.seq_length, TEXT_LENGTH), batch), batch),
        **{
            f"workers_{n}": (datamodule_batches(path, case, batch, n, arguments.read_ahead), batch)
            for n in arguments.workers
        },
    }
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    rates: dict[str, list[float]] = {name: [] for name in sources}
    for number in range(arguments.rounds + 1):
        for name, (source, samples) in sources.items():
            found = rate(source, count // samples, samples, clock)
            if number:  # the first fills buffers and caches
                rates[name].append(found)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "case": case.name,
        "latent_shape": case.latent_shape,
        "text_tokens": case.text_tokens,
        "bytes_per_sample": round(sum(sizes) / count),
        "bare_read": medians["bare_read"],
        "energon_raw": medians["energon_raw"],
        "energon_default": medians["energon_default"],
        "clock": clock.__name__,
        "datamodule": [compared(n, medians[f"workers_{n}"], medians) for n in arguments.workers],
        "all_rounds": rates,
    }


def compared(workers: int, rate: float, medians: dict[str, float]) -> dict[str, float]:
    return {
        "num_workers": workers,
        "samples_per_second": rate,
        "fraction_of_bare_read": rate / medians["bare_read"],
        "fraction_of_energon_raw": rate / medians["energon_raw"],
        "speedup_over_energon_default": rate / medians["energon_default"],
    }


def print_table(result: dict[str, Any]) -> None:
    print(
        f"\n{result['case']}: latent {result['latent_shape']}, {result['text_tokens']} tokens, "
        f"{result['bytes_per_sample'] / 1e6:.2f} MB a sample"
    )
    print(f"{'':22}{'samples/s':>10}{'of bare read':>14}{'of energon raw':>16}{'x energon default':>19}")
    for name in ("bare_read", "energon_raw", "energon_default"):
        print_row(name.replace("_", " "), compared(0, result[name], result))
    for row in result["datamodule"]:
        print_row(f"DataModule, {row['num_workers']} workers", row)


def print_row(name: str, row: dict[str, float]) -> None:
    print(
        f"{name:22}{row['samples_per_second']:10.0f}{row['fraction_of_bare_read']:14.3f}"
        f"{row['fraction_of_energon_raw']:16.2f}{row['speedup_over_energon_default']:19.2f}"
    )


def machine() -> dict[str, Any]:
    """What the numbers hold for."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "energon": megatron.energon.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2])
    parser.add_argument("--samples", type=int, default=400, help="of each dataset, and of each measurement")
    parser.add_argument("--samples-per-shard", type=int, default=100)
    parser.add_argument("--batch", type=int, default=1, help="samples of a micro batch")
    parser.add_argument("--read-ahead", type=int, default=READ_AHEAD, help="of the DataModule")
    parser.add_argument(
        "--read-latency-ms", type=float, default=0, help="each read of the DataModule waits so long first"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="count this process's CPU seconds; for 0 workers only")
    parser.add_argument("--folder", type=Path, help="where the datasets are made; default: the temporary folder")
    parser.add_argument("--json", type=Path, default=Path("bench_loader.json"))
    arguments = parser.parse_args()
    if arguments.samples % arguments.samples_per_shard:
        parser.error("--samples must be a multiple of --samples-per-shard")
    if arguments.cpu_time and any(arguments.workers):
        parser.error("--cpu-time sees nothing of what workers do: use it with --workers 0")
    if arguments.read_latency_ms:
        wait_before_reads(arguments.read_latency_ms / 1000)
    folder = Path(tempfile.mkdtemp(prefix="bench_loader_", dir=arguments.folder))
    results = []
    try:
        for name in arguments.cases:
            case = CASES[name]
            path = write_dataset(folder / name, case, arguments.samples, arguments.samples_per_shard)
            forget(path)
            results.append(measure(case, path, arguments))
            print_table(results[-1])
            shutil.rmtree(path)
            gc.collect()
    finally:
        shutil.rmtree(folder)
    report = {"machine": machine(), "command": " ".join(sys.argv), **results[0]["datamodule"][0], "cases": results}
    arguments.json.write_text(json.dumps(report, indent=1))
    print(f"\nwrote {arguments.json}")


if __name__ == "__main__":
    main()
