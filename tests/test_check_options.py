"""Mistakes that are told before any rank starts: each by its option, with nothing written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffusion_data.check_options import check_options
from diffusion_data.errors import UserError
from diffusion_data.media_config import MediaConfig
from diffusion_data.prepare_config import TextEncoderConfig, TokenizerConfig
from diffusion_data.sources import SourceConfig
from tests.small_source import prepare_config, source_rows, write_source

MEDIA_CAPTION = "diffusion_data.process_funcs.media_caption"
MISTAKES: dict[str, dict[str, Any]] = {
    "source.path: there is nothing at nowhere": {"source": SourceConfig(path="nowhere")},
    "process_func.media_column: there is no column 'jpg'": {
        "process_func": {"_target_": MEDIA_CAPTION, "media_column": "jpg"}
    },
    "process_func: .* can't be called: .*'colum'": {"process_func": {"_target_": MEDIA_CAPTION, "colum": "jpg"}},
    "metadata_columns: there is no column 'place'": {"metadata_columns": ("place",)},
    "output_dir: .* is not empty and holds no run of this tool": {"output_dir": "elsewhere"},
    "media.min_frames": {"media": MediaConfig(num_frames=3, min_frames=2)},
    "no such model: weights is neither": {"tokenizer": TokenizerConfig(name="weights")},
    "no text encoder 'weights'": {"text_encoder": TextEncoderConfig(name="weights")},
    "device: expected auto, cpu or cuda, got 'tpu'": {"device": "tpu"},
}


@pytest.mark.parametrize("told", MISTAKES)
def test_a_mistake_is_told_before_anything_is_written(
    told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_source(tmp_path / "rows.parquet", source_rows(2))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/thesis.txt").write_text("precious")
    right = prepare_config(Path("rows.parquet"), Path("dataset"))
    check_options(right)
    with pytest.raises(UserError, match=told):
        check_options(replace(right, **MISTAKES[told]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "rows.parquet"]


@pytest.mark.parametrize("kind", [TokenizerConfig, TextEncoderConfig])
def test_a_dtype_that_there_is_not_is_refused_with_the_other_options(
    kind: type[TokenizerConfig] | type[TextEncoderConfig],
) -> None:
    with pytest.raises(UserError, match=r"(tokenizer|text_encoder)\.dtype: expected auto, float32, bfloat16"):
        kind(name="tiny", dtype="float8")
