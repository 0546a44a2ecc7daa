"""scripts/bench_loader.py runs, and what it compares is comparable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
SCRIPT = REPOSITORY / "scripts" / "bench_loader.py"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=120)


def test_it_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    options = "--cases image_short_text --samples 8 --samples-per-shard 4 --rounds 1 --workers 0 --json out.json"
    finished = run(tmp_path, *options.split(), "--folder", str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    assert "DataModule, 0 workers" in finished.stdout
    report = json.loads((tmp_path / "out.json").read_text())
    (case,) = report["cases"]
    (ours,) = case["datamodule"]
    assert report["samples_per_second"] == ours["samples_per_second"] > 0
    assert ours["fraction_of_bare_read"] == ours["samples_per_second"] / case["bare_read"]
    assert ours["fraction_of_energon_raw"] == ours["samples_per_second"] / case["energon_raw"]
    assert ours["speedup_over_energon_default"] == ours["samples_per_second"] / case["energon_default"]
    assert case["bytes_per_sample"] > 16 * 64 * 64 * 2
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]  # the dataset is gone


def test_cpu_time_is_refused_with_workers(tmp_path: Path) -> None:
    finished = run(tmp_path, "--cpu-time", "--workers", "0", "2")
    assert finished.returncode == 2
    assert "--workers 0" in finished.stderr


def test_the_original_steps_give_the_same_batch_as_ours(tmp_path: Path) -> None:
    """Else the comparison would measure something else."""
    code = f"""
import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})
import torch
from pathlib import Path
import bench_loader as bench
from original_task_encoder import OriginalTaskEncoder

case = bench.Case(name="small", latent_shape=(4, 3, 8, 12), text_tokens=(3, 9))
path = bench.write_dataset(Path({str(tmp_path)!r}) / "ds", case, 4, 2)
theirs = bench.energon_loader(path, OriginalTaskEncoder(case.seq_length, bench.TEXT_LENGTH), 1)
ours = bench.datamodule_batches(path, case, 1, 0)
found = [{{batch["__key__"][0]: batch for batch in (next(source) for _ in range(12))}} for source in (theirs, ours)]
common = found[0].keys() & found[1].keys()
assert len(common) >= 3, common
for key in common:
    one, other = found[0][key], found[1][key]
    for name in ("video", "t5_text_embeddings", "pos_ids", "loss_mask", "image_size"):
        assert torch.equal(one[name].reshape(other[name].shape), other[name]), name
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr
