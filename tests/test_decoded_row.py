"""A row becomes frames, caption and metadata that can be stored, or is rejected with its reason."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pytest

from diffusion_data.decoded_row import DecodedRow, RejectedRow
from diffusion_data.errors import Reason
from tests.worker_rows import decode_one


def test_a_row_becomes_frames_caption_and_metadata() -> None:
    done = decode_one({"value": 7, "score": 0.5}, metadata_columns=("score",), arguments={"suffix": "!"})
    assert isinstance(done, DecodedRow)
    assert done.samples[0].pixels.shape == (1, 32, 48, 3)
    assert (done.samples[0].pixels == 7).all()
    assert (done.row, done.source_file, done.source_row) == (100, "a.parquet", 0)
    (sample,) = done.samples
    assert (sample.caption, sample.metadata, sample.framerate) == ("value 7!", {"score": 0.5}, None)


def test_frames_of_any_size_and_number_are_made_to_fit_the_tokenizer() -> None:
    done = decode_one({"size": (37, 50), "frames": 12, "fps": 8.0})
    assert isinstance(done, DecodedRow)
    assert done.samples[0].pixels.shape == (9, 32, 48, 3)
    assert (done.samples[0].image_height, done.samples[0].image_width, done.samples[0].framerate) == (37, 50, 8.0)


@pytest.mark.parametrize(
    ("value", "reason", "message"),
    [
        ({"does": "reject"}, Reason.fetch_error, "no network"),
        ({"does": "raise"}, Reason.process_func_error, "KeyError: 'missing' (process, line"),
        ({"does": "return nothing"}, Reason.process_func_error, "returned NoneType, expected MediaSample"),
        ({"caption": None}, Reason.null_caption, "caption is null"),
        ({"caption": 7}, Reason.caption_not_text, "caption holds int"),
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
    assert done.samples[0].metadata == {"when": "2024-05-17", "nan": None, "tags": [{"a": 0.5}], "none": None}
