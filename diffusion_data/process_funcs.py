"""One parquet row -> MediaSample: the extension point. The ready-made process functions live here.

A process function is any importable function

    process_func(row, **arguments) -> MediaSample, or a list of them: further samples of the same row

`row` is a dict of Python values, `arguments` are the other options of `process_func` in the recipe. One
that has a parameter `media` is handed the run's MediaLoader, which fetches, decodes and resizes whatever
a row refers to; one that has a parameter `empty_captions` is handed the run's option of that name; one that has a
parameter `rng` is handed a random.Random that depends on the run's seed and the row's index alone. It runs
in worker processes on the CPU and never sees a model or a device. It raises `RowRejected(reason, message)`
for a row that can't be used; any other exception rejects the row as `process_func_error`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from diffusion_data.captions import captions_of, fill_template, is_blank
from diffusion_data.errors import Reason, RowRejected
from diffusion_data.media import Frames, MediaLoader

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class MediaSample:
    """What a row became on the CPU.

    frames: uint8 (T, H, W, 3) with their rate; any size, the pipeline resizes what doesn't fit yet
    caption: text of any length; empty or None is rejected, or embedded as the empty text, as option empty_captions says
    metadata: further json fields of the sample
    """

    frames: Frames
    caption: str | None
    metadata: dict[str, Any] = field(default_factory=dict)


def media_caption(
    row: dict[str, Any],
    *,
    media: MediaLoader,
    rng: random.Random | None = None,
    empty_captions: str = "reject",
    media_column: str | Sequence[str] = "media",
    caption_column: str | Sequence[str] = "caption",
    caption_template: str = "{caption}",
    keep_captions: bool = False,
) -> MediaSample | list[MediaSample]:
    """A picture or a clip, told apart by content, and its caption; a list where media.clips makes several of a video.

    media_column: one column, or several of which the first that is not null counts.
    caption_column: one column, or several, each of text or of a list of texts; one is drawn for each sample.
    caption_template: as "a photo of {caption}, {style}", style being a column.
    keep_captions: put all captions that could have been drawn into the json, as `captions`.
    """
    captions = _Captions(row, caption_column, caption_template, keep_captions, empty_captions, rng)
    columns = [media_column] if isinstance(media_column, str) else media_column
    references = [row[column] for column in columns if row[column] is not None]
    if not references:
        raise RowRejected(Reason.null_media, f"null in {', '.join(columns)}")
    samples = [captions.sample(frames) for frames in media.load_clips(references[0])]
    return samples[0] if len(samples) == 1 else samples


def image_caption(
    row: dict[str, Any],
    *,
    media: MediaLoader,
    rng: random.Random | None = None,
    empty_captions: str = "reject",
    media_column: str = "image",
    caption_column: str | Sequence[str] = "caption",
    caption_template: str = "{caption}",
    keep_captions: bool = False,
) -> MediaSample:
    """A picture and its caption, as media_caption; a clip is rejected."""
    captions = _Captions(row, caption_column, caption_template, keep_captions, empty_captions, rng)
    frames = _loaded(row, media_column, media.load)
    if frames.fps is not None:
        raise RowRejected(Reason.unsupported_format, f"{media_column} holds a clip, expected a picture")
    return captions.sample(frames)


def video_caption(
    row: dict[str, Any],
    *,
    media: MediaLoader,
    rng: random.Random | None = None,
    empty_captions: str = "reject",
    media_column: str = "video",
    caption_column: str | Sequence[str] = "caption",
    caption_template: str = "{caption}",
    keep_captions: bool = False,
) -> MediaSample | list[MediaSample]:
    """A clip and its caption, as media_caption, which may give several; a picture is rejected."""
    captions = _Captions(row, caption_column, caption_template, keep_captions, empty_captions, rng)
    clips = _loaded(row, media_column, media.load_clips)
    if clips[0].fps is None:
        raise RowRejected(Reason.unsupported_format, f"{media_column} holds a picture, expected a clip")
    samples = [captions.sample(frames) for frames in clips]
    return samples[0] if len(samples) == 1 else samples


def butterflies(row: dict[str, Any], *, media: MediaLoader, empty_captions: str = "reject") -> MediaSample:
    """Smithsonian butterflies (huggan/smithsonian_butterflies_subset): a picture by URL and its species."""
    return image_caption(
        row, media=media, empty_captions=empty_captions, media_column="image_url", caption_column="name"
    )


def _loaded(row: dict[str, Any], column: str, load: Callable[[Any], T]) -> T:
    if row[column] is None:
        raise RowRejected(Reason.null_media, f"null in {column}")
    return load(row[column])


class _Captions:
    """The captions of a row, checked before any media is fetched for it."""

    def __init__(
        self,
        row: dict[str, Any],
        columns: str | Sequence[str],
        template: str,
        keep: bool,
        empty_captions: str,
        rng: random.Random | None,
    ) -> None:
        place = columns if isinstance(columns, str) else ", ".join(columns)
        found = captions_of(row, columns) or [None]
        usable = [each for each in found if not is_blank(each)] or found[:1]
        checked = [checked_caption(each, place, empty_captions) for each in usable]
        # The empty text stays empty: it is what training without a caption sees.
        self._captions = [fill_template(template, each, row) if each else each for each in checked]
        self._keep = keep
        self._rng = rng or random.Random(0)

    def sample(self, frames: Frames) -> MediaSample:
        metadata = {"captions": list(self._captions)} if self._keep else {}
        return MediaSample(frames=frames, caption=self._rng.choice(self._captions), metadata=metadata)


def checked_caption(caption: object, place: str, empty_captions: str) -> str:
    """A caption as it is, any Unicode in it; '' for null and for nothing but white space, where these are embedded.

    Raises:
        RowRejected: null_caption, where these are rejected; caption_not_text.
    """
    if is_blank(caption):
        if empty_captions == "embed":
            return ""
        raise RowRejected(Reason.null_caption, f"{place} is null" if caption is None else f"empty {place}")
    if not isinstance(caption, str):
        raise RowRejected(Reason.caption_not_text, f"{place} holds {type(caption).__name__}, expected text")
    if not is_unicode(caption):
        raise RowRejected(Reason.caption_not_text, f"{place} holds half of a surrogate pair, which is no Unicode text")
    return str.__str__(caption)  # of a user's own kind of text, the text


def is_unicode(text: str) -> bool:
    """False for a lone surrogate, as json.loads makes of a cut escape: no tokenizer or file takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
