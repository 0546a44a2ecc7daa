"""docs/video.rst names only options, fields and reasons that there are."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

from diffusion_data.clips import LeftOut
from diffusion_data.errors import Reason
from diffusion_data.media_config import ClipsConfig, MediaConfig
from diffusion_data.process_funcs import media_caption

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
