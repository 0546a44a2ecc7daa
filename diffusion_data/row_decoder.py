"""Row -> DecodedRow (of each sample uint8 frames that the tokenizer takes, caption, metadata) or RejectedRow.

A pure function of the row and the config, run in worker processes: nothing here touches a model.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import random
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, cast

import numpy as np

from diffusion_data.clips import ClipLengths, LeftOut
from diffusion_data.decoded_row import DecodedRow, DecodedSample, RejectedRow
from diffusion_data.errors import Reason, RowRejected, UserError
from diffusion_data.latent_sample import RESERVED_FIELDS
from diffusion_data.media import MediaLoader
from diffusion_data.media_config import MediaConfig
from diffusion_data.parquet_reader import BadCell
from diffusion_data.process_funcs import MediaSample, checked_caption, is_unicode
from diffusion_data.resize import plan_resize
from diffusion_data.sources import Row


@dataclass(frozen=True, kw_only=True)
class RowDecoder:
    """The CPU half of the job, small enough to be sent to worker processes.

    process_func: importable name; arguments: its other options
    temporal_compression: frames are trimmed to 1 + temporal_compression * t
    size_multiple: heights and widths are multiples of it
    empty_captions: reject, or embed: as the empty text
    seed: with a row's index, of the random numbers that its process function is handed
    """

    process_func: str
    arguments: dict[str, Any]
    metadata_columns: tuple[str, ...]
    media: MediaConfig
    temporal_compression: int
    size_multiple: int
    empty_captions: str = "reject"
    seed: int = 0

    def __post_init__(self) -> None:
        ClipLengths.of(self.media, self.temporal_compression)  # refuses limits that leave no length
        if self.media.short_side is not None:
            sides = [self.media.short_side, *self.media.extra_short_sides]
            rounded = [plan_resize(side, side, side, self.size_multiple).height for side in sides]
            if len(set(rounded)) < len(rounded):
                raise UserError(
                    f"media.extra_short_sides: of {sides} pixels some are the same in multiples of {self.size_multiple}"
                )

    def __call__(self, row: Row) -> DecodedRow | RejectedRow:
        started, cpu_started = time.perf_counter(), time.thread_time()
        metadata: dict[str, Any] = {}
        try:
            values = _Values(row.values)
            metadata = _json_object({column: values.get(column) for column in self.metadata_columns})
            media = _media_loader(self.media, row.folder, self.temporal_compression, self.size_multiple)
            media.left_out = LeftOut()
            samples = tuple(self._samples(row, values, metadata, media))
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
            samples=samples,
            left_out=media.left_out,
            seconds=time.perf_counter() - started,
            cpu_seconds=time.thread_time() - cpu_started,
        )

    def _samples(
        self, row: Row, values: _Values, metadata: dict[str, Any], media: MediaLoader
    ) -> Iterator[DecodedSample]:
        function = resolve_process_func(self.process_func)
        rng = random.Random(f"{self.seed} {row.index}")
        ours = {"media": media, "empty_captions": self.empty_captions, "rng": rng}
        arguments = {**self.arguments, **{name: ours[name] for name in handed_over(function)}}
        try:
            for sample in self._checked(function(values, **arguments)):
                caption = checked_caption(sample.caption, "caption", self.empty_captions)
                own_metadata = metadata | _checked_metadata(sample.metadata)
                for frames, mirrored in media.variants(sample.frames):
                    yield DecodedSample(
                        pixels=np.ascontiguousarray(frames.pixels),
                        framerate=_plain(frames.fps),
                        image_height=int(frames.source_height),
                        image_width=int(frames.source_width),
                        caption=caption,
                        metadata=own_metadata,
                        start_seconds=_plain(frames.start_seconds),
                        end_seconds=_plain(frames.end_seconds),
                        mirrored=mirrored,
                    )
        except (RowRejected, MemoryError):  # want of memory is the process's, and may be over at the next try
            raise
        # The user's own code may raise anything, or call sys.exit: the row's fault, not the job's.
        except (Exception, SystemExit) as error:
            raise RowRejected(Reason.process_func_error, _describe(error)) from error

    def _checked(self, returned: object) -> Sequence[MediaSample]:
        """The samples that the process function made of the row."""
        returns = returned if isinstance(returned, list) else [returned]
        samples = [each for each in returns if isinstance(each, MediaSample)]
        if not samples or len(samples) < len(returns):
            others = [type(each).__name__ for each in returns if not isinstance(each, MediaSample)]
            told = others[0] if others else "an empty list"
            raise TypeError(f"{self.process_func} returned {told}, expected MediaSample, or a list of them")
        return samples


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
def resolve_process_func(name: str) -> Callable[..., MediaSample | list[MediaSample]]:
    """The function of that importable name.

    Raises:
        UserError: no such module or function.
    """
    try:
        found = resolve_name(name)
    except Exception as error:  # whatever importing the user's module raised
        cause = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"process_func._target_: can't import {name}: {cause}") from error
    if not callable(found):
        raise UserError(f"process_func._target_: {name} is no function")
    return cast(Callable[..., Any], found)


def handed_over(function: Callable[..., Any]) -> list[str]:
    """Parameters that a process function gets from the run instead of from its own options."""
    return [name for name in ("media", "empty_captions", "rng") if name in inspect.signature(function).parameters]


@functools.lru_cache(maxsize=64)
def _media_loader(config: MediaConfig, folder: str, temporal_compression: int, size_multiple: int) -> MediaLoader:
    """One loader a folder of parquet files: relative paths start there."""
    return MediaLoader(config, folder, temporal_compression, size_multiple)


def _plain(number: float | None) -> float | None:
    """A user's may be numpy's, which json can't."""
    return None if number is None else float(number)


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
