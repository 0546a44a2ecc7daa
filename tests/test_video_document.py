"""docs/video.rst names only options, fields and reasons that there are, and its command does what it says."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

from diffusion_data.clips import LeftOut
from diffusion_data.errors import Reason
from diffusion_data.media_config import ClipsConfig, MediaConfig
from diffusion_data.process_funcs import media_caption
from tests.media_files import write_video
from tests.small_source import write_source
from tests.written_commands import run_here
from tests.written_pages import commands

TEXT = (Path(__file__).parent.parent / "docs/video.rst").read_text()


def test_the_options_that_it_names_exist() -> None:
    media = {each.name for each in fields(MediaConfig)} | {"load", "load_clips"}
    clips = {each.name for each in fields(ClipsConfig)}
    assert set(re.findall(r"\bmedia\.(\w+)", TEXT)) <= media
    assert set(re.findall(r"\bclips\.(\w+)", TEXT)) == clips
    assert set(re.findall(r"process_func\.(\w+)", TEXT)) <= set(inspect.signature(media_caption).parameters)


def test_what_is_left_out_is_told_in_full() -> None:
    told = TEXT.partition("What is left out")[2].partition("More samples")[0]
    assert set(re.findall(r"^``(\w+)`` ", told, re.MULTILINE)) == {each.name for each in fields(LeftOut)}
    assert Reason.fps_too_low.value in TEXT


def test_the_command_makes_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_video(tmp_path / "a.mp4", 39, fps=5)
    write_source(tmp_path / "videos.parquet", [{"media": "a.mp4", "caption": "grey"}])
    (command,) = commands("docs/video.rst")
    said = run_here(tmp_path, f"{command} media.short_side=32 num_workers=0 report=false", monkeypatch, capsys)
    assert "1 rows = 1 written + 0 rejected" in said
    assert "3 samples in 1 shard," in said  # frames 0 to 16, 10 to 26, 20 to 36
    assert "left out of videos: 0.4 of 7.8 s, 1 clip too short" in said
