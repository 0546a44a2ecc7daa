"""Samples -> the entries of a contact sheet: what the source shows beside what the stored latent decodes to."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.decoded_sample import decode_sample, frames_per_second, psnr_db
from diffusion_data.latent_sample import LatentSample
from diffusion_data.picture_files import encode_file, shrink
from diffusion_data.source_frames import SourceFrames
from diffusion_data.spread import coarse_to_fine
from diffusion_data.spread_samples import spread_samples

PICTURE_SUFFIX = ".webp"
_LONGEST_SIDE, _LONGEST_SIDE_MOVING = 640, 384  # pixels on the page; the PSNR is that of the full size


@dataclass(frozen=True, kw_only=True)
class SheetOptions:
    """How much is decoded.

    num_samples: at most, spread over the shards
    max_frames: of a clip, from its beginning
    max_seconds: no further sample is begun after that
    """

    num_samples: int = 12
    max_frames: int = 33
    max_seconds: float = 60.0


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """WebP files: the first frame and, of a clip, the last shown and all that are shown, moving."""

    first: bytes
    last: bytes | None
    moving: bytes | None


@dataclass(frozen=True, kw_only=True)
class SheetEntry:
    """One sample.

    frames_shown: of num_frames, from the beginning
    psnr: of all shown frames, in dB; with psnr_first and psnr_last None where there is no source to compare with
    """

    key: str
    caption: str
    height: int
    width: int
    num_frames: int | None
    frames_shown: int
    fps: float | None
    seconds: tuple[float, float] | None
    mirrored: bool
    decoded: Pictures
    source: Pictures | None
    psnr: float | None
    psnr_first: float | None
    psnr_last: float | None


def make_sheet(
    shards: Sequence[Path],
    tokenizer: CosmosTokenizer,
    sources: SourceFrames | None,
    options: SheetOptions,
    problems: list[str],
) -> list[SheetEntry]:
    """Decode samples until there are enough, or the time is over; at least one. In order of the shards.

    problems: gets a line for what could not be shown
    """
    started = time.monotonic()
    samples = list(spread_samples(shards, options.num_samples, problems))
    entries: dict[int, SheetEntry] = {}
    for place in coarse_to_fine(len(samples)):
        if entries and time.monotonic() - started > options.max_seconds:
            problems.append(
                f"Decoding was stopped after {options.max_seconds:g} seconds: {len(entries)} of {len(samples)} "
                "samples are shown."
            )
            break
        try:
            entries[place] = _entry(samples[place], tokenizer, sources, options)
        except (ValueError, torch.OutOfMemoryError) as error:  # a latent of another tokenizer, or a very large one
            problems.append(f"{samples[place].key} can't be decoded: {' '.join(str(error).split())}")
    without_source = sum(entry.source is None for entry in entries.values()) if sources is not None else 0
    if without_source:
        problems.append(f"{without_source} source rows no longer give the frames that were encoded.")
    return [entries[place] for place in sorted(entries)]


def _entry(
    sample: LatentSample, tokenizer: CosmosTokenizer, sources: SourceFrames | None, options: SheetOptions
) -> SheetEntry:
    metadata = sample.metadata
    decoded = decode_sample(sample, tokenizer, options.max_frames)
    fps = frames_per_second(metadata)
    shown, height, width, _ = decoded.shape
    entry = SheetEntry(
        key=sample.key,
        caption=str(metadata.get("caption") or ""),
        height=height,
        width=width,
        num_frames=metadata["num_frames"] if isinstance(metadata.get("num_frames"), int) else None,
        frames_shown=shown,
        fps=fps,
        seconds=_start_and_end(metadata),
        mirrored=metadata.get("mirrored") is True,
        decoded=_pictures(decoded, fps),
        source=None,
        psnr=None,
        psnr_first=None,
        psnr_last=None,
    )
    source = None if sources is None else sources.frames_of(sample)
    if source is None or source[:shown].shape != decoded.shape:
        return entry
    source = source[:shown]
    return replace(
        entry,
        source=_pictures(source, fps),
        psnr=psnr_db(source, decoded),
        psnr_first=psnr_db(source[0], decoded[0]),
        psnr_last=psnr_db(source[-1], decoded[-1]),
    )


def _start_and_end(metadata: dict[str, Any]) -> tuple[float, float] | None:
    """Where in its source a clip begins and ends, if its json tells."""
    times = [metadata.get(name) for name in ("start_seconds", "end_seconds")]
    if not all(isinstance(each, int | float) for each in times):
        return None
    start, end = times
    return float(start), float(end)  # type: ignore[arg-type]


def _pictures(frames: np.ndarray, fps: float | None) -> Pictures:
    first = encode_file(shrink(frames[:1], _LONGEST_SIDE), None, PICTURE_SUFFIX)
    if len(frames) == 1:
        return Pictures(first=first, last=None, moving=None)
    return Pictures(
        first=first,
        last=encode_file(shrink(frames[-1:], _LONGEST_SIDE), None, PICTURE_SUFFIX),
        moving=encode_file(shrink(frames, _LONGEST_SIDE_MOVING), fps, PICTURE_SUFFIX),
    )
