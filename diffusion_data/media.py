"""A media reference of a row -> Frames: uint8 (T, H, W, 3), sized for the tokenizer, with its fps.

A reference is bytes; Hugging Face's struct {"bytes", "path"}; a path relative to the parquet file; a URL;
or what a user's own function already decoded: Frames, a PIL image, an array. Pictures and videos are told
apart by content, never by name. What can't be used is a RowRejected with its exact reason.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np
from PIL import Image

from diffusion_data.clips import ClipCutter, ClipLengths, LeftOut, covered_seconds
from diffusion_data.errors import Reason, RowRejected
from diffusion_data.fetch import Fetcher
from diffusion_data.images import decode_image, open_image
from diffusion_data.media_config import MediaConfig
from diffusion_data.resize import ResizePlan, plan_bucket, plan_resize
from diffusion_data.unsupported_media import refuse_unsupported
from diffusion_data.video import DecodedVideo, decode_video, wanted_fps


@dataclass(frozen=True, kw_only=True)
class Frames:
    """Decoded media. source_height and source_width are pixels before any resize, after rotation.

    start_seconds, end_seconds: of a clip, where in its video it begins and ends, from the video's first frame
    """

    pixels: np.ndarray
    fps: float | None
    source_height: int
    source_width: int
    start_seconds: float | None = None
    end_seconds: float | None = None

    def __post_init__(self) -> None:
        shape = self.pixels.shape
        if self.pixels.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
            raise ValueError(f"expected uint8 (T, H, W, 3), got {self.pixels.dtype} {shape}")
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"expected fps above 0, or None for a still picture, got {self.fps}")

    @property
    def num_frames(self) -> int:
        return int(self.pixels.shape[0])

    @property
    def height(self) -> int:
        return int(self.pixels.shape[1])

    @property
    def width(self) -> int:
        return int(self.pixels.shape[2])


class _Seconds(NamedTuple):
    """Of a video: those in clips, and all; None where that isn't known."""

    kept: float
    duration: float | None


