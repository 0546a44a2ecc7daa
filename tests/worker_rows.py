"""Rows that tell the decoder what to do with them, for the tests of decode workers."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_data.decoded_row import DecodedRow, DecodedSample, RejectedRow
from diffusion_data.errors import Reason, RowRejected, UserError
from diffusion_data.media import Frames, MediaConfig
from diffusion_data.process_funcs import MediaSample
from diffusion_data.row_decoder import RowDecoder
from diffusion_data.sources import Row


def process(row: dict[str, Any], *, suffix: str = "") -> MediaSample:
    """The tests' own process function; what the row's `does` says happens."""
    match row["does"]:
        case "raise":
            return {}["missing"]
        case "reject":
            raise RowRejected(Reason.fetch_error, "no network")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "kill once":
            flag = Path(row["flag"])
            if not flag.exists():
                flag.write_text("")
                os.kill(os.getpid(), signal.SIGKILL)
        case "no memory":
            raise MemoryError
        case "no memory once":
            flag = Path(row["flag"])
            if not flag.exists():
                flag.write_text("")
                raise MemoryError
        case "return nothing":
            return None  # type: ignore[return-value]
    height, width = row.get("size", (32, 48))
    pixels = np.full((row.get("frames", 1), height, width, 3), row["value"], np.uint8)
    return MediaSample(
        frames=Frames(pixels=pixels, fps=row.get("fps"), source_height=height, source_width=width),
        caption=row.get("caption", f"value {row['value']}{suffix}"),
        metadata=row.get("metadata", {}),
    )


def decoder(**options: Any) -> RowDecoder:
    defaults: dict[str, Any] = {
        "process_func": f"{__name__}.process",
        "arguments": {},
        "metadata_columns": (),
        "media": MediaConfig(short_side=None),
        "temporal_compression": 4,
        "size_multiple": 16,
    }
    return RowDecoder(**{**defaults, **options})


def rows(*values: dict[str, Any]) -> list[tuple[str, Row]]:
    return [
        (
            f"tag {index}",
            Row(
                index=index + 100,
                source_file="a.parquet",
                source_row=index,
                folder="/tmp",
                values={"does": "", "value": index, **value},
            ),
        )
        for index, value in enumerate(values)
    ]


def decode_one(value: dict[str, Any], **options: Any) -> DecodedRow | RejectedRow:
    ((_, row),) = rows(value)
    return decoder(**options)(row)


def simple_decoder(row: Row) -> DecodedRow | RejectedRow:
    """What the row's `does` says, in the decoder itself; frames of `bytes` bytes and the worker's process id."""
    values = row.values
    match values["does"]:
        case "sleep once" if not Path(values["flag"]).exists():
            Path(values["flag"]).write_text(str(os.getpid()))
            time.sleep(60)
        case "user error":
            raise UserError("process_func._target_: can't import it")
        case "bug":
            raise KeyError("a bug")
        case "unpicklable error":
            raise type("Local", (Exception,), {})("made here")
        case "exit":
            sys.exit(0)
        case "sleep":
            time.sleep(60)
        case "stay behind":  # a child that holds all that it inherited
            if os.fork() == 0:
                time.sleep(3)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
        case "note":
            Path(values["flag"]).write_text(str(os.getpid()))
        case "wait":
            wait_for(Path(values["flag"]).exists, timeout_seconds=60.0)
    return DecodedRow(
        row=row.index,
        source_file=row.source_file,
        source_row=row.source_row,
        samples=(
            DecodedSample(
                pixels=np.full((1, 1, values.get("bytes", 3) // 3, 3), values["value"], np.uint8),
                framerate=None,
                image_height=1,
                image_width=1,
                caption="",
                metadata={"pid": os.getpid()},
            ),
        ),
    )


def wait_for(condition: Callable[[], Any], timeout_seconds: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def pid_of(result: DecodedRow | RejectedRow) -> int:
    assert isinstance(result, DecodedRow)
    return result.samples[0].metadata["pid"]


def pixels_of(results: Iterable[DecodedRow | RejectedRow]) -> list[np.ndarray]:
    return [result.samples[0].pixels for result in results if isinstance(result, DecodedRow)]


def kinds(results: Iterable[tuple[Any, DecodedRow | RejectedRow]]) -> list[str]:
    return [result.reason.value if isinstance(result, RejectedRow) else "decoded" for _, result in results]


class Counted:
    """Iterates over `items`, and tells how many were asked for."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.count = 0
        self._items = iter(items)

    def __iter__(self) -> Counted:
        return self

    def __next__(self) -> Any:
        item = next(self._items)
        self.count += 1
        return item


def in_thread(results: Iterator[tuple[Any, DecodedRow | RejectedRow]]) -> Future[list[int]]:
    """The row numbers of the results, all of which a thread waits for."""
    return ThreadPoolExecutor(1).submit(lambda: [result.row for _, result in results])
