"""The job as users start it: any number of processes, the same bytes; one line for a user's mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_data.prepare_energon_dataset import prepare
from tests.small_source import prepare_config, source_rows, write_source
from tests.test_prepare import tar_bytes

REPOSITORY = Path(__file__).parent.parent
SCRIPT = str(REPOSITORY / "scripts" / "prepare_energon_dataset.py")
OPTIONS = ["recipe=media_caption", "metadata_columns=[score]", "samples_per_shard=4", "media.short_side=48"]


def torchrun(num_processes: int, *options: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [*command, SCRIPT, *OPTIONS, *options],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=240,
        env=environment,
    )


def test_three_processes_write_the_bytes_of_one(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source.parquet", source_rows(26))
    prepare(prepare_config(source, tmp_path / "one"))
    finished = torchrun(3, f"source.path={source}", "output_dir=three", "num_workers=1", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert tar_bytes(tmp_path / "three") == tar_bytes(tmp_path / "one")
    assert "26 rows = 26 written + 0 rejected" in finished.stdout
    assert finished.stdout.count("26 rows = ") == 1  # rank 0 alone speaks
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "source.parquet", "three"]


def test_a_users_mistake_is_told_once_and_in_one_line(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source.parquet", source_rows(2))
    failed = torchrun(2, f"source.path={source}", "output_dir=out", "process_func.media_column=jpg", cwd=tmp_path)
    assert failed.returncode != 0
    told = [line for line in failed.stderr.splitlines() if "error: process_func.media_column" in line]
    assert len(told) == 1
    assert "its columns are media, caption, score" in told[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["output_dir=out"], "missing option source.path"),
        (["source.path=nowhere.parquet", "output_dir=out"], "source.path: there is nothing at nowhere.parquet"),
        (["source.path=x", "output_dir=out", "media.shortside=3"], "unknown option media.shortside: did you mean"),
        (["source.path={source}", "output_dir=out", "tokenizer.name=./weights"], "./weights"),
        (["source.path={source}", "output_dir=out", "device=tpu"], "device: expected auto, cpu or cuda"),
    ],
)
def test_without_torchrun_a_mistake_is_one_line_and_no_more(tmp_path: Path, options: list[str], said: str) -> None:
    source = write_source(tmp_path / "source.parquet", source_rows(2))
    failed = subprocess.run(
        [sys.executable, SCRIPT, *OPTIONS, *(option.format(source=source) for option in options)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert failed.returncode == 2
    assert len(failed.stderr.strip().splitlines()) == 1, failed.stderr
    assert said in failed.stderr
