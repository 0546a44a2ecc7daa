"""The benchmark runs from one command, and its figures belong together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.mark.parametrize("processes", [1, 2])
def test_a_small_run_gives_a_table_and_json(tmp_path: Path, processes: int) -> None:
    command = [sys.executable, str(REPOSITORY / "scripts" / "bench_prepare.py"), "--no-random-weights"]
    command += ["--tokenizer", "tiny-cosmos", "--text-encoder", "tiny-t5", "--pixels", "32", "--rows", "48"]
    command += ["--original-rows", "2", "--repeats", "1", "--num-workers", "1", "--processes", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240)
    assert ran.returncode == 0, ran.stderr
    assert "speedup over the original's way" in ran.stdout
    result = json.loads((tmp_path / "bench_prepare.json").read_text())
    assert result["samples_per_second"] == pytest.approx(48 / result["phase_seconds"]["encode"])
    assert result["fraction_of_ceiling"] == pytest.approx(
        sum(stage["busy_share"] for stage in result["stages"].values()), rel=1e-3
    )
    fastest = max(each["samples_per_second"] for each in result["original"])
    assert result["speedup_over_original"] == pytest.approx(result["samples_per_second"] / fastest)
    assert set(result["stages"]) == {"decode", "text_encoder", "text_tokens", "tokenizer", "write"}
