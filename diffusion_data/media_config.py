"""The `media` options of a recipe: how media is fetched, decoded, cut and sized."""

from __future__ import annotations

from dataclasses import dataclass, field

_PILLOW_LIMIT_PIXELS = 178_956_970  # Pillow itself refuses more


@dataclass(frozen=True, kw_only=True)
class ClipsConfig:
    """A long video becomes several samples of its row, each decoded and encoded on its own."""

    num_frames: int | None = None
    """Frames of a clip, cut to the largest 1 + k * t; null makes no clips, so that a video is one sample."""
    stride_frames: int | None = None
    """Frames from the beginning of one clip to the next, at the rate of the clips; fewer than num_frames overlap, and
    more leave gaps. null for this and stride_seconds: each clip begins where the last one ended."""
    stride_seconds: float | None = None
    """The same in seconds: a clip begins with the first frame at or after its time."""
    max_per_row: int = 8
    """Most clips of a row: the video isn't decoded any further. All of them are in memory at a time."""
    min_frames: int | None = None
    """Frames below which a clip is dropped; a row without any left is rejected. null keeps only whole clips, or with
    frame_buckets those that fill the smallest."""

    def __post_init__(self) -> None:
        set_here = [
            name for name in ("stride_frames", "stride_seconds", "min_frames") if getattr(self, name) is not None
        ]
        if self.num_frames is None and set_here:
            raise ValueError(f"{set_here[0]} needs num_frames: the length of a clip")
        for name in ("num_frames", *set_here, "max_per_row"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.stride_frames is not None and self.stride_seconds is not None:
            raise ValueError(f"stride_frames={self.stride_frames} and stride_seconds={self.stride_seconds}: give one")
        if self.num_frames is not None and (self.min_frames or 1) > self.num_frames:
            raise ValueError(f"min_frames={self.min_frames} is more than num_frames={self.num_frames}")


_LISTS = {
    "allowed_roots": str,
    "allowed_hosts": str,
    "allowed_fps": float,
    "frame_buckets": int,
    "extra_short_sides": int,
}


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
    allowed_fps: tuple[float, ...] = ()
    """Rates that clips may have, instead of one: a video is resampled to the highest that is not above its own, and
    rejected if all are. One within 1% of its own counts as its own, which it then keeps. [] allows any rate."""
    num_frames: int | None = None
    """Most frames of a sample: a longer video is cut to its first clip, and no more than that is decoded. Any
    number; the result has the largest 1 + k * t that fits, t being the tokenizer's temporal compression."""
    frame_buckets: tuple[int, ...] = ()
    """Lengths that clips may have, in frames, each cut to 1 + k * t: a clip takes the largest that it fills and the
    rest of it is cut, so that batches are of few shapes. A clip that fills none is too short. [] allows any length."""
    clips: ClipsConfig = field(default_factory=ClipsConfig)
    """Several samples of a long video."""
    extra_short_sides: tuple[int, ...] = ()
    """Smaller sizes that each sample is stored in too, made from the one of short_side: further samples of its row."""
    mirror: bool = False
    """Add to each sample a copy with left and right changed, as a further sample of its row."""
    deinterlace: bool = True
    """Make whole pictures of frames that are flagged as interlaced, as old television and camcorders have them."""
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
    """Fewest frames that a clip may have in the dataset, after resampling and cutting; pictures are not clips. With
    clips or frame_buckets these set the minimum."""
    max_frames: int = 1024
    """Most frames of a row, which are in memory at a time: a longer video that nothing cuts is rejected, and clips of
    more together are refused."""
    max_aspect_ratio: float = 10.0
    """Longest side over shortest side, beyond which a source is rejected: banners, broken sizes."""
    min_side: int = 16
    """Pixels of the shorter side, below which a source is rejected: tracking pixels, thumbnails."""

    def __post_init__(self) -> None:
        for name, kind in _LISTS.items():  # YAML has lists only
            value = getattr(self, name)
            if isinstance(value, str):
                raise ValueError(f"media.{name} is a list, got the string {value!r}")
            object.__setattr__(self, name, tuple(kind(item) for item in value))
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
        self._check_clips()
        if self.max_aspect_ratio < 1:
            raise ValueError(f"media.max_aspect_ratio must be 1 or more, got {self.max_aspect_ratio}")
        if self.max_pixels > _PILLOW_LIMIT_PIXELS:
            raise ValueError(f"media.max_pixels can be {_PILLOW_LIMIT_PIXELS} at most, got {self.max_pixels}")

    @property
    def longest_clip(self) -> tuple[int | None, str]:
        """Frames of a clip at most, before they are cut to 1 + k * t, and the option that says so."""
        if self.clips.num_frames is not None:
            return self.clips.num_frames, "media.clips.num_frames"
        if self.frame_buckets:
            return max(self.frame_buckets), "media.frame_buckets"
        return self.num_frames, "media.num_frames"

    @property
    def shortest_clip(self) -> tuple[int, str]:
        """Frames of a clip at least, and the option that says so."""
        if self.clips.min_frames is not None:
            return self.clips.min_frames, "media.clips.min_frames"
        if self.frame_buckets:
            return min(self.frame_buckets), "media.frame_buckets"
        if self.clips.num_frames is not None:
            return self.clips.num_frames, "media.clips.num_frames"
        return self.min_frames, "media.min_frames"

    def _check_clips(self) -> None:
        """Refuse options that contradict each other."""
        for name in ("allowed_fps", "frame_buckets", "extra_short_sides"):
            if any(not each > 0 for each in getattr(self, name)):
                raise ValueError(f"media.{name}={list(getattr(self, name))}: all must be above 0")
        if self.fps is not None and self.allowed_fps:
            raise ValueError(f"media.fps={self.fps} and media.allowed_fps={list(self.allowed_fps)}: give one of them")
        sides = self.extra_short_sides
        if sides and (self.short_side is None or max(sides) >= self.short_side or len(set(sides)) < len(sides)):
            raise ValueError(
                f"media.extra_short_sides={list(sides)}: must be different and below media.short_side={self.short_side}"
            )
        longest, longest_option = self.longest_clip
        if self.num_frames is not None and longest_option != "media.num_frames":
            raise ValueError(f"media.num_frames={self.num_frames} and {longest_option}={longest}: give one of them")
        if self.frame_buckets and longest != max(self.frame_buckets):
            raise ValueError(
                f"{longest_option}={longest} is not the largest of media.frame_buckets={list(self.frame_buckets)}"
            )
        shortest, shortest_option = self.shortest_clip
        if self.min_frames > shortest:
            raise ValueError(f"media.min_frames={self.min_frames} is more than {shortest_option}={shortest}")
        if longest is None and self.max_frames < shortest:
            raise ValueError(f"{shortest_option}={shortest} is more than media.max_frames={self.max_frames}")
        if longest is not None and longest < shortest:
            raise ValueError(f"{shortest_option}={shortest} is more than {longest_option}={longest}")
        clips = self.clips
        if clips.num_frames is not None and clips.max_per_row * clips.num_frames > self.max_frames:
            raise ValueError(
                f"media.clips.max_per_row={clips.max_per_row} of {clips.num_frames} frames are more than "
                f"media.max_frames={self.max_frames}, which a row may have in memory"
            )
