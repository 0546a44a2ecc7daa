"""Latents decoded back to one picture that shows every sample."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion_data.prepare_energon_dataset import prepare
from diffusion_data.scripts.preview_dataset import main
from tests.small_source import picture_bytes, prepare_config, source_rows, write_source


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preview")
    source = write_source(folder / "source.parquet", source_rows(4))
    prepare(prepare_config(source, folder / "dataset"))
    return folder / "dataset"


def test_shows_pictures_and_three_frames_of_a_clip(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(dataset), str(tmp_path / "sheet.png"), "--columns", "2"])
    with Image.open(tmp_path / "sheet.png") as sheet:
        # Two rows of 48 pixels and their gap; the second holds a picture and a clip's three frames, each 64 wide.
        assert sheet.size == ((64 + 8) + 3 * (64 + 8), 2 * (48 + 8))
        shown = np.asarray(sheet)[:48, 56 : 56 + 64].astype(float)
    told = capsys.readouterr().out
    assert "samples/sample_000000003 (16, 3, 6, 8): picture very very very nice" in told
    with Image.open(io.BytesIO(picture_bytes(1))) as drawn:
        original = np.asarray(drawn).astype(float)
    assert np.corrcoef(shown.ravel(), original.ravel())[0, 1] > 0.8  # recognisably the second row's picture


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{dataset}", "x.png", "--samples", "0"], "argument --samples: invalid positive value"),
        (["{dataset}/run", "x.png"], "is not a dataset"),
        (["{dataset}", "x.png", "--tokenizer", "./nothing"], "./nothing"),
    ],
)
def test_a_mistake_is_told_in_a_line(
    dataset: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([word.format(dataset=dataset) for word in words])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
