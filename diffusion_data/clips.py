"""Which frames of a video become clips, and how many of each are kept. Numbers only, no pixels.

frames with their seconds ─ ClipCutter ─▶ runs of frames ─ ClipLengths ─▶ 1 + k * t frames of each, or none
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffusion_data.errors import UserError

if TYPE_CHECKING:
    from diffusion_data.media_config import MediaConfig


@dataclass(kw_only=True)
class LeftOut:
    """What of videos is in no sample: known before anything is encoded.

    frames_cut: from the ends of clips, to lengths that are allowed
    clips_dropped: for being too short
    seconds_kept: of videos, frames of overlapping clips counted once
    seconds_left_out: between, behind and beyond clips; of a video that isn't decoded to its end, as far as it tells
    """

    frames_cut: int = 0
    clips_dropped: int = 0
    seconds_kept: float = 0.0
    seconds_left_out: float = 0.0


@dataclass(frozen=True)
class ClipLengths:
    """Numbers of frames that a clip may have.

    allowed: largest first; None is any 1 + k * temporal_compression
    longest: None sets no limit
    shortest_option: the option and value that `shortest` comes from, for messages
    """

    temporal_compression: int
    allowed: tuple[int, ...] | None
    longest: int | None
    shortest: int
    shortest_option: str

    @classmethod
    def of(cls, config: MediaConfig, temporal_compression: int) -> ClipLengths:
        """Raises UserError if the limits leave no length."""
        longest, longest_option = config.longest_clip
        shortest, shortest_option = config.shortest_clip
        if longest is not None:
            kept = snapped(longest, temporal_compression)
            if shortest_option == "media.clips.num_frames":  # whole ones only, and this is what is left of one
                shortest = kept
            if kept < shortest:
                raise UserError(
                    f"{shortest_option}={shortest}: {longest_option}={longest} leaves only {kept} frames, "
                    f"1 + k * {temporal_compression}"
                )
            longest = kept
        buckets = {snapped(each, temporal_compression) for each in config.frame_buckets}
        return cls(
            temporal_compression=temporal_compression,
            allowed=tuple(sorted(buckets, reverse=True)) or None,
            longest=longest,
            shortest=snapped(shortest, temporal_compression) if config.frame_buckets else shortest,
            shortest_option=f"{shortest_option}={shortest}",
        )

    def cut(self, num_frames: int) -> int:
        """The most of so many frames that a clip may have, however short; 0 if there is no such length."""
        most = num_frames if self.longest is None else min(num_frames, self.longest)
        if self.allowed is None:
            return snapped(most, self.temporal_compression)
        return next((each for each in self.allowed if each <= most), 0)


@dataclass
class ClipCutter:
    """Frames of a video, one after the other -> which of them are in clips.

    num_frames: of a whole clip; the video's end may cut the last ones short
    max_clips: no more are begun
    stride_frames, stride_seconds: from the beginning of one clip to the next; None for both lets clips follow each
        other. In seconds, a clip begins with the first frame at or after its time
    """

    num_frames: int
    max_clips: int = 1
    stride_frames: int | None = None
    stride_seconds: float | None = None
    starts: list[int] = field(default_factory=list)  # of clips, counted in frames that were taken
    num_taken: int = 0
    _num_seen: int = 0
    _next_seconds: float = 0.0

    def take(self, seconds: float, tolerance: float = 0.0) -> bool:
        """Whether the next frame, shown at that time, is in a clip. tolerance: of the time, in seconds."""
        if len(self.starts) < self.max_clips and self._begins(seconds + tolerance):
            self.starts.append(self.num_taken)
        self._num_seen += 1
        taken = bool(self.starts) and self.num_taken < self.starts[-1] + self.num_frames
        self.num_taken += taken
        return taken

    @property
    def is_done(self) -> bool:
        """No further frame will be taken."""
        return len(self.starts) == self.max_clips and self.num_taken >= self.starts[-1] + self.num_frames

    def clips(self) -> list[tuple[int, int]]:
        """(start, stop) of each clip, in frames that were taken."""
        return [(start, min(start + self.num_frames, self.num_taken)) for start in self.starts]

    def _begins(self, seconds: float) -> bool:
        if self.stride_seconds is None:
            return self._num_seen % (self.stride_frames or self.num_frames) == 0
        if seconds < self._next_seconds:
            return False
        # Where frames stand for longer than a stride, the beginnings that have passed are left out.
        while self._next_seconds <= seconds:
            self._next_seconds += self.stride_seconds
        return True


def snapped(num_frames: int, temporal_compression: int) -> int:
    """The largest 1 + k * temporal_compression that is not above num_frames."""
    return 1 + (num_frames - 1) // temporal_compression * temporal_compression


def covered_seconds(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of (start, end), which are in order of their starts."""
    total, until = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
