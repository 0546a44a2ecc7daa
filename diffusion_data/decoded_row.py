"""What a row became on the CPU: DecodedRow, all samples of it, or RejectedRow, none of them and why."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from diffusion_data.clips import LeftOut
from diffusion_data.errors import Reason
from diffusion_data.latent_sample import build_metadata
from diffusion_data.shared_frames import join_overlapping

_LONGEST_MESSAGE = 500  # characters


@dataclass(frozen=True, kw_only=True)
class DecodedSample:
    """pixels: uint8 (T, H, W, 3), T = 1 + k*t, H and W multiples of what the tokenizer takes.

    framerate: frames per second; None for a picture
    image_height, image_width: pixels of the source
    start_seconds, end_seconds: of a clip of a longer video, from the video's first frame; None otherwise
    mirrored: None where the run makes no mirrored copies
    """

    pixels: np.ndarray
    framerate: float | None
    image_height: int
    image_width: int
    caption: str
    metadata: dict[str, Any]
    start_seconds: float | None = None
    end_seconds: float | None = None
    mirrored: bool | None = None


@dataclass(frozen=True, kw_only=True)
class DecodedRow:
    """samples: one or more, in the order of their keys; they are written together or not at all.

    left_out: of its videos
    """

    row: int
    source_file: str
    source_row: int
    samples: tuple[DecodedSample, ...]
    left_out: LeftOut = field(default_factory=LeftOut)
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def __post_init__(self) -> None:
        assert self.samples, "a row without a sample is a RejectedRow"

    def __getstate__(self) -> dict[str, Any]:
        """For the way between processes: frames that clips have in common go once."""
        arrays, places = join_overlapping([sample.pixels for sample in self.samples])
        samples = [replace(sample, pixels=arrays[0][:0]) for sample in self.samples]
        return {**vars(self), "samples": samples, "arrays": arrays, "places": places}

    def __setstate__(self, state: dict[str, Any]) -> None:
        arrays, places = state.pop("arrays"), state.pop("places")
        samples = tuple(
            replace(sample, pixels=arrays[array][start:stop])
            for sample, (array, start, stop) in zip(state["samples"], places, strict=True)
        )
        vars(self).update({**state, "samples": samples})


@dataclass(frozen=True, kw_only=True)
class RejectedRow:
    """A row that became no sample, and why: one line of rejected.jsonl."""

    row: int
    source_file: str
    source_row: int
    reason: Reason
    message: str
    metadata: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        own = {
            "row": self.row,
            "source_file": self.source_file,
            "source_row": self.source_row,
            "reason": self.reason.value,
            "retryable": self.reason.retryable,
            # A user's message may hold anything, a whole picture for one.
            "message": self.message[:_LONGEST_MESSAGE].encode("utf-8", "backslashreplace").decode(),
        }
        return own | {name: value for name, value in self.metadata.items() if name not in own}


def sample_metadata(
    row: DecodedRow, sample: DecodedSample, shape: tuple[int, int, int], num_text_tokens: int
) -> dict[str, Any]:
    """The json of a sample. shape: (T, H, W) of its pixels, which may have been let go."""
    frames, height, width = shape
    return build_metadata(
        caption=sample.caption,
        image_height=sample.image_height,
        image_width=sample.image_width,
        height=height,
        width=width,
        num_frames=frames,
        framerate=sample.framerate,
        num_text_tokens=num_text_tokens,
        source_file=row.source_file,
        source_row=row.source_row,
        start_seconds=sample.start_seconds,
        end_seconds=sample.end_seconds,
        mirrored=sample.mirrored,
        extra=sample.metadata,
    )
