"""Row -> DecodedRow (uint8 frames that the tokenizer takes, caption, metadata) or RejectedRow.

A pure function of the row and the config, run in worker processes: nothing here touches a model.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hydra.utils import get_method

from diffusion_data.errors import Reason, RowRejected, UserError
from diffusion_data.latent_sample import RESERVED_FIELDS
from diffusion_data.media import Frames, MediaConfig, MediaLoader, snapped
from diffusion_data.parquet_reader import BadCell
from diffusion_data.process_funcs import MediaSample, checked_caption, is_unicode
from diffusion_data.sources import Row

_LONGEST_MESSAGE = 500  # characters


@dataclass(frozen=True, kw_only=True)
class DecodedRow:
    """pixels: uint8 (T, H, W, 3), T = 1 + k*t, H and W multiples of what the tokenizer takes."""

    row: int
    source_file: str
    source_row: int
    pixels: np.ndarray
    framerate: float | None
    image_height: int
    image_width: int
    caption: str
    metadata: dict[str, Any]
    seconds: float = 0.0
    cpu_seconds: float = 0.0


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


@dataclass(frozen=True, kw_only=True)
class RowDecoder:
    """The CPU half of the job, small enough to be sent to worker processes.

    process_func: importable name; arguments: its other options
    temporal_compression: frames are trimmed to 1 + temporal_compression * t
    size_multiple: heights and widths are multiples of it
    empty_captions: reject, or embed: as the empty text
    """

    process_func: str
    arguments: dict[str, Any]
    metadata_columns: tuple[str, ...]
    media: MediaConfig
    temporal_compression: int
    size_multiple: int
    empty_captions: str = "reject"

    def __post_init__(self) -> None:
        media = self.media
        if media.num_frames and snapped(media.num_frames, self.temporal_compression) < media.min_frames:
            kept = snapped(media.num_frames, self.temporal_compression)
            raise UserError(
                f"media.min_frames={media.min_frames}: media.num_frames={media.num_frames} leaves only {kept} frames, "
                f"1 + k * {self.temporal_compression}"
            )

    def __call__(self, row: Row) -> DecodedRow | RejectedRow:
        started, cpu_started = time.perf_counter(), time.thread_time()
        metadata: dict[str, Any] = {}
        try:
            values = _Values(row.values)
            metadata = _json_object({column: values.get(column) for column in self.metadata_columns})
            sample, caption, frames = self._process(row, values)
        except RowRejected as rejected:
            return RejectedRow(
                row=row.index,
                source_file=row.source_file,
                source_row=row.source_row,
                reason=rejected.reason,
                message=rejected.message,
                metadata=metadata,
                seconds=time.perf_counter() - started,
                cpu_seconds=time.thread_time() - cpu_started,
            )
        return DecodedRow(
            row=row.index,
            source_file=row.source_file,
            source_row=row.source_row,
            pixels=np.ascontiguousarray(frames.pixels),
            framerate=None if frames.fps is None else float(frames.fps),  # a user's may be numpy's, which json can't
            image_height=int(frames.source_height),
            image_width=int(frames.source_width),
            caption=caption,
            metadata=metadata | _checked_metadata(sample.metadata),
            seconds=time.perf_counter() - started,
            cpu_seconds=time.thread_time() - cpu_started,
        )

    def _process(self, row: Row, values: _Values) -> tuple[MediaSample, str, Frames]:
        function = resolve_process_func(self.process_func)
        media = _media_loader(self.media, row.folder, self.temporal_compression, self.size_multiple)
        ours = {"media": media, "empty_captions": self.empty_captions}
        arguments = {**self.arguments, **{name: ours[name] for name in handed_over(function)}}
        try:
            sample = function(values, **arguments)
            if not isinstance(sample, MediaSample):
                raise TypeError(f"{self.process_func} returned {type(sample).__name__}, expected MediaSample")
            caption = checked_caption(sample.caption, "caption", self.empty_captions)
            _checked_metadata(sample.metadata)
            return sample, caption, media.conform(sample.frames)
        except RowRejected:
            raise
        # The user's own code may raise anything, or call sys.exit: the row's fault, not the job's.
        except (Exception, SystemExit) as error:
            raise RowRejected(Reason.process_func_error, _describe(error)) from error


class _Values(dict[str, Any]):
    """A row's values; taking one that could not be read rejects the row, others' rows don't notice."""

    def __getitem__(self, column: str) -> Any:
        return self._checked(column, super().__getitem__(column))

    def get(self, column: str, default: Any = None) -> Any:
        return self._checked(column, super().get(column, default))

    @staticmethod
    def _checked(column: str, value: Any) -> Any:
        if isinstance(value, BadCell):
            raise RowRejected(value.reason, f"column {column!r}: {value.message}")
        return value


@functools.lru_cache(maxsize=8)
def resolve_process_func(name: str) -> Callable[..., MediaSample]:
    """The function of that importable name.

    Raises:
        UserError: no such module or function.
    """
    try:
        return get_method(name)
    except Exception as error:  # hydra wraps whatever importing the user's module raised
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(f"process_func._target_: can't import {name}: {cause}") from error


def handed_over(function: Callable[..., Any]) -> list[str]:
    """Parameters that a process function gets from the run instead of from its own options."""
    return [name for name in ("media", "empty_captions") if name in inspect.signature(function).parameters]


@functools.lru_cache(maxsize=64)
def _media_loader(config: MediaConfig, folder: str, temporal_compression: int, size_multiple: int) -> MediaLoader:
    """One loader a folder of parquet files: relative paths start there."""
    return MediaLoader(config, folder, temporal_compression, size_multiple)


def _checked_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    taken = RESERVED_FIELDS.intersection(metadata)
    if taken:
        raise RowRejected(Reason.bad_metadata, f"metadata fields {sorted(taken)} are the format's own")
    return _json_object(metadata)


def _json_object(values: dict[str, Any]) -> dict[str, Any]:
    """`values` as they come back from json: plain, whatever kinds of number and text they were.

    Raises:
        RowRejected: it can't: bytes, half a surrogate pair, a number of thousands of digits, a list within itself.
    """
    converted = {str(name): _json_value(value, name) for name, value in values.items()}
    try:
        return json.loads(json.dumps(converted, ensure_ascii=False, allow_nan=False).encode())
    except (ValueError, TypeError, RecursionError) as error:
        raise RowRejected(Reason.bad_metadata, f"json can't hold it: {error}") from error


def _json_value(value: Any, name: str) -> Any:
    """`value` as json holds it. NaN, which json has no word for, becomes null."""
    if hasattr(value, "isoformat"):  # dates and times
        return value.isoformat()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str) and not is_unicode(value):
        raise RowRejected(Reason.bad_metadata, f"{name} has half of a surrogate pair, which is no Unicode text")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {str(key): _json_value(each, name) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(each, name) for each in value]
    if type(value).__name__ == "Decimal":
        return _json_value(float(value), name)
    raise RowRejected(Reason.bad_metadata, f"{name} holds {type(value).__name__}, which json can't")


def _describe(error: BaseException) -> str:
    """Type, message and the place in the user's code, on one line."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message} ({place.name}, line {place.lineno} of {place.filename})"
