"""scripts/prepare.sbatch without Slurm: stand-ins for its programs do what they do on one node."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.small_source import source_rows, write_source
from tests.written_pages import REPOSITORY, commands

SCRIPT = REPOSITORY / "scripts/prepare.sbatch"
PROGRAMS = {
    "srun": 'shift; exec "$@"',
    "scontrol": 'if [ "$1" = requeue ]; then echo "$2" >>requeued; else echo localhost; fi',
    "torchrun": f'echo start >>starts; exec {sys.executable} -m torch.distributed.run "$@"',
    "python": f'exec {sys.executable} "$@"',
}
SECONDS = 300  # nothing here takes as long, unless it hangs
PATIENT = """
import os, time
from diffusion_data.process_funcs import media_caption

def process(row, *, media, flag):
    with open("decoded", "a") as file:
        file.write(f"{row['score']}\\n")
    while row["score"] == 0.2 and not os.path.exists(flag):
        time.sleep(0.05)
    return media_caption(row, media=media)
"""


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """The words behind the script in docs/multi_node.rst, for three rows in three shards here."""
    write_source(tmp_path / "rows/part.parquet", source_rows(3))
    (line,) = [line for line in commands("docs/multi_node.rst") if line.startswith("sbatch")]
    launcher, nodes, script, *words = shlex.split(line)
    assert (launcher, nodes, script) == ("sbatch", "--nodes=4", "scripts/prepare.sbatch")
    assert words[0] == "recipe=media_caption"
    words = [word.replace("/shared/", "") for word in words]
    return [*words, "samples_per_shard=1", "media.short_side=48", "report=false", "num_workers=0"]


@contextmanager
def sbatch(folder: Path, words: list[str], restarts: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """As Slurm starts the script on a job's first node. Nothing of it is left when the test ends."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    for name, body in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "PREPARE": str(REPOSITORY / "scripts/prepare_energon_dataset.py"),
        "PROCESSES": "1",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    with (
        (programs / "stdout").open("w") as said,
        (programs / "log").open("w") as log,
        subprocess.Popen(
            ["bash", SCRIPT, *words], cwd=folder, env=environment, stdout=said, stderr=log, start_new_session=True
        ) as job,
    ):
        try:
            yield job
        finally:
            with suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGTERM)


def ended(folder: Path, job: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    code = job.wait(timeout=SECONDS)
    return code, (folder / "programs/stdout").read_text(), (folder / "programs/log").read_text()


def test_a_mistake_is_one_line_of_the_log_and_nothing_starts(tmp_path: Path, words: list[str]) -> None:
    mistake, told = "process_func.media_column=jpg", "process_func.media_column: there is no column 'jpg'"
    with sbatch(tmp_path, [*words, mistake]) as job:
        code, said, log = ended(tmp_path, job)
    assert code == 2
    assert said == ""
    (line,) = log.splitlines()
    assert f"error: {told}" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["programs", "rows"]  # neither a start nor a requeue


def test_a_job_whose_time_is_over_is_requeued_and_goes_on_where_it_was(tmp_path: Path, words: list[str]) -> None:
    """The process function of the last row waits for a flag, so that the job can't end before the signal."""
    (tmp_path / "patient.py").write_text(PATIENT)
    words += ["process_func._target_=patient.process", f"+process_func.flag={tmp_path}/flag"]
    words += [f"~process_func.{name}_column" for name in ("media", "caption")]
    words += ["~process_func.caption_template", "~process_func.keep_captions"]
    dataset = tmp_path / "dataset"
    until = time.monotonic() + SECONDS
    with sbatch(tmp_path, words) as job:
        while not list(dataset.glob("run/ledger/*.json")):
            assert job.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        code, said, log = ended(tmp_path, job)
    assert code == 0, log
    assert "the time is nearly over: requeued" in said
    assert (tmp_path / "requeued").read_text().split() == [str(os.getpid())]
    assert not (dataset / ".nv-meta").exists()
    entries = list(dataset.glob("run/ledger/*.json"))
    kept = {path: path.stat().st_mtime_ns for path in [*entries, *(dataset / f"{each.stem}.tar" for each in entries)]}

    (tmp_path / "flag").touch()
    (tmp_path / "decoded").unlink()
    with sbatch(tmp_path, words, restarts=1) as job:
        code, said, log = ended(tmp_path, job)
    assert code == 0, log
    assert "dataset: 3 rows = 3 written + 0 rejected" in said
    assert json.loads((dataset / "run/stats.json").read_text())["written"] == 3
    assert (dataset / ".nv-meta/dataset.yaml").exists()
    missing = ["0.0", "0.1", "0.2"][len(entries) :]
    assert (tmp_path / "decoded").read_text().split() == missing
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert (tmp_path / "starts").read_text().split() == ["start", "start"]
    assert (tmp_path / "requeued").read_text().split() == [str(os.getpid())]
