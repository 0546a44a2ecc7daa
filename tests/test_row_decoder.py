"""What a user's process function may do without harm to the job."""

from __future__ import annotations

import json
import sys
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from diffusion_data.errors import Reason, RowRejected, UserError
from diffusion_data.media import Frames, MediaConfig
from diffusion_data.parquet_reader import BadCell
from diffusion_data.process_funcs import MediaSample
from diffusion_data.row_decoder import DecodedRow, RejectedRow, RowDecoder, resolve_process_func
from diffusion_data.sources import Row


def process(row: dict[str, Any]) -> MediaSample:
    if row["does"] == "exit":
        sys.exit(0)
    if row["does"] == "talk":
        raise ValueError("x" * 100_000)
    if row["does"] == "reject":
        raise RowRejected(Reason.not_found, "half a pair \ud83d")
    side: Any = np.int64(32)
    frames = Frames(
        pixels=np.zeros((1, 32, 32, 3), np.uint8), fps=row.get("fps"), source_height=side, source_width=side
    )
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


def within_itself() -> dict[str, Any]:
    tags: list[Any] = []
    tags.append(tags)
    return {"tags": tags}


@pytest.mark.parametrize(
    "metadata",
    [{"\ud83d": 1}, {"tags": {"\ud83d": 1}}, {"number": 10**5000}, {"raw": [b"x"]}, {"mine": object()}],
    ids=["name", "key", "number", "bytes", "object"],
)
def test_metadata_that_json_can_not_hold_rejects_the_row(metadata: dict[str, Any]) -> None:
    rejected = decode(metadata=metadata)
    assert rejected.reason is Reason.bad_metadata
    json.dumps(rejected.to_json(), ensure_ascii=False).encode()


def test_metadata_within_itself_rejects_the_row() -> None:
    assert decode(metadata=within_itself()).reason in (Reason.bad_metadata, Reason.process_func_error)


def test_numbers_that_json_has_no_word_for_become_null() -> None:
    values = {"a": float("nan"), "b": Decimal("Infinity"), "c": [np.float32("nan")], "d": Decimal("1.5"), 7: 1}
    assert decode(metadata=values).samples[0].metadata == {"a": None, "b": None, "c": [None], "d": 1.5, "7": 1}


class Text(str):
    """As a user's own kind of text; pickle would look for it in vain where it is local."""


def test_numpys_numbers_and_other_kinds_of_text_are_plain_ones() -> None:
    (row,) = decode(fps=np.float32(8), caption=Text("a circle"), metadata={"note": Text("mine")}).samples
    assert type(row.metadata["note"]) is str
    assert (type(row.framerate), row.framerate) == (float, 8.0)
    assert (type(row.image_height), type(row.image_width)) == (int, int)
    assert (type(row.caption), row.caption) == (str, "a circle")


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


def test_sizes_that_the_tokenizer_makes_the_same_are_refused() -> None:
    with pytest.raises(UserError, match=r"media\.extra_short_sides: of \[64, 60\] pixels some are the same"):
        RowDecoder(
            process_func=f"{__name__}.process",
            arguments={},
            metadata_columns=(),
            media=MediaConfig(short_side=64, extra_short_sides=(60,)),
            temporal_compression=4,
            size_multiple=16,
        )


def test_a_method_of_a_class_may_be_the_process_function():
    assert resolve_process_func("diffusion_data.decoded_row.RejectedRow.to_json") is RejectedRow.to_json