class MediaLoader:
    """References -> conforming Frames. Picklable; holds no open file.

    left_out: adds up what videos lose; whoever asks for it puts a fresh one in its place
    """

    def __init__(self, config: MediaConfig, root: str, temporal_compression: int, size_multiple: int) -> None:
        if temporal_compression < 1 or size_multiple < 1:
            raise ValueError(f"expected 1 or more, got {temporal_compression = }, {size_multiple = }")
        self.config = config
        self.temporal_compression = temporal_compression
        self.size_multiple = size_multiple
        self.left_out = LeftOut()
        self._lengths = ClipLengths.of(config, temporal_compression)
        self._fetcher = Fetcher(config, root)

    def load(self, reference: Any) -> Frames:
        """Fetches, decodes, resamples and resizes one reference; of a video its first clip."""
        (frames,) = self._load(reference, max_clips=1)
        return frames

    def load_clips(self, reference: Any) -> list[Frames]:
        """As `load`, but all clips of a video that option media.clips asks for; without it the one of `load`."""
        return self._load(reference, self.config.clips.max_per_row if self.config.clips.num_frames else 1)

    def conform(self, frames: Frames) -> Frames:
        """Resamples, trims and resizes frames that a user's own function made; what is right stays as it is."""
        (conforming,) = self._conform(frames, max_clips=1)[0]
        return conforming

    def variants(self, frames: Frames) -> Iterator[tuple[Frames, bool | None]]:
        """(frames, whether they are mirrored) of each sample that a process function's frames become.

        That is one, unless media.extra_short_sides or media.mirror ask for more; None where nothing is mirrored.
        """
        conforming = self.conform(frames)
        for short_side in (self.config.short_side, *self.config.extra_short_sides):
            sized = self._resized(conforming, short_side)
            if not self.config.mirror:
                yield sized, None
                continue
            yield sized, False
            yield replace(sized, pixels=sized.pixels[:, :, ::-1]), True

    def _load(self, reference: Any, max_clips: int) -> list[Frames]:
        if isinstance(reference, Mapping):
            reference = _unwrap(reference)
        if reference is None or (isinstance(reference, float) and math.isnan(reference)):
            raise RowRejected(Reason.null_media, "the media column is null")
        if isinstance(reference, Frames):
            return self._counted(*self._conform(reference, max_clips))
        if isinstance(reference, np.ndarray):
            return self._counted(*self._conform(_from_array(reference, self.config.fps), max_clips))
        if isinstance(reference, Image.Image):
            return [self._decode_image(reference, io.BytesIO())]
        if isinstance(reference, (bytes, bytearray, memoryview)):
            return self._decode(io.BytesIO(reference), max_clips)
        if isinstance(reference, (str, os.PathLike)):
            reference = os.fspath(reference)
            if not reference.strip():
                raise RowRejected(Reason.empty, "the path is empty")
            with self._fetcher.open(reference) as file:
                return self._decode(file, max_clips)
        raise RowRejected(
            Reason.not_media,
            f"expected bytes, a path, a URL or an image struct, got {type(reference).__name__}",
        )

    def _decode(self, file: BinaryIO, max_clips: int) -> list[Frames]:
        head = file.read(512)
        if not head:
            raise RowRejected(Reason.empty, "0 bytes")
        image = open_image(file, self.config)
        if image is not None:
            return [self._decode_image(image, file)]
        refuse_unsupported(head)
        video = decode_video(file, self.config, self._plan, self._cutter(max_clips))
        return self._counted(*self._kept(video))

    def _conform(self, frames: Frames, max_clips: int) -> tuple[list[Frames], _Seconds]:
        if frames.fps is None and frames.num_frames == 1:
            return [self._resized(frames, self.config.short_side)], _Seconds(0.0, None)
        pixels, fps = frames.pixels, frames.fps
        wanted = None if fps is None else wanted_fps(fps, self.config)
        if fps is not None and wanted is not None and not math.isclose(fps, wanted, rel_tol=1e-6):
            pixels, fps = _resample(pixels, fps, wanted), wanted
        clips, seconds = self._kept(_cut(replace(frames, pixels=pixels, fps=fps), self._cutter(max_clips)))
        if frames.start_seconds is not None and len(clips[0].pixels) == len(pixels):
            clips = [replace(clips[0], start_seconds=frames.start_seconds, end_seconds=frames.end_seconds)]
        if fps is None:
            clips = [replace(clip, fps=None, start_seconds=None, end_seconds=None) for clip in clips]
            seconds = _Seconds(0.0, None)
        return [self._resized(clip, self.config.short_side) for clip in clips], seconds

    def _cutter(self, max_clips: int) -> ClipCutter:
        longest, clips = self._lengths.longest, self.config.clips
        return ClipCutter(
            num_frames=self.config.max_frames + 1 if longest is None else longest,
            max_clips=max_clips,
            stride_frames=clips.stride_frames,
            stride_seconds=clips.stride_seconds,
        )

    def _resized(self, frames: Frames, short_side: int | None) -> Frames:
        config = self.config
        height, width = frames.height, frames.width
        plan = self._plan_size(height, width, short_side)
        if (plan.height, plan.width) != (height, width):
            self._check_size(height, width)
            return replace(frames, pixels=plan.apply(frames.pixels))
        if max(height, width) > config.max_aspect_ratio * (min(height, width) + self.size_multiple):
            # Rounding to multiples may have lengthened what load() passed by up to one multiple.
            self._check_size(height, width)
        return frames

    def _decode_image(self, image: Image.Image, file: BinaryIO) -> Frames:
        self._check_size(image.height, image.width)  # before the pixels are decoded
        pixels, height, width = decode_image(image, file, self._plan, self.config.jpeg_draft)
        return Frames(pixels=pixels, fps=None, source_height=height, source_width=width)

    def _plan(self, height: int, width: int) -> ResizePlan:
        self._check_size(height, width)
        return self._plan_size(height, width, self.config.short_side)

    def _plan_size(self, height: int, width: int, short_side: int | None) -> ResizePlan:
        if self.config.resize == "buckets" and short_side is not None:
            return plan_bucket(height, width, short_side, self.size_multiple)
        return plan_resize(height, width, short_side, self.size_multiple)

    def _check_size(self, height: int, width: int) -> None:
        short, long = sorted((height, width))
        if short < self.config.min_side:
            raise RowRejected(
                Reason.too_small, f"{width} x {height} pixels, less than media.min_side={self.config.min_side}"
            )
        if long > self.config.max_aspect_ratio * short:
            raise RowRejected(
                Reason.bad_aspect,
                f"{width} x {height} pixels, beyond media.max_aspect_ratio={self.config.max_aspect_ratio}",
            )

    def _kept(self, video: DecodedVideo) -> tuple[list[Frames], _Seconds]:
        """The clips that are long enough, each cut to a length that is allowed."""
        if self._lengths.longest is None and len(video.pixels) > self.config.max_frames:
            raise RowRejected(
                Reason.too_large,
                f"more than media.max_frames={self.config.max_frames} frames; media.num_frames cuts clips",
            )
        are_clips = self.config.clips.num_frames is not None
        clips: list[Frames] = []
        spans: list[tuple[float, float]] = []
        for (start, stop), fps in zip(video.clips, video.fps, strict=True):
            kept = self._lengths.cut(stop - start)
            if kept < self._lengths.shortest:
                self.left_out.clips_dropped += 1
                continue
            self.left_out.frames_cut += stop - start - kept
            begin, end = video.times[start][0], video.times[start + kept - 1][1]
            spans.append((begin, end))
            clips.append(
                Frames(
                    pixels=video.pixels[start : start + kept],
                    fps=fps,
                    source_height=video.source_height,
                    source_width=video.source_width,
                    start_seconds=round(begin, 6) if are_clips else None,
                    end_seconds=round(end, 6) if are_clips else None,
                )
            )
        if not clips:
            self._refuse_short(max(stop - start for start, stop in video.clips))
        return clips, _Seconds(covered_seconds(spans), video.duration_seconds)

    def _refuse_short(self, num_frames: int) -> NoReturn:
        kept = self._lengths.cut(num_frames)
        cut = f", cut to {kept}" if kept else ""
        raise RowRejected(Reason.too_few_frames, f"{num_frames} frames{cut}, less than {self._lengths.shortest_option}")

    def _counted(self, clips: list[Frames], seconds: _Seconds) -> list[Frames]:
        """Seconds are counted where media is loaded, for it is conformed once more when it has become a sample."""
        self.left_out.seconds_kept += seconds.kept
        if seconds.duration is not None:
            self.left_out.seconds_left_out += max(0.0, seconds.duration - seconds.kept)
        return clips


