"""One parquet row -> MediaSample: the extension point. The ready-made process functions live here.

A process function is any importable function

    process_func(row, **arguments) -> MediaSample

`row` is a dict of Python values, `arguments` are the other options of `process_func` in the recipe. One
that has a parameter `media` is handed the run's MediaLoader, which fetches, decodes and resizes whatever
a row refers to; one that has a parameter `empty_captions` is handed the run's option of that name. It runs
in worker processes on the CPU and never sees a model or a device. It raises `RowRejected(reason, message)`
for a row that can't be used; any other exception rejects the row as `process_func_error`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from diffusion_data.errors import Reason, RowRejected
from diffusion_data.media import Frames, MediaLoader


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
    empty_captions: str = "reject",
    media_column: str | Sequence[str] = "media",
    caption_column: str = "caption",
) -> MediaSample:
    """A picture or a clip, told apart by content, and its caption.

    media_column: one column, or several of which the first that is not null counts.
    """
    caption = caption_of(row, caption_column, empty_captions)
    columns = [media_column] if isinstance(media_column, str) else media_column
    references = [row[column] for column in columns if row[column] is not None]
    if not references:
        raise RowRejected(Reason.null_media, f"null in {', '.join(columns)}")
    return MediaSample(frames=media.load(references[0]), caption=caption)


def image_caption(
    row: dict[str, Any],
    *,
    media: MediaLoader,
    empty_captions: str = "reject",
    media_column: str = "image",
    caption_column: str = "caption",
) -> MediaSample:
    """A picture and its caption; a clip is rejected."""
    sample = media_caption(
        row,
        media=media,
        empty_captions=empty_captions,
        media_column=media_column,
        caption_column=caption_column,
    )
    if sample.frames.fps is not None:
        raise RowRejected(Reason.unsupported_format, f"{media_column} holds a clip, expected a picture")
    return sample


def video_caption(
    row: dict[str, Any],
    *,
    media: MediaLoader,
    empty_captions: str = "reject",
    media_column: str = "video",
    caption_column: str = "caption",
) -> MediaSample:
    """A clip and its caption; a picture is rejected."""
    sample = media_caption(
        row,
        media=media,
        empty_captions=empty_captions,
        media_column=media_column,
        caption_column=caption_column,
    )
    if sample.frames.fps is None:
        raise RowRejected(Reason.unsupported_format, f"{media_column} holds a picture, expected a clip")
    return sample


def butterflies(row: dict[str, Any], *, media: MediaLoader, empty_captions: str = "reject") -> MediaSample:
    """Smithsonian butterflies (huggan/smithsonian_butterflies_subset): a picture by URL and its species."""
    return image_caption(
        row, media=media, empty_captions=empty_captions, media_column="image_url", caption_column="name"
    )


def caption_of(row: dict[str, Any], column: str, empty_captions: str = "reject") -> str:
    """The caption in `column`, checked before any media is fetched for it."""
    return checked_caption(row[column], column, empty_captions)


def checked_caption(caption: object, place: str, empty_captions: str) -> str:
    """A caption as it is, any Unicode in it; '' for null and for nothing but white space, where these are embedded.

    Raises:
        RowRejected: null_caption, where these are rejected; caption_not_text.
    """
    if caption is None or (isinstance(caption, str) and not caption.strip()):
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
