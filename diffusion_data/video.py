"""A video file (seekable, binary) -> uint8 (N, h, w, 3) frames of its clips, upright, resized as they come.

    container -> one stream -> decoded frames -> deinterlaced -> (seconds, frame) -> frames at the wanted fps
              -> those in clips -> RGB -> resize

A video is gone through once, however many clips there are; frames that are in none are decoded and nothing more.
Decoding stops as soon as enough frames are there, and no more than one full-size frame is held. Only
container formats that hold their own data are tried: a playlist can't make this open other files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from diffusion_data.clips import ClipCutter
from diffusion_data.deinterlace import deinterlaced
from diffusion_data.errors import Reason, RowRejected
from diffusion_data.resize import ResizePlan
from diffusion_data.rgb_frames import RgbConverter, display_matrix, turn_upright
from diffusion_data.truncation import is_cut_short

if TYPE_CHECKING:
    from diffusion_data.media_config import MediaConfig

# No playlists, no image sequences, no devices; no raw streams either, whose probing takes noise for video.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,ivf,mxf,rm,nut,yuv4mpegpipe"

# Where these are found, a file that can't be opened is a damaged video rather than something else.
_SIGNATURES = ((4, b"ftyp"), (4, b"moov"), (4, b"mdat"), (0, b"\x1a\x45\xdf\xa3"), (8, b"AVI "), (0, b"FLV\x01"),
               (0, b"OggS"), (0, b"\x30\x26\xb2\x75"), (0, b"\0\0\x01\xba"), (0, b"DKIF"), (0, b".RMF"))  # fmt: skip

_ATTACHED_PICTURE, _DEFAULT_TRACK = 1 << 10, 1 << 0  # libavformat's disposition bits
_CONTAINER_TIME_BASE = 1_000_000  # libav's ticks a second, of what a container says of itself
_SAME_FPS = 1.01  # 29.97 frames a second are as good as 30
_FALLBACK_FPS = 25.0  # of a file with neither timestamps nor a rate


class _DamagedFrame(Exception):
    """The decoder itself says that a frame is not what was filmed."""


@dataclass(frozen=True, kw_only=True)
class DecodedVideo:
    """pixels uint8 (N, h, w, 3); source sizes in pixels, as stored, after rotation.

    clips: (start, stop) of each in `pixels`; they overlap where they share frames
    fps: of each clip
    times: (start, end) in seconds at which each frame is shown, from the video's first frame
    duration_seconds: of the video; None where it wasn't decoded to its end and doesn't tell
    """

    pixels: np.ndarray
    clips: list[tuple[int, int]]
    fps: list[float]
    times: list[tuple[float, float]]
    duration_seconds: float | None
    source_height: int
    source_width: int


def decode_video(
    file: BinaryIO, config: MediaConfig, plan_for: Callable[[int, int], ResizePlan], cutter: ClipCutter
) -> DecodedVideo:
    """The clips that cutter makes. plan_for(height, width) is asked once, for the upright display size."""
    import av

    file.seek(0)
    head = file.read(16)
    file.seek(0)
    try:
        # The file object is all that libav may read; its protocols and other containers are closed to it.
        container = av.open(
            file,
            options={"format_whitelist": _CONTAINERS, "protocol_whitelist": "none"},
            metadata_errors="replace",
        )
    except (av.error.FFmpegError, ValueError) as error:
        if not any(head[at : at + len(mark)] == mark for at, mark in _SIGNATURES):
            raise RowRejected(Reason.not_media, "the content is neither a picture nor a video") from error
        if isinstance(error, EOFError):
            raise RowRejected(_truncated_or(Reason.no_frames, file), "it ends before its first frame") from error
        raise _damaged(file, error) from error
    with container:
        stream = _best_stream(container)
        if stream is None:
            raise RowRejected(Reason.no_frames, "no video stream that can be decoded")
        stream.thread_type = "NONE"  # one worker a core already
        _check_pixels(stream.codec_context, config)
        # Sizes may grow inside a stream. libav counts padding too, so the exact check is ours, in _decoded.
        stream.codec_context.options = {"max_pixels": str(4 * config.max_pixels + 10**6)}
        try:
            decoded = _clips(stream, _decoded(container, stream, config), config, plan_for, cutter)
        except (av.error.FFmpegError, EOFError, _DamagedFrame) as error:
            raise _damaged(file, error) from error
    if decoded is None:
        raise RowRejected(_truncated_or(Reason.no_frames, file), "no frame in it")
    if not cutter.is_done and is_cut_short(file):
        raise RowRejected(Reason.truncated, "the file ends in the middle of the video")
    return decoded


def _clips(
    stream: Any,
    frames: Iterable[Any],
    config: MediaConfig,
    plan_for: Callable[[int, int], ResizePlan],
    cutter: ClipCutter,
) -> DecodedVideo | None:
    clock = FrameClock(float(stream.average_rate or stream.guessed_rate or _FALLBACK_FPS))
    fps = wanted_fps(clock.average_fps, config)
    tolerance = min(0.001, float(stream.time_base or 0.001))  # timestamps are rounded to the time base
    to_rgb = RgbConverter()
    plan: ResizePlan | None = None
    times: list[tuple[float, float]] = []
    taken = bytearray()  # grows in place: frames in a list would all be there twice when they are joined
    last_frame, height, width, duration = None, 0, 0, 0.0
    pixels = np.empty((0, 0, 3), np.uint8)
    was_taken = False
    for at_seconds, shown_seconds, frame in frames_at(fps, clock.timed(frames), tolerance):
        duration = at_seconds + shown_seconds
        if was_taken:  # a frame lasts until the next, whatever it declares: matroska declares the average
            times[-1] = (times[-1][0], at_seconds)
        was_taken = cutter.take(at_seconds, tolerance)
        if not was_taken:
            continue
        if frame is not last_frame:
            upright = turn_upright(to_rgb(frame), display_matrix(frame))
            if plan is None:
                height, width = upright.shape[:2]
                plan = plan_for(*_display_size(stream, frame, height, width))
            pixels = np.ascontiguousarray(plan.apply(upright[None])[0])
            last_frame = frame
        taken += pixels.data
        times.append((at_seconds, duration))
        if cutter.is_done:
            break
    if not times:
        return None
    clips = cutter.clips()
    return DecodedVideo(
        pixels=np.frombuffer(taken, np.uint8).reshape(len(times), *pixels.shape),
        clips=clips,
        fps=[fps or clock.measured_fps([start for start, _ in times[slice(*clip)]]) for clip in clips],
        times=times,
        duration_seconds=_declared_seconds(stream) if cutter.is_done else duration,
        source_height=height,
        source_width=width,
    )


def wanted_fps(source_fps: float, config: MediaConfig) -> float | None:
    """What a video of that rate is resampled to, which also evens out a variable rate; None for not at all."""
    if not config.allowed_fps:
        return config.fps
    possible = [each for each in config.allowed_fps if each <= source_fps * _SAME_FPS]
    if not possible:
        raise RowRejected(
            Reason.fps_too_low, f"{source_fps:g} fps, below all of media.allowed_fps={list(config.allowed_fps)}"
        )
    # Nearly the same rate is left as it is: to make 30 of 29.97 shows a frame twice, mostly the first of a clip.
    highest = max(possible)
    return highest if highest * _SAME_FPS < source_fps else source_fps


def _declared_seconds(stream: Any) -> float | None:
    if stream.duration is not None and stream.time_base:
        return float(stream.duration * stream.time_base)
    container = stream.container
    return None if container.duration is None else container.duration / _CONTAINER_TIME_BASE


class FrameClock:
    """Decoded frames -> (seconds since the first, seconds shown, frame), seconds strictly increasing.

    Frames without a timestamp, and timestamps that jump back (joined recordings), go on at the average rate.
    """

    def __init__(self, average_fps: float) -> None:
        self.average_fps = average_fps

    def timed(self, frames: Iterable[Any]) -> Iterator[tuple[float, float, Any]]:
        """frames have .time and .duration (in .time_base), either of which may be None or 0."""
        interval = 1.0 / self.average_fps
        now, start = -interval, None
        for frame in frames:
            expected = now + interval
            if frame.time is None:
                now = expected
            else:
                if start is None or frame.time - start <= now:
                    start = frame.time - expected
                now = frame.time - start
            shown = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else interval
            yield now, shown, frame

    def measured_fps(self, seconds: list[float]) -> float:
        """The declared average rate, which is exact, unless the timestamps of this clip contradict it."""
        if len(seconds) < 2 or seconds[-1] <= seconds[0]:
            return self.average_fps
        measured = (len(seconds) - 1) / (seconds[-1] - seconds[0])
        return self.average_fps if abs(measured / self.average_fps - 1.0) < 0.05 else measured


def frames_at(
    fps: float | None, timed: Iterable[tuple[float, float, Any]], tolerance: float
) -> Iterator[tuple[float, float, Any]]:
    """(seconds, seconds shown, frame shown at that time) for n / fps, n = 0, 1, ... until the video ends.

    The frame shown is the last one that is not later, so a frame may come several times. fps None gives
    every frame once.
    """
    count, previous, end = 0, None, 0.0
    for seconds, shown, frame in timed:
        if fps is None:
            yield seconds, shown, frame
            continue
        while previous is not None and count / fps < seconds - tolerance:
            yield count / fps, 1 / fps, previous
            count += 1
        previous, end = frame, seconds + shown
    while fps is not None and previous is not None and count / fps < end - tolerance:
        yield count / fps, 1 / fps, previous
        count += 1


def _best_stream(container: Any) -> Any:
    """The default track before others, then the largest; never a cover picture. None if there is none."""
    candidates = [
        stream
        for stream in container.streams.video
        if stream.codec_context is not None and not stream.disposition.value & _ATTACHED_PICTURE
    ]
    return max(
        candidates,
        key=lambda stream: (
            stream.disposition.value & _DEFAULT_TRACK,
            stream.codec_context.width * stream.codec_context.height,
            -stream.index,
        ),
        default=None,
    )


def _decoded(container: Any, stream: Any, config: MediaConfig) -> Iterator[Any]:
    frames = _checked(container.decode(stream), config)
    return deinterlaced(frames) if config.deinterlace else frames


def _checked(frames: Iterable[Any], config: MediaConfig) -> Iterator[Any]:
    for frame in frames:
        if frame.is_corrupt:
            raise _DamagedFrame(f"the frame at {frame.time} s is damaged")
        _check_pixels(frame, config)
        yield frame


def _check_pixels(sized: Any, config: MediaConfig) -> None:
    if sized.width * sized.height > config.max_pixels:
        raise RowRejected(
            Reason.too_large,
            f"{sized.width} x {sized.height} pixels, more than media.max_pixels={config.max_pixels}",
        )


def _display_size(stream: Any, frame: Any, height: int, width: int) -> tuple[int, int]:
    """Upright (height, width) in square pixels, which old television formats do not store."""
    aspect = getattr(frame, "sample_aspect_ratio", None) or stream.sample_aspect_ratio
    if not aspect or aspect <= 0 or aspect == 1:
        return height, width
    if (frame.height, frame.width) == (height, width):
        return height, max(1, round(width * aspect))
    return max(1, round(height * aspect)), width


def _damaged(file: BinaryIO, error: Exception) -> RowRejected:
    return RowRejected(_truncated_or(Reason.decode_error, file), f"the video can't be decoded: {error}")


def _truncated_or(reason: Reason, file: BinaryIO) -> Reason:
    return Reason.truncated if is_cut_short(file) else reason
