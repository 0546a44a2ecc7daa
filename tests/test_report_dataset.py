"""The script that reports on any dataset: no code of it runs unasked, and what is odd in it is told."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffusion_data.prepare_energon_dataset import prepare
from diffusion_data.scripts.report_dataset import main
from tests.report_page import HOSTILE, Page
from tests.small_source import prepare_config, source_rows, write_source
from tests.tiny_dataset import tiny_sample, write_dataset


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    prepare(prepare_config(write_source(folder / "source.parquet", source_rows(4)), folder / "dataset"))
    return folder / "dataset"


@contextmanager
def options_of(dataset: Path) -> Iterator[dict[str, Any]]:
    """Its run/config.yaml, to be changed."""
    file = dataset / "run/config.yaml"
    options = yaml.safe_load(file.read_text())
    yield options
    file.write_text(yaml.safe_dump(options))


def test_the_script_shows_no_source_unless_it_is_told_to(prepared: Path, tmp_path: Path) -> None:
    """A dataset from elsewhere names a function to call and files to read: nobody has asked for either."""
    copy = shutil.copytree(prepared, tmp_path / "copy")
    with options_of(copy) as options:
        options["process_func"] = {"_target_": f"{__name__}.must_not_run"}
        del options["report"], options["media"]["min_side"]  # as an earlier version wrote it
    main([str(copy), "--output", str(tmp_path / "alone"), "--samples", "2"])
    assert str(Page((tmp_path / "alone/index.html").read_text()).images()[0]["alt"]).startswith("decoded: ")
    assert not CALLS
    main([str(copy), "--output", str(tmp_path / "both"), "--samples", "2", "--sources"])
    assert CALLS


def test_the_script_finds_a_process_function_where_it_is_started(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(prepared, tmp_path / "copy")
    with options_of(copy) as options:
        options["process_func"] = {"_target_": "beside_the_dataset.pet"}
    (tmp_path / "beside_the_dataset.py").write_text("from diffusion_data.process_funcs import media_caption as pet\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    main(["copy", "--samples", "2", "--sources"])
    assert (copy / "run/report/index.html").read_text().count("PSNR <b>") == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is not there."),
        ("tokenizer: {name", "can&#x27;t be used: while parsing a flow mapping in "),
        ("- tokenizer", "can&#x27;t be used: it holds no options."),
        ("process_func: {_target_: tests.test_report_dataset.must_not_run}", "can&#x27;t be used: "),
    ],
)
def test_sources_that_cannot_be_had_cost_the_page_its_source_pictures_alone(
    prepared: Path, tmp_path: Path, content: str | None, said: str
) -> None:
    copy = shutil.copytree(prepared, tmp_path / "copy")
    (copy / "run/config.yaml").unlink()
    if content is not None:
        (copy / "run/config.yaml").write_text(content)
    main([str(copy), "--tokenizer", "tiny-cosmos", "--samples", "1", "--sources"])
    page = (copy / "run/report/index.html").read_text()
    assert f"<li>Source pictures are not shown: {copy}/run/config.yaml {said}" in page
    assert [str(image["alt"]) for image in Page(page).images()] == ["decoded: picture nice"]


CALLS: list[object] = []


def must_not_run(row: dict[str, object], *, media: object) -> None:
    CALLS.append(row)


def test_the_script_on_a_dataset_made_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [tiny_sample(row, latent_shape=(16, 1, 4, 4), caption_extra=HOSTILE) for row in range(6)]
    samples.append(
        tiny_sample(6, latent_shape=(16, 3, 4, 6), framerate=12.0, start_seconds=1.5, end_seconds=2.25, mirrored=True)
    )
    dataset = write_dataset(tmp_path / "elsewhere", samples, with_stats=False)
    main([str(dataset)])
    page = (dataset / "run/report/index.html").read_text()
    assert "No pictures are shown: " in page
    assert not Page(page).images()
    assert ["32x32", "6"] in Page(page).rows
    assert ["12", "1"] in Page(page).rows
    assert "they are those of 7 samples" in page

    main([str(dataset), "--tokenizer", "tiny-cosmos"])
    page = (dataset / "run/report/index.html").read_text()
    assert [str(image["alt"]) for image in Page(page).images()[:2]] == ["decoded: caption 0", "decoded: caption 1"]
    assert "1.50 to 2.25 s of its source" in page
    assert page.count("mirrored copy") == 1
    assert "PSNR <b>" not in page


def test_a_broken_shard_and_odd_metadata_are_told_not_fatal(tmp_path: Path) -> None:
    samples = [tiny_sample(row, latent_shape=(16, 1, 4, 4)) for row in range(8)]
    samples[2].metadata.update(height="tall", framerate="fast")
    samples[3].metadata.update(framerate=float("1e300"), caption=["no", "text"], num_frames="one")
    dataset = write_dataset(tmp_path / "elsewhere", samples, with_stats=False)
    (dataset / "shard_000001.tar").write_bytes((dataset / "shard_000001.tar").read_bytes()[:1500])
    (dataset / "run").mkdir()
    (dataset / "run/stats.json").write_text('{"rejected": [], "rows": "many"}')
    main([str(dataset), "--tokenizer", "tiny-cosmos"])
    page = (dataset / "run/report/index.html").read_text()
    assert "run/stats.json can&#x27;t be used" in page
    assert "2 samples have metadata that can&#x27;t be used" in page
    assert "shard_000001.tar can&#x27;t be read" in page
    assert ["32x32", "2"] in Page(page).rows


@pytest.mark.parametrize(
    ("words", "said"),
    [(["nowhere"], "nowhere is not a folder"), (["."], "holds no .tar file"), ([".", "--samples", "0"], "--samples")],
)
def test_a_mistake_is_told_in_a_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
