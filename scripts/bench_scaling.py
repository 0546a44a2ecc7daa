"""What each piece of bookkeeping costs, a row, a shard or a source file: docs/scaling.rst multiplies them.

    python scripts/bench_scaling.py
    python scripts/bench_scaling.py --shards 20000 --files 2000 --folder /network/disk

One line a piece. Nothing is encoded: samples are tiny. The index's times are those of processors, the others a clock's.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import webdataset
import yaml

from diffusion_data.dataset_folder import check_dataset
from diffusion_data.dataset_stats import DatasetStats
from diffusion_data.energon_metadata import DATASET_YAML, META_FOLDER
from diffusion_data.latent_sample import LatentSample, build_metadata, sample_key
from diffusion_data.ledger import Ledger, LedgerEntry, ledger_folder
from diffusion_data.shard_plan import Shard, plan_shards
from diffusion_data.sources import ParquetSource

Result = TypeVar("Result")


def timed(work: Callable[[], Result]) -> tuple[float, Result]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def processor_seconds() -> np.ndarray:
    """Of this process, and of those that it has started and that have ended: what else the machine does isn't in it."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return np.array([each.ru_utime + each.ru_stime for each in used])


def memory(work: Callable[[], Result]) -> tuple[int, Result]:
    """Bytes that Python still holds for the result."""
    tracemalloc.start()
    result = work()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return held, result


def source_files(folder: Path, files: int) -> Iterator[str]:
    """Footers are read at the start, once, by rank 0."""
    (folder / "rows").mkdir()
    table = pa.table({"media": [b""] * 1000, "caption": ["a caption"] * 1000})
    for number in range(files):
        pq.write_table(table, folder / "rows" / f"{number:06d}.parquet", row_group_size=100)
    seconds, _ = timed(lambda: ParquetSource.open(str(folder / "rows")))
    held, _ = memory(lambda: ParquetSource.open(str(folder / "rows")))
    yield f"source: footer of a file: {1000 * seconds / files:.2f} ms, {held / files:,.0f} B of memory"


def plan(rows: int) -> Iterator[str]:
    seconds, shards = timed(lambda: plan_shards(rows, None, (1, 0, 0)))
    held, _ = memory(lambda: plan_shards(rows, None, (1, 0, 0)))
    size = shards[0].num_rows
    yield f"plan: {rows:,} rows in {len(shards):,} shards of {size:,}: {seconds:.2f} s, {held / 1e6:.0f} MB of memory"


def ledger(folder: Path, count: int, samples: int) -> Iterator[str]:
    """A shard's entry is written when it is finished, and read at a restart and at the end."""
    ledger_folder(folder).mkdir(parents=True)
    entries = Ledger(folder, "fingerprint")
    stats = DatasetStats()
    for row in range(samples):
        stats.add(tiny_sample(row))
    shards = [Shard(number=number, start=number * samples, stop=(number + 1) * samples) for number in range(count)]

    def write() -> None:
        for shard in shards:
            (folder / shard.file_name).touch()
            entries.write(
                LedgerEntry(
                    shard=shard.number,
                    start=shard.start,
                    stop=shard.stop,
                    file=shard.file_name,
                    num_bytes=0,
                    sha256="0" * 64,
                    written=samples,
                    samples=samples,
                    captions_cut=0,
                    fingerprint="fingerprint",
                    stats=stats.to_json(),
                )
            )

    seconds, _ = timed(write)
    yield f"ledger: an entry flushed to disk: {1000 * seconds / count:.2f} ms"
    seconds, read = timed(lambda: [entries.read(shard) for shard in shards])
    assert None not in read
    size = sum(path.stat().st_size for path in ledger_folder(folder).iterdir()) / count
    yield f"ledger: an entry read: {1000 * seconds / count:.3f} ms, {size:,.0f} B on disk"


def energon(folder: Path, count: int, samples: int) -> Iterator[str]:
    """The index is made at the end, and checked when training opens the dataset."""
    folder.mkdir()
    parts = tiny_sample(0).to_parts()
    names = [f"shard_{number:06d}.tar" for number in range(count)]
    for number, name in enumerate(names):
        with webdataset.TarWriter(str(folder / name), encoder=False, mtime=0) as tar:
            for row in range(number * samples, (number + 1) * samples):
                tar.write({"__key__": sample_key(row), **parts})
    from megatron.energon import BaseWebdatasetFactory
    from megatron.energon.epathlib import EPath

    with redirect_stdout(sys.stderr):
        before = processor_seconds()
        BaseWebdatasetFactory.prepare_dataset(
            EPath(str(folder)), names, split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=1
        )
        seconds = processor_seconds() - before
    (folder / META_FOLDER / "dataset.yaml").write_text(yaml.safe_dump(DATASET_YAML))
    size = sum(path.stat().st_size for path in (folder / META_FOLDER).iterdir())
    size += sum(path.stat().st_size for path in folder.glob("*.idx"))
    total = count * samples
    own, indexers = (1e6 * each / total for each in seconds)
    yield f"energon: index of a sample: {own:.0f} us + {indexers:.0f} us in indexers, {size / total:.0f} B on disk"
    seconds, _ = timed(lambda: check_dataset(folder))
    yield f"energon: check before training, a shard: {1e6 * seconds / count:.0f} us"


def tiny_sample(row: int) -> LatentSample:
    return LatentSample(
        key=sample_key(row),
        latent=torch.zeros(16, 1, 2, 2, dtype=torch.bfloat16),
        text_embedding=np.ones((2, 4), np.float16),
        metadata=build_metadata(
            caption="a caption",
            image_height=16,
            image_width=16,
            height=16,
            width=16 + 16 * (row % 20),
            num_frames=1,
            framerate=None,
            num_text_tokens=2,
            source_file="rows.parquet",
            source_row=row,
            extra={},
        ),
    )


def main(words: Sequence[str] | None = None) -> None:
    """words: the command line; None for the process's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--rows", type=int, default=1_000_000_000, help="of the plan; default: %(default)s")
    parser.add_argument("--files", type=int, default=500, help="of the source; default: %(default)s")
    parser.add_argument("--shards", type=int, default=2000, help="ledger entries; default: %(default)s")
    parser.add_argument("--indexed", type=int, default=20, help="shards that energon indexes; default: %(default)s")
    parser.add_argument("--samples", type=int, default=500, help="of a shard; default: %(default)s")
    arguments = parser.parse_args(words)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        pieces = (
            source_files(folder, arguments.files),
            plan(arguments.rows),
            ledger(folder / "ledger", arguments.shards, arguments.samples),
            energon(folder / "energon", arguments.indexed, arguments.samples),
        )
        for piece in pieces:
            for line in piece:
                print(line)
                sys.stdout.flush()


if __name__ == "__main__":
    main()
