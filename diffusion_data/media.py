"""A media reference of a row -> Frames: uint8 (T, H, W, 3), sized for the tokenizer, with its fps.

A reference is bytes; Hugging Face's struct {"bytes", "path"}; a path relative to the parquet file; a URL;
or what a user's own function already decoded: Frames, a PIL image, an array. Pictures and videos are told
apart by content, never by name. What can't be used is a RowRejected with its exact reason.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from diffusion_data.errors import Reason, RowRejected
from diffusion_data.fetch import Fetcher
from diffusion_data.images import decode_image, open_image
from diffusion_data.resize import ResizePlan, plan_bucket, plan_resize
from diffusion_data.video import decode_video

_PILLOW_LIMIT_PIXELS = 178_956_970  # Pillow itself refuses more

# Formats that are media but that nothing here reads: better named than called "not media".
_UNSUPPORTED = (
    (0, b"%!PS", "PostScript"), (0, b"\xc5\xd0\xd3\xc6", "PostScript"), (0, b"%PDF", "PDF"), (0, b"8BPS", "Photoshop"),
    (0, b"\xff\x0a", "JPEG XL"), (4, b"JXL ", "JPEG XL"), (4, b"ftypheic", "HEIC"), (4, b"ftypheix", "HEIC"),
    (4, b"ftyphevc", "HEIC"), (4, b"ftypmif1", "HEIF"), (4, b"ftypmsf1", "HEIF"), (4, b"ftypavif", "AVIF"),
    (4, b"ftypavis", "AVIF"), (0, b"v/1\x01", "OpenEXR"), (0, b"#?RADIANCE", "Radiance HDR"), (0, b"DDS ", "DDS"),
    (0, b"#EXTM3U", "playlist"), (0, b"ffconcat", "playlist"), (0, b"<svg", "SVG"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Frames:
    """Decoded media. source_height and source_width are pixels before any resize, after rotation."""

    pixels: np.ndarray
    fps: float | None
    source_height: int
    source_width: int

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


@dataclass(frozen=True, kw_only=True)
class MediaConfig:
    """How media is fetched, decoded and sized: the `media` options of a recipe."""

    short_side: int | None = 512
    """Pixels of the shorter side, rounded to the tokenizer's multiple; smaller media is enlarged. None keeps
    the size of each source and only crops it to the multiple."""
    resize: str = "short_side"
    """short_side keeps each source's aspect, but for rounding. buckets takes the nearest of a few sizes of about
    equal area and crops what is in excess: then pictures of every shape fill batches."""
    fps: float | None = None
    """Frames a second that videos are resampled to, by timestamp. None takes every stored frame; a clip of
    variable frame rate then keeps its uneven steps."""
    num_frames: int | None = None
    """Most frames of a sample: a longer video is cut to its first clip, and no more than that is decoded. Any
    number; the result has the largest 1 + k * t that fits, t being the tokenizer's temporal compression."""
    jpeg_draft: bool = False
    """Shrink JPEGs while decoding, to no less than twice the size asked for: several times faster on photos,
    but some pixels differ by up to 2 of 255 from those of the full decode."""
    allowed_roots: tuple[str, ...] = ()
    """Folders, or URLs such as s3://bucket/dir, that paths may lead to besides the parquet's own folder."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names or addresses that may be fetched from although they are not public."""
    fetch_timeout_seconds: float = 60.0
    """Longest that one URL may take, its redirects, retries and waits included."""
    fetch_retries: int = 3
    """More tries after a passing failure (429, 5xx, broken connection); no other answer is retried."""
    max_redirects: int = 5
    """Most redirects that are followed from one URL."""
    max_connections_per_host: int = 32
    """Most connections to one host at a time, by all processes of a node together; waiting for one counts as
    fetching. Few are polite to a museum's server, a cloud's storage bears hundreds."""
    max_fetch_bytes: int = 2 * 1024**3
    """Largest body taken from a URL or a remote filesystem; it is held in memory."""
    max_pixels: int = 100_000_000
    """Most pixels of a source picture or video frame, which decoding holds in memory; at most Pillow's limit."""
    min_frames: int = 1
    """Fewest frames that a clip may have in the dataset, after resampling and cutting; pictures are not clips."""
    max_frames: int = 1024
    """Most frames when num_frames sets no limit: a longer video is rejected instead of filling the memory."""
    max_aspect_ratio: float = 10.0
    """Longest side over shortest side, beyond which a source is rejected: banners, broken sizes."""
    min_side: int = 16
    """Pixels of the shorter side, below which a source is rejected: tracking pixels, thumbnails."""

    def __post_init__(self) -> None:
        for name in ("allowed_roots", "allowed_hosts"):  # YAML has lists only
            value = getattr(self, name)
            if isinstance(value, str):
                raise ValueError(f"media.{name} is a list, got the string {value!r}")
            object.__setattr__(self, name, tuple(str(item) for item in value))
        for name in ("short_side", "fps", "num_frames"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"media.{name} must be above 0 or null, got {getattr(self, name)}")
        if self.resize not in ("short_side", "buckets"):
            raise ValueError(f"media.resize is short_side or buckets, got {self.resize!r}")
        if self.resize == "buckets" and self.short_side is None:
            raise ValueError("media.resize=buckets needs media.short_side: the side of the square one")
        for name in (
            "fetch_timeout_seconds", "max_connections_per_host", "max_fetch_bytes", "max_pixels", "min_frames",
            "max_frames", "min_side",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"media.{name} must be above 0, got {getattr(self, name)}")
        for name in ("fetch_retries", "max_redirects"):
            if getattr(self, name) < 0:
                raise ValueError(f"media.{name} must be 0 or more, got {getattr(self, name)}")
        longest = "max_frames" if self.num_frames is None else "num_frames"
        if getattr(self, longest) < self.min_frames:
            raise ValueError(
                f"media.min_frames={self.min_frames} is more than media.{longest}={getattr(self, longest)}"
            )
        if self.max_aspect_ratio < 1:
            raise ValueError(f"media.max_aspect_ratio must be 1 or more, got {self.max_aspect_ratio}")
        if self.max_pixels > _PILLOW_LIMIT_PIXELS:
            raise ValueError(f"media.max_pixels can be {_PILLOW_LIMIT_PIXELS} at most, got {self.max_pixels}")


