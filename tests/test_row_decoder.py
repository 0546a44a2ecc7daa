"""What a user's process function may do without harm to the job."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from diffusion_data.errors import Reason, RowRejected, UserError
from diffusion_data.media import Frames, MediaConfig
from diffusion_data.parquet_reader import BadCell
from diffusion_data.process_funcs import MediaSample
from diffusion_data.row_decoder import DecodedRow, RejectedRow, RowDecoder
from diffusion_data.sources import Row


def process(row: dict[str, Any]) -> MediaSample:
    if row["does"] == "exit":
        sys.exit(0)
    if row["does"] == "talk":
        raise ValueError("x" * 100_000)
    if row["does"] == "reject":
        raise RowRejected(Reason.not_found, "half a pair \ud83d")
    frames = Frames(pixels=np.zeros((1, 32, 32, 3), np.uint8), fps=None, source_height=32, source_width=32)
    return MediaSample(frames=frames, caption=row.get("caption", "x"), metadata=row.get("metadata", {}))


def decode(columns: tuple[str, ...] = (), **values: Any) -> Any:
    decoder = RowDecoder(
        process_func=f"{__name__}.process",
        arguments={},
        metadata_columns=columns,
        media=MediaConfig(short_side=None),
        temporal_compression=4,
        size_multiple=16,
    )
    return decoder(Row(index=3, source_file="a", source_row=3, folder="/", values={"does": "", **values}))


def test_sys_exit_rejects_the_row_and_ends_nothing() -> None:
    rejected = decode(does="exit")
    assert (rejected.reason, "SystemExit: 0" in rejected.message) == (Reason.process_func_error, True)


@pytest.mark.parametrize(
    ("values", "reason"),
    [({"caption": "a \ud83d"}, Reason.caption_not_text), ({"metadata": {"tags": ["\ud83d"]}}, Reason.bad_metadata)],
)
def test_text_that_is_no_unicode_rejects_the_row(values: dict[str, Any], reason: Reason) -> None:
    rejected = decode(**values)
    assert isinstance(rejected, RejectedRow)
    assert rejected.reason is reason


def test_what_goes_into_the_ledger_is_short_and_can_be_written() -> None:
    assert len(decode(does="talk").to_json()["message"]) == 500
    assert decode(does="reject").to_json()["message"].encode() == rb"half a pair \ud83d"


def test_kept_columns_never_hide_why_and_which_row_was_rejected() -> None:
    line = decode(("row", "reason", "score"), does="reject", row=7, reason="mine", score=1).to_json()
    assert (line["row"], line["reason"], line["score"]) == (3, "not_found", 1)


def test_a_cell_that_could_not_be_read_rejects_its_row_only_where_it_is_used() -> None:
    bad = BadCell("'utf-8' codec can't decode byte 0xff")
    assert isinstance(decode(unused=bad), DecodedRow)
    for rejected in (decode(("kept",), kept=bad), decode(caption=bad)):
        assert rejected.reason is Reason.decode_error
        assert "'utf-8' codec can't decode byte 0xff" in rejected.message


def test_a_number_of_frames_that_the_tokenizer_cuts_below_the_least_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"media\.min_frames=16: media\.num_frames=16 leaves only 13 frames, 1 \+ k \* 4"
    ):
        RowDecoder(
            process_func=f"{__name__}.process",
            arguments={},
            metadata_columns=(),
            media=MediaConfig(num_frames=16, min_frames=16),
            temporal_compression=4,
            size_multiple=16,
        )
