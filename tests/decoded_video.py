"""A video file of the tests -> what `decode_video` makes of it, unresized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffusion_data.clips import ClipCutter
from diffusion_data.errors import Reason, RowRejected
from diffusion_data.media import MediaConfig
from diffusion_data.resize import ResizePlan
from diffusion_data.video import DecodedVideo, decode_video


def as_it_is(height: int, width: int) -> ResizePlan:
    return ResizePlan(cover_height=height, cover_width=width, height=height, width=width)


def decode(path: Path, num_frames: int = 1000, **options: Any) -> DecodedVideo:
    with path.open("rb") as file:
        return decode_video(file, MediaConfig(**options), as_it_is, ClipCutter(num_frames))


def reason(path: Path, **options: Any) -> Reason:
    with pytest.raises(RowRejected) as rejected:
        decode(path, **options)
    return rejected.value.reason
