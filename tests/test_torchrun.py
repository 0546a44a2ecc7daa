"""The job as users start it: any number of processes, the same bytes; one line for a user's mistake."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffusion_data.prepare_energon_dataset import prepare
from tests.small_source import prepare_config, source_rows, write_source
from tests.test_prepare import tar_bytes

REPOSITORY = Path(__file__).parent.parent
SCRIPT = str(REPOSITORY / "scripts" / "prepare_energon_dataset.py")
MEDIA_CAPTION = "recipe=media_caption"
OPTIONS = ["metadata_columns=[score]", "samples_per_shard=4", "media.short_side=48"]


def torchrun(num_processes: int, *options: str, cwd: Path, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={num_processes}", f"--max-restarts={restarts}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [*command, SCRIPT, MEDIA_CAPTION, *OPTIONS, *options],
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
        (["output_dir=out"], "missing option recipe: add recipe=NAME; there are: butterflies, media_caption, sample"),
        ([MEDIA_CAPTION, "output_dir=out"], "missing option source.path"),
        (
            [MEDIA_CAPTION, "source.path=nowhere.parquet", "output_dir=out"],
            "source.path: there is nothing at nowhere.parquet",
        ),
        (
            [MEDIA_CAPTION, "source.path=x", "output_dir=out", "media.shortside=3"],
            "unknown option media.shortside: did you mean",
        ),
        ([MEDIA_CAPTION, "source.path={source}", "output_dir=out", "tokenizer.name=./weights"], "./weights"),
        ([MEDIA_CAPTION, "source.path={source}", "output_dir=out", "device=tpu"], "device: expected auto, cpu or cuda"),
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


def test_a_rank_that_was_killed_is_restarted_by_torchrun_and_nothing_is_lost(tmp_path: Path) -> None:
    """The process function of row 9 kills its rank, once."""
    (tmp_path / "unlucky.py").write_text(
        """
import os, signal
from diffusion_data.process_funcs import media_caption

def process(row, *, media, flag):
    if row["score"] == 0.9 and not os.path.exists(flag):
        open(flag, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return media_caption(row, media=media)
"""
    )
    source = write_source(tmp_path / "source.parquet", source_rows(26))
    options = [
        f"source.path={source}",
        "output_dir=killed",
        "num_workers=0",  # so that the rank itself runs the function
        "process_func._target_=unlucky.process",
        f"+process_func.flag={tmp_path}/flag",
        "~process_func.media_column",
        "~process_func.caption_column",
        "~process_func.caption_template",
        "~process_func.keep_captions",
    ]
    finished = torchrun(2, *options, cwd=tmp_path, restarts=1)
    assert (tmp_path / "flag").exists()
    assert finished.returncode == 0, finished.stderr
    assert "26 rows = 26 written + 0 rejected" in finished.stdout
    prepare(prepare_config(source, tmp_path / "undisturbed"))
    assert tar_bytes(tmp_path / "killed") == tar_bytes(tmp_path / "undisturbed")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on_and_does(tmp_path: Path, number: signal.Signals) -> None:
    """The process function of the last row waits for a flag, so that the run can't end before the signal."""
    (tmp_path / "patient.py").write_text(
        """
import os, time
from diffusion_data.process_funcs import media_caption

def process(row, *, media, flag):
    while row["score"] == 2.5 and not os.path.exists(flag):
        time.sleep(0.05)
    return media_caption(row, media=media)
"""
    )
    source = write_source(tmp_path / "source.parquet", source_rows(26))
    options = [
        MEDIA_CAPTION,
        *OPTIONS,
        f"source.path={source}",
        "output_dir=out",
        "process_func._target_=patient.process",
        f"+process_func.flag={tmp_path}/flag",
        "~process_func.media_column",
        "~process_func.caption_column",
        "~process_func.caption_template",
        "~process_func.keep_captions",
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, SCRIPT, *options]

    def heed_ctrl_c() -> None:
        """A shell starts background jobs deaf to it, the tests maybe among them."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment, preexec_fn=heed_ctrl_c
    ) as running:
        while not list((tmp_path / "out").glob("shard_*.tar")):
            assert running.poll() is None
            time.sleep(0.02)
        running.send_signal(number)
        _, told = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "interrupted; what is finished is kept: run the same command again to go on" in told
    assert "Traceback" not in told
    assert not (tmp_path / "out/.nv-meta").exists()
    (tmp_path / "flag").touch()
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240)
    assert finished.returncode == 0, finished.stderr
    prepare(prepare_config(source, tmp_path / "undisturbed"))
    assert tar_bytes(tmp_path / "out") == tar_bytes(tmp_path / "undisturbed")