class MediaLoader:
    """References -> conforming Frames. Picklable; holds no open file."""

    def __init__(self, config: MediaConfig, root: str, temporal_compression: int, size_multiple: int) -> None:
        if temporal_compression < 1 or size_multiple < 1:
            raise ValueError(f"expected 1 or more, got {temporal_compression = }, {size_multiple = }")
        self.config = config
        self.temporal_compression = temporal_compression
        self.size_multiple = size_multiple
        self._fetcher = Fetcher(config, root)

    def load(self, reference: Any) -> Frames:
        """Fetches, decodes, resamples and resizes one reference."""
        if isinstance(reference, Mapping):
            reference = _unwrap(reference)
        if reference is None or (isinstance(reference, float) and math.isnan(reference)):
            raise RowRejected(Reason.null_media, "the media column is null")
        if isinstance(reference, Frames):
            return self.conform(reference)
        if isinstance(reference, np.ndarray):
            return self.conform(_from_array(reference, self.config.fps))
        if isinstance(reference, Image.Image):
            return self._decode_image(reference, io.BytesIO())
        if isinstance(reference, (bytes, bytearray, memoryview)):
            return self._decode(io.BytesIO(reference))
        if isinstance(reference, (str, os.PathLike)):
            reference = os.fspath(reference)
            if not reference.strip():
                raise RowRejected(Reason.empty, "the path is empty")
            with self._fetcher.open(reference) as file:
                return self._decode(file)
        raise RowRejected(
            Reason.not_media,
            f"expected bytes, a path, a URL or an image struct, got {type(reference).__name__}",
        )

    def conform(self, frames: Frames) -> Frames:
        """Resamples, trims and resizes frames that a user's own function made; what is right stays as it is."""
        config = self.config
        pixels, fps = frames.pixels, frames.fps
        if fps is not None and config.fps is not None and not math.isclose(fps, config.fps, rel_tol=1e-6):
            pixels, fps = _resample(pixels, fps, config.fps), config.fps
        pixels = self._trim(pixels, is_clip=frames.fps is not None or frames.num_frames > 1)
        height, width = frames.height, frames.width
        plan = self._plan_size(height, width)
        if (plan.height, plan.width) != (height, width):
            self._check_size(height, width)
            pixels = plan.apply(pixels)
        elif max(height, width) > config.max_aspect_ratio * (min(height, width) + self.size_multiple):
            # Rounding to multiples may have lengthened what load() passed by up to one multiple.
            self._check_size(height, width)
        return Frames(pixels=pixels, fps=fps, source_height=frames.source_height, source_width=frames.source_width)

    def _decode(self, file: BinaryIO) -> Frames:
        head = file.read(512)
        if not head:
            raise RowRejected(Reason.empty, "0 bytes")
        image = open_image(file, self.config)
        if image is not None:
            return self._decode_image(image, file)
        _refuse_unsupported(head)
        num_frames = self.config.num_frames
        limit = self.config.max_frames + 1 if num_frames is None else self._snapped(num_frames)
        video = decode_video(file, self.config, self._plan, limit)
        return Frames(
            pixels=self._trim(video.pixels, is_clip=True),
            fps=video.fps,
            source_height=video.source_height,
            source_width=video.source_width,
        )

    def _decode_image(self, image: Image.Image, file: BinaryIO) -> Frames:
        self._check_size(image.height, image.width)  # before the pixels are decoded
        pixels, height, width = decode_image(image, file, self._plan, self.config.jpeg_draft)
        return Frames(pixels=pixels, fps=None, source_height=height, source_width=width)

    def _plan(self, height: int, width: int) -> ResizePlan:
        self._check_size(height, width)
        return self._plan_size(height, width)

    def _plan_size(self, height: int, width: int) -> ResizePlan:
        short_side = self.config.short_side
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

    def _trim(self, pixels: np.ndarray, *, is_clip: bool) -> np.ndarray:
        if self.config.num_frames is None and len(pixels) > self.config.max_frames:
            raise RowRejected(
                Reason.too_large,
                f"more than media.max_frames={self.config.max_frames} frames; media.num_frames cuts clips",
            )
        kept = self._snapped(min(len(pixels), self.config.num_frames or len(pixels)))
        if is_clip and kept < self.config.min_frames:
            raise RowRejected(
                Reason.too_few_frames,
                f"{len(pixels)} frames, cut to {kept}, less than media.min_frames={self.config.min_frames}",
            )
        return pixels[:kept]

    def _snapped(self, num_frames: int) -> int:
        return snapped(num_frames, self.temporal_compression)


def snapped(num_frames: int, temporal_compression: int) -> int:
    """The largest 1 + k * temporal_compression that is not above num_frames."""
    return 1 + (num_frames - 1) // temporal_compression * temporal_compression


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


def _resample(pixels: np.ndarray, source_fps: float, fps: float) -> np.ndarray:
    """The frame shown at each n / fps, as for video files."""
    wanted = np.arange(max(1, math.ceil(len(pixels) / source_fps * fps - 1e-6)))
    return pixels[np.minimum((wanted / fps * source_fps + 1e-6).astype(int), len(pixels) - 1)]


def _refuse_unsupported(head: bytes) -> None:
    for offset, mark, name in _UNSUPPORTED:
        if head[offset : offset + len(mark)] == mark or (name == "SVG" and _looks_like_svg(head)):
            raise RowRejected(Reason.unsupported_format, f"{name} is not supported")


def _looks_like_svg(head: bytes) -> bool:
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"<svg", b"<?xml")) and b"<svg" in head
