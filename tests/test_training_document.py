"""docs/training.rst: what it has one do on the bundled sample runs as it stands there, with fewer steps."""

from __future__ import annotations

import shutil
from pathlib import Path

import av
import pytest
from PIL import Image

from tests.written_commands import run_here
from tests.written_pages import commands


def test_the_commands_on_the_bundled_sample_run(
    sample_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    one_torch_thread: None,
) -> None:
    shutil.copytree(sample_dataset, tmp_path / "sample_dataset")
    of_pictures, pictures, of_clips, clip, sheet = commands("docs/training.rst")[-5:]
    for train in (of_pictures, of_clips):
        told = run_here(tmp_path, train, monkeypatch, capsys, "trainer.max_steps=1", "trainer.accelerator=cpu")
        assert "1 steps (up to step 1)" in told
    for draw in (pictures, clip, sheet):
        run_here(tmp_path, draw, monkeypatch, capsys, "--steps", "1", "--guidance", "1", "--device", "cpu")
    with Image.open(tmp_path / "sheet.png") as drawn:
        assert drawn.size == (2 * (176 + 8), 2 * (128 + 8))
    with Image.open(tmp_path / "clip.png") as drawn:
        assert drawn.size == (3 * (128 + 8), 160 + 8)
    with av.open(str(tmp_path / "clips/caption_000_00.mp4")) as container:
        assert len(list(container.decode(video=0))) == 21