def _unwrap(struct: Mapping[str, Any]) -> Any:
    if "bytes" not in struct and "path" not in struct:
        raise RowRejected(Reason.not_media, f"expected a struct of bytes and path, got {sorted(struct)}")
    data = struct.get("bytes")
    return struct.get("path") if data is None else data


def _from_array(array: np.ndarray, fps: float | None) -> Frames:
    """An array (H, W, 3), or (T, H, W, 3) that is taken to be at the wanted fps."""
    pixels = array[None] if array.ndim == 3 else array
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape:
        raise RowRejected(
            Reason.not_media, f"expected uint8 (H, W, 3) or (T, H, W, 3), got {array.dtype} {array.shape}"
        )
    height, width = pixels.shape[1:3]
    return Frames(pixels=pixels, fps=fps if array.ndim == 4 else None, source_height=height, source_width=width)


def _cut(frames: Frames, cutter: ClipCutter) -> DecodedVideo:
    """Frames in memory -> their clips, which stay where they are."""
    fps = frames.fps
    if fps is None and cutter.stride_seconds is not None:
        raise ValueError("media.clips.stride_seconds needs the fps of the frames")
    times = [(number / (fps or 1.0), (number + 1) / (fps or 1.0)) for number in range(frames.num_frames)]
    taken = [number for number, (start, _) in enumerate(times) if not cutter.is_done and cutter.take(start, 1e-6)]
    clips = [(taken[start], taken[stop - 1] + 1) for start, stop in cutter.clips()]
    return DecodedVideo(
        pixels=frames.pixels,
        clips=clips,
        fps=[fps or 1.0] * len(clips),
        times=times,
        duration_seconds=None if fps is None else times[-1][1],
        source_height=frames.source_height,
        source_width=frames.source_width,
    )


def _resample(pixels: np.ndarray, source_fps: float, fps: float) -> np.ndarray:
    """The frame shown at each n / fps, as for video files."""
    wanted = np.arange(max(1, math.ceil(len(pixels) / source_fps * fps - 1e-6)))
    return pixels[np.minimum((wanted / fps * source_fps + 1e-6).astype(int), len(pixels) - 1)]
