"""Commands as README.rst and docs/ have them, run as they stand there."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PREPARE_SAMPLE = "torchrun --nproc_per_node=2 scripts/prepare_energon_dataset.py recipe=sample"
"""By which the fixture `sample_dataset` is made, once for all tests."""


def run_in(folder: Path, line: str, *more: str) -> subprocess.CompletedProcess[str]:
    """In processes of its own, as a user starts it."""
    words = [word.replace("/path/to/scripts/", f"{REPOSITORY}/scripts/") for word in shlex.split(line)]
    words = [f"{REPOSITORY}/{word}" if word.startswith("scripts/") else word for word in words]
    launcher = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}[words[0]]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [*launcher, *words[1:], *more], capture_output=True, text=True, cwd=folder, env=environment, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    return finished


def run_here(
    folder: Path, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *more: str
) -> str:
    """What the command prints; in this process, since starting one takes longer than most of them."""
    words = shlex.split(line)
    script = next(number for number, word in enumerate(words) if word.endswith(".py"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [*words[script:], *more])
    monkeypatch.setattr(sys, "path", list(sys.path))
    capsys.readouterr()
    import_module(f"diffusion_data.scripts.{Path(words[script]).stem}").main()
    return capsys.readouterr().out
