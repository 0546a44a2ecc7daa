"""What a caption may hold, and what becomes of one that holds nothing."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion_data.errors import UserError
from diffusion_data.media import MediaLoader
from diffusion_data.prepare_config import TextEncoderConfig
from diffusion_data.prepare_energon_dataset import prepare
from diffusion_data.process_funcs import MediaSample
from tests.small_source import picture_bytes, prepare_config, write_source
from tests.test_prepare import read_samples

CAPTIONS = [
    "<b>bold</b> &amp; <script>alert(1)</script>",
    "tab\tnewline\ncarriage\r\n bell\x07 escape\x1b[31m nul\x00 delete\x7f",
    "é e\u0301 ＡＢＣ Ⅳ",  # composed, combining, full width: not made alike
    "שלום مرحبا 你好 こんにちは 👩‍👩‍👧‍👦 🏳️‍🌈",
    "\u202eright to left\u202c zero\u200bwidth\ufeff\u2028line\u2029paragraph\ufffe\uffff",
    "\U0010ffff \U0001d4d0 ",
    '"quotes" \'and\' \\ backslash / {"json": [1]} %s {0} ${HOME}',
    "  spaces  around  ",
    "x" * 10_000,
]


def source_of(folder: Path, captions: list[Any]) -> Path:
    rows = [{"media": {"bytes": picture_bytes(0), "path": None}, "caption": each, "score": 0.0} for each in captions]
    return write_source(folder / "source.parquet", rows)


def test_any_text_is_kept_exactly(tmp_path: Path) -> None:
    text_encoder = TextEncoderConfig(name="tiny-t5", max_length=64)
    config = prepare_config(source_of(tmp_path, CAPTIONS), tmp_path / "out", text_encoder=text_encoder)
    totals = prepare(config)
    assert totals is not None
    assert [sample.metadata["caption"] for sample in read_samples(tmp_path / "out")] == CAPTIONS
    assert totals.rejected == {}
    assert totals.captions_cut >= 1
    entries = [json.loads(path.read_text()) for path in (tmp_path / "out/run/ledger").iterdir()]
    assert sum(entry["captions_cut"] for entry in entries) == totals.captions_cut
    assert json.loads((tmp_path / "out/run/stats.json").read_text())["captions_cut"] == totals.captions_cut


def test_null_and_empty_captions_are_rejected_unless_they_are_to_be_embedded(tmp_path: Path) -> None:
    captions = ["a circle", None, "", " \n\t", "a square"]
    source = source_of(tmp_path, captions)
    totals = prepare(prepare_config(source, tmp_path / "rejected"))
    assert totals is not None
    assert (totals.written, totals.rejected) == (2, {"null_caption": 3})

    totals = prepare(prepare_config(source, tmp_path / "embedded", empty_captions="embed"))
    assert totals is not None
    assert (totals.written, totals.rejected) == (5, {})
    samples = read_samples(tmp_path / "embedded")
    assert [sample.metadata["caption"] for sample in samples] == ["a circle", "", "", "", "a square"]
    empty = pickle.loads((tmp_path / "embedded/run/empty_caption.pickle").read_bytes())
    for sample in samples[1:4]:
        np.testing.assert_array_equal(sample.text_embedding, empty)
        assert sample.metadata["num_text_tokens"] == len(empty) > 0
    assert not np.array_equal(samples[0].text_embedding, empty)


def without_caption(row: dict[str, Any], *, media: MediaLoader) -> MediaSample:
    return MediaSample(frames=media.load(row["media"]), caption=None)


def test_a_users_own_function_may_have_no_caption(tmp_path: Path) -> None:
    func = {"_target_": f"{__name__}.without_caption"}
    source = source_of(tmp_path, ["unused"])
    with pytest.raises(UserError, match=r"every row was rejected \(null_caption 1\)"):
        prepare(prepare_config(source, tmp_path / "rejected", process_func=func))
    totals = prepare(prepare_config(source, tmp_path / "embedded", process_func=func, empty_captions="embed"))
    assert totals is not None
    assert totals.written == 1


def test_the_choice_belongs_to_the_dataset_and_is_one_of_two(tmp_path: Path) -> None:
    source = source_of(tmp_path, ["a circle"])
    prepare(prepare_config(source, tmp_path / "out"))
    with pytest.raises(UserError, match=r"other settings.*empty_captions: 'reject' -> 'embed'"):
        prepare(prepare_config(source, tmp_path / "out", empty_captions="embed"))
    with pytest.raises(UserError, match="empty_captions: expected reject or embed, got 'drop'"):
        prepare_config(source, tmp_path / "out", empty_captions="drop")
