"""Rows in, decoded or rejected rows out: in order, with every failure accounted for."""

from __future__ import annotations

import datetime
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion_data.decode_workers import DecodeWorkers
from diffusion_data.errors import Reason, RowRejected
from diffusion_data.media import Frames, MediaConfig
from diffusion_data.process_funcs import MediaSample
from diffusion_data.row_decoder import DecodedRow, RejectedRow, RowDecoder
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


def test_a_row_becomes_frames_caption_and_metadata() -> None:
    done = decode_one({"value": 7, "score": 0.5}, metadata_columns=("score",), arguments={"suffix": "!"})
    assert isinstance(done, DecodedRow)
    assert done.pixels.shape == (1, 32, 48, 3)
    assert (done.pixels == 7).all()
    assert (done.row, done.source_file, done.source_row) == (100, "a.parquet", 0)
    assert (done.caption, done.metadata, done.framerate) == ("value 7!", {"score": 0.5}, None)


def test_frames_of_any_size_and_number_are_made_to_fit_the_tokenizer() -> None:
    done = decode_one({"size": (37, 50), "frames": 12, "fps": 8.0})
    assert isinstance(done, DecodedRow)
    assert done.pixels.shape == (9, 32, 48, 3)
    assert (done.image_height, done.image_width, done.framerate) == (37, 50, 8.0)


@pytest.mark.parametrize(
    ("value", "reason", "message"),
    [
        ({"does": "reject"}, Reason.fetch_error, "no network"),
        ({"does": "raise"}, Reason.process_func_error, "KeyError: 'missing' (process, line"),
        ({"does": "return nothing"}, Reason.process_func_error, "returned NoneType, expected MediaSample"),
        ({"caption": None}, Reason.caption_not_text, "caption is NoneType"),
        ({"caption": " \n"}, Reason.null_caption, "empty caption"),
        ({"metadata": {"caption": "x"}}, Reason.bad_metadata, "['caption'] are the format's own"),
        ({"metadata": {"raw": b"x"}}, Reason.bad_metadata, "raw holds bytes"),
    ],
)
def test_a_bad_row_is_rejected_with_its_reason(value: dict[str, Any], reason: Reason, message: str) -> None:
    rejected = decode_one(value)
    assert isinstance(rejected, RejectedRow)
    assert rejected.reason is reason
    assert message in rejected.message


def test_a_rejected_row_keeps_its_metadata_columns_for_the_report() -> None:
    rejected = decode_one({"does": "reject", "score": 4}, metadata_columns=("score",))
    assert isinstance(rejected, RejectedRow)
    assert rejected.to_json() == {
        "row": 100,
        "source_file": "a.parquet",
        "source_row": 0,
        "reason": "fetch_error",
        "retryable": True,
        "message": "no network",
        "score": 4,
    }


def test_metadata_is_what_json_can_hold() -> None:
    done = decode_one(
        {
            "when": datetime.date(2024, 5, 17),
            "nan": float("nan"),
            "tags": [{"a": np.float32(0.5)}],
            "none": None,
        },
        metadata_columns=("when", "nan", "tags", "none"),
    )
    assert isinstance(done, DecodedRow)
    assert done.metadata == {"when": "2024-05-17", "nan": None, "tags": [{"a": 0.5}], "none": None}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_results_come_in_the_order_of_the_rows(num_workers: int) -> None:
    with DecodeWorkers(decoder(), num_workers) as workers:
        results = list(workers.map(rows(*[{} for _ in range(50)])))
    assert [tag for tag, _ in results] == [f"tag {index}" for index in range(50)]
    assert [result.row for _, result in results] == list(range(100, 150))


def test_rows_are_read_only_as_far_ahead_as_the_workers_need() -> None:
    taken = 0

    def endless() -> Iterator[tuple[str, Row]]:
        nonlocal taken
        for entry in rows(*[{} for _ in range(1000)]):
            taken += 1
            yield entry

    with DecodeWorkers(decoder(), 1) as workers:
        results = workers.map(endless())
        for _ in range(10):
            next(results)
        assert 10 <= taken <= 10 + 16


def test_a_row_that_kills_its_worker_is_rejected_and_the_others_are_not_lost(tmp_path: Path) -> None:
    flag = str(tmp_path / "flag")
    with DecodeWorkers(decoder(), 1) as workers:
        results = [
            result for _, result in workers.map(rows({}, {"does": "kill"}, {}, {"does": "kill once", "flag": flag}, {}))
        ]
    assert [type(result).__name__ for result in results] == [
        "DecodedRow",
        "RejectedRow",
        "DecodedRow",
        "DecodedRow",
        "DecodedRow",
    ]
    assert isinstance(results[1], RejectedRow)
    assert results[1].reason is Reason.worker_killed
    assert "2 times" in results[1].message
