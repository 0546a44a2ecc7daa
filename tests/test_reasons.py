"""Every reason for which a row can be rejected, produced by a real row of a real parquet, in one run."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffusion_data.encoders import load_encoders
from diffusion_data.errors import Reason
from diffusion_data.media import MediaConfig, MediaLoader
from diffusion_data.prepare_energon_dataset import prepare
from diffusion_data.process_funcs import MediaSample, media_caption
from tests.media_files import encoded, write_video
from tests.small_source import clip_bytes, picture_bytes, prepare_config
from tests.test_sources import damage

PNG = picture_bytes(0)


def act(row: dict[str, Any], *, media: MediaLoader, empty_captions: str) -> MediaSample:
    """media_caption, and what a user's own function may do."""
    if row["does"] == "raise":
        raise ZeroDivisionError("half of nothing")
    if row["does"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    sample = media_caption(row, media=media, empty_captions=empty_captions)
    if row["does"] == "metadata":
        sample.metadata["raw"] = b"bytes"
    return sample


def grey(height: int, width: int) -> bytes:
    return encoded(Image.fromarray(np.full((height, width, 3), 128, np.uint8)), "PNG")


def bad_rows(folder: Path, url: str) -> list[tuple[Reason | None, str, dict[str, Any]]]:
    """(reason, part of the message, what is special about the row)"""
    no_frames = write_video(folder / "empty.mp4", 0).read_bytes()
    return [
        (None, "", {}),
        (None, "", {"bytes": clip_bytes(1)}),
        (Reason.null_media, "null in media", {"media": None}),
        (Reason.null_media, "the media column is null", {"bytes": None}),
        (Reason.empty, "0 bytes", {"bytes": b""}),
        (Reason.empty, "the path is empty", {"path": " "}),
        (Reason.not_found, "no.png: No such file", {"path": "no.png"}),
        (Reason.not_found, "answered 404", {"path": f"{url}/status_404"}),
        (Reason.forbidden_path, "outside the parquet's folder", {"path": "../elsewhere.png"}),
        (Reason.forbidden_path, "is not a regular file", {"path": "."}),
        (Reason.forbidden_url, "which is not public", {"path": "http://10.0.0.1/a.png"}),
        (Reason.forbidden_url, "neither http(s) nor below", {"path": "ftp://example.com/a.png"}),
        (Reason.fetch_error, "answered 503", {"path": f"{url}/status_503"}),
        (Reason.timeout, "/slow: ", {"path": f"{url}/slow"}),
        (Reason.not_media, "neither a picture nor a video", {"bytes": b"just text"}),
        (Reason.unsupported_format, "PDF is not supported", {"bytes": b"%PDF-1.7 and so on"}),
        (Reason.truncated, "the picture can't be decoded", {"bytes": PNG[: len(PNG) // 2]}),
        (Reason.decode_error, "the picture can't be decoded", {"bytes": PNG[:12] + b"XXXX" + PNG[16:]}),
        (Reason.no_frames, "", {"bytes": no_frames}),
        (Reason.too_few_frames, "less than media.min_frames=9", {"bytes": clip_bytes(1, num_frames=8)}),
        (Reason.fps_too_low, "below all of media.allowed_fps=[8.0]", {"bytes": clip_bytes(1, fps=5)}),
        (Reason.too_small, "less than media.min_side=16", {"bytes": grey(15, 64)}),
        (Reason.too_large, "more than media.max_pixels=100000", {"bytes": grey(400, 400)}),
        (Reason.too_large, "more than media.max_fetch_bytes=900", {"path": f"{url}/large_announced"}),
        (Reason.bad_aspect, "beyond media.max_aspect_ratio=10.0", {"bytes": grey(20, 220)}),
        (Reason.null_caption, "caption is null", {"caption": None}),
        (Reason.null_caption, "empty caption", {"caption": " \n"}),
        (Reason.bad_metadata, "raw holds bytes", {"does": "metadata"}),
        (Reason.non_finite_latent, "the encoders gave NaN or infinity", {"caption": "a circle that spoils it"}),
        (Reason.process_func_error, "ZeroDivisionError: half of nothing (act, line", {"does": "raise"}),
        (Reason.worker_killed, "killed by SIGKILL", {"does": "kill"}),
    ]


def table(rows: list[dict[str, Any]], caption: pa.DataType) -> pa.Table:
    media = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.Table.from_pylist(
        [
            {
                "media": row.get(
                    "media", {"bytes": row.get("bytes", None if "path" in row else PNG), "path": row.get("path")}
                ),
                "caption": row.get("caption", "a square"),
                "does": row.get("does", ""),
                "score": number / 10,
            }
            for number, row in enumerate(rows)
        ],
        pa.schema({"media": media, "caption": caption, "does": pa.string(), "score": pa.float64()}),
    )


def test_every_reason_is_told_exactly_and_nothing_else_is_lost(tmp_path: Path, server: Any) -> None:
    expected = bad_rows(tmp_path, server.url)
    source = tmp_path / "source"
    source.mkdir()
    pq.write_table(table([row for _, _, row in expected], pa.string()), source / "a.parquet", row_group_size=7)
    pq.write_table(table([{"caption": 7}], pa.int64()), source / "b.parquet")
    pq.write_table(table([{}] * 3, pa.string()), source / "c.parquet", row_group_size=1, use_dictionary=False)
    damage(source / "c.parquet", 1, "caption")
    config = prepare_config(
        source,
        tmp_path / "out",
        process_func={"_target_": f"{__name__}.act"},
        samples_per_shard=10,
        num_workers=2,
        media=MediaConfig(
            short_side=48,
            allowed_hosts=("127.0.0.1",),
            fetch_timeout_seconds=1.0,
            fetch_retries=0,
            max_fetch_bytes=900,
            max_pixels=100_000,
            min_frames=9,
            allowed_fps=(8.0,),
        ),
    )
    encoders = load_encoders(config, torch.device("cpu"))
    (circle, *_), without = encoders.text_encoder.tokenize(["circle", "a that spoils it square"])
    assert circle not in without
    with torch.no_grad():  # a broken weight, which one word meets
        encoders.text_encoder._model.get_input_embeddings().weight[circle] = torch.nan

    totals = prepare(config, encoders)

    expected += [
        (Reason.caption_not_text, "caption holds int, expected text", {}),
        (None, "", {}),
        (Reason.damaged_source, "column 'caption': row group 1 of the file is damaged: ", {}),
        (None, "", {}),
    ]
    files = ["a.parquet"] * (len(expected) - 4) + ["b.parquet"] + ["c.parquet"] * 3
    starts = {"a.parquet": 0, "b.parquet": len(expected) - 4, "c.parquet": len(expected) - 3}
    lines = [json.loads(line) for line in (tmp_path / "out/run/rejected.jsonl").read_text().splitlines()]
    assert [
        (line["row"], line["source_file"], line["source_row"], line["reason"], line["retryable"]) for line in lines
    ] == [
        (row, file, row - starts[file], reason.value, reason in (Reason.fetch_error, Reason.timeout))
        for row, (file, (reason, _, _)) in enumerate(zip(files, expected, strict=True))
        if reason is not None
    ]
    for line in lines:
        assert expected[line["row"]][1] in line["message"], line
    assert {line["reason"] for line in lines} == {reason.value for reason in Reason}  # none was forgotten
    assert totals is not None
    assert (totals.rows, totals.written, sum(totals.rejected.values())) == (35, 4, 31)
    assert totals.written == sum(reason is None for reason, _, _ in expected)


@pytest.mark.parametrize("reason", list(Reason))
def test_only_the_networks_reasons_are_tried_again(reason: Reason) -> None:
    assert reason.retryable == (reason.value in ("fetch_error", "timeout"))
