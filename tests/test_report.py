"""The report of a dataset: numbers that are right, pictures beside their source, and captions that stay text."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.decoded_sample import decode_sample, psnr_db
from diffusion_data.media import MediaLoader
from diffusion_data.prepare_config import PrepareConfig
from diffusion_data.prepare_energon_dataset import prepare
from diffusion_data.process_funcs import MediaSample, media_caption
from diffusion_data.report_facts import Facts, gather_facts
from diffusion_data.report_html import report_page
from diffusion_data.report_plots import Bars, write_png
from diffusion_data.shard_reader import read_shard
from diffusion_data.spread_samples import find_shards
from tests.report_page import HOSTILE, Page
from tests.small_source import picture_bytes, prepare_config, source_rows, write_source
from tests.tiny_dataset import tiny_sample


def opened(image: dict[str, str | None]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(str(image["src"]).partition(",")[2])))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 rows, clips at 3 and 10, one row rejected, a caption that would like to be code; prepared with its report."""
    folder = tmp_path_factory.mktemp("report")
    rows = source_rows(12)
    rows[1]["caption"] = HOSTILE
    rows[5]["media"]["bytes"] = picture_bytes(5)[:200]
    source = write_source(folder / "source.parquet", rows)
    prepare(prepare_config(source, folder / "dataset", report=True))
    return folder / "dataset"


@pytest.fixture(scope="module")
def page(prepared: Path) -> str:
    return (prepared / "run/report/index.html").read_text()


def test_the_job_writes_a_page_and_plots(prepared: Path, page: str) -> None:
    plots = {path.stem for path in (prepared / "run/report").glob("*.png")}
    assert plots >= {"resolutions", "aspect_ratios", "frames", "fps", "caption_lengths", "rejects", "latents"}
    for path in (prepared / "run/report").glob("*.png"):
        with Image.open(path) as plot:
            assert plot.width == 960
    rows = Page(page).rows
    assert ["64x48", "8"] in rows
    assert ["48x48", "3"] in rows
    assert ["4:3", "8"] in rows
    assert (["1", "9"] in rows, ["9", "2"] in rows, ["8", "2"] in rows) == (True, True, True)  # frames; fps
    assert ["truncated", "1"] in rows


def test_page_and_plots_are_of_the_facts_and_nothing_else(prepared: Path, page: str, tmp_path: Path) -> None:
    plots = gather_facts(prepared, find_shards(prepared)).plots
    assert len(plots) >= 8
    drawn = {path.stem: path.read_bytes() for path in (prepared / "run/report").glob("*.png")}
    for plot in plots:
        write_png(plot, tmp_path / f"{plot.name}.png")
    assert drawn == {plot.name: (tmp_path / f"{plot.name}.png").read_bytes() for plot in plots}
    tables = Page(page).tables
    assert list(tables) == [plot.title for plot in plots]
    for plot in plots:
        if isinstance(plot, Bars):
            told = {name: (float(value.replace(",", "")), share) for name, (share, value) in tables[plot.title].items()}
            longest = max(plot.values.values())
            assert told == {
                name: (value, pytest.approx(100 * value / longest, abs=0.01)) for name, value in plot.values.items()
            }


def test_latent_means_are_those_of_the_statistics(prepared: Path, page: str) -> None:
    stats = json.loads((prepared / "run/stats.json").read_text())
    means, deviations = stats["latent_mean"], stats["latent_std"]
    lowest = min(mean - deviation for mean, deviation in zip(means, deviations, strict=True))
    highest = max(mean + deviation for mean, deviation in zip(means, deviations, strict=True))
    table = Page(page).tables["Latent mean and deviation by channel"]
    for channel in range(16):
        told = f"{means[channel]:+.2f} ± {deviations[channel]:.2f}".replace("-", "−")
        drawn = 200 * deviations[channel] / (highest - lowest)
        assert table[str(channel)] == (pytest.approx(drawn, abs=0.01), told)


def test_what_only_waited_is_drawn_paler(tmp_path: Path) -> None:
    values = {"decode": 3.0, "waiting for decoding": 2.0, "write": 0.0}
    bars = Bars(name="times", title="Times", unit="s", values=values, muted=frozenset({"waiting for decoding"}))
    page = report_page("dataset", Facts(numbers={}, plots=[bars], notes=[]), [])
    assert [attributes["class"] for tag, attributes in Page(page).tags if tag == "i"] == ["", "muted", "none"]


def test_a_hostile_caption_stays_text(page: str) -> None:
    parsed = Page(page)
    assert not [tag for tag, _ in parsed.tags if tag in ("script", "iframe", "object", "form", "link", "base")]
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    assert html.escape(HOSTILE, quote=True) in page
    assert "alert(1)</script>" not in page


def test_the_page_loads_nothing(page: str) -> None:
    addresses = [
        value
        for _, attributes in Page(page).tags
        for name, value in attributes.items()
        if name in ("src", "srcset", "href") and value
    ]
    assert addresses
    assert all(value.startswith(("data:image/webp;base64,", "#")) for value in addresses)
    assert "url(" not in page
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page


def test_source_and_decoded_pictures_stand_side_by_side_with_their_psnr(prepared: Path, page: str) -> None:
    first = next(read_shard(prepared / "shard_000000.tar"))
    decoded = decode_sample(first, CosmosTokenizer.from_pretrained("tiny-cosmos"))
    with Image.open(io.BytesIO(picture_bytes(0, width=48))) as drawn:
        source = np.asarray(drawn.convert("RGB"))[None]
    images = Page(page).images()
    assert [image["alt"] for image in images[:2]] == ["source: picture nice", "decoded: picture nice"]
    for image, shown, other in ((images[0], source, decoded), (images[1], decoded, source)):
        with opened(image) as stored:
            pixels = np.asarray(stored.convert("RGB"))[None]
        assert psnr_db(pixels, shown) > max(24, psnr_db(pixels, other))  # WebP loses a little
    assert f"PSNR <b>{psnr_db(source, decoded):.1f} dB</b>" in page


def test_a_clip_plays_and_shows_its_first_and_last_frame(page: str) -> None:
    images = Page(page).images()
    caption = "picture very very very nice"
    place = [image["alt"] for image in images].index(f"source: {caption}")
    with opened(images[place]) as clip:
        assert getattr(clip, "n_frames", 1) == 9
        clip.seek(8)
        clip.load()
        assert clip.info["duration"] == 125
    assert [image["alt"] for image in images[place + 2 : place + 6]] == [
        f"source frame 1: {caption}",
        f"decoded frame 1: {caption}",
        f"source frame 9: {caption}",
        f"decoded frame 9: {caption}",
    ]
    assert "9 frames · 8 fps" in page
    assert "(prefers-reduced-motion: reduce)" in page


def test_the_beginning_of_a_latent_decodes_to_the_beginning_of_its_clip() -> None:
    tokenizer = CosmosTokenizer.from_pretrained("tiny-cosmos")
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 9, 32, 32, 3), np.uint8))
    latent = tokenizer.encode(frames)[0]
    sample = tiny_sample(0, latent_shape=tuple(latent.shape))
    object.__setattr__(sample, "latent", latent)
    whole = decode_sample(sample, tokenizer).astype(int)
    for asked, given in ((1, 1), (4, 1), (5, 5), (8, 5), (9, 9), (100, 9)):
        beginning = decode_sample(sample, tokenizer, asked)
        assert len(beginning) == given
        assert np.abs(beginning - whole[:given]).max() <= 1


def test_psnr_of_known_pictures() -> None:
    black = np.zeros((1, 4, 4, 3), np.uint8)
    assert math.isinf(psnr_db(black, black))
    assert psnr_db(black, black + 1) == pytest.approx(48.1308, abs=1e-3)
    assert psnr_db(black, black + 255) == 0


def config_of(function: Callable[..., MediaSample], prepared: Path, dataset: Path) -> PrepareConfig:
    """The job that made `prepared`, by a process function of these tests, into another folder."""
    process_func = {"_target_": f"{__name__}.{function.__name__}", "dataset": str(dataset)}
    return prepare_config(prepared.parent / "source.parquet", dataset, report=True, process_func=process_func)


def blocks_the_report(row: dict[str, Any], *, media: MediaLoader, dataset: str) -> MediaSample:
    """Puts a file where the report's folder should be, when the report has begun."""
    if (Path(dataset) / "run/stats.json").exists():
        (Path(dataset) / "run/report").touch()
    return media_caption(row, media=media)


def test_the_job_is_not_failed_by_its_report(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = tmp_path / "dataset"
    totals = prepare(config_of(blocks_the_report, prepared, dataset))
    assert totals is not None
    assert totals.written == 11
    assert (dataset / ".nv-meta/dataset.yaml").exists()
    assert "  no report, but the dataset is complete (UserError: can't write the report" in capsys.readouterr().out


def test_a_run_that_changes_nothing_leaves_the_report_alone(prepared: Path) -> None:
    page = prepared / "run/report/index.html"
    before = page.stat().st_mtime_ns
    prepare(prepare_config(prepared.parent / "source.parquet", prepared, report=True))
    assert page.stat().st_mtime_ns == before


def interrupts_the_report(row: dict[str, Any], *, media: MediaLoader, dataset: str) -> MediaSample:
    """Ctrl-C, once: when the report decodes its first source row, all being finished."""
    once = Path(dataset).parent / "interrupted"
    if (Path(dataset) / "run/stats.json").exists() and not once.exists():
        once.touch()
        (Path(dataset) / "run/report").mkdir()
        (Path(dataset) / "run/report/.index.html.01234567.partial").touch()  # as kill -9 would have left it
        raise KeyboardInterrupt
    return media_caption(row, media=media)


def test_a_report_that_was_interrupted_is_written_by_the_same_command_and_nothing_else_is(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = tmp_path / "dataset"
    config = config_of(interrupts_the_report, prepared, dataset)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    made = {path: path.stat().st_mtime_ns for path in [*dataset.glob("shard_*"), *dataset.glob("run/ledger/*")]}
    assert len(made) == 9
    assert not (dataset / "run/report/index.html").exists()
    capsys.readouterr()
    prepare(config)
    assert "  0 rows in " in (said := capsys.readouterr().out)
    assert f"  report: {dataset}/run/report/index.html" in said
    assert {path: path.stat().st_mtime_ns for path in made} == made
    page = (dataset / "run/report/index.html").read_text()
    assert page.count("<figure>") == 11
    assert page.count("PSNR <b>") == 11
    assert {path.suffix for path in (dataset / "run/report").iterdir()} == {".html", ".png"}


def test_a_link_planted_where_the_report_goes_is_not_followed(prepared: Path, tmp_path: Path) -> None:
    dataset, elsewhere = shutil.copytree(prepared, tmp_path / "dataset"), tmp_path / "elsewhere"
    shutil.rmtree(dataset / "run/report")
    elsewhere.mkdir()
    (dataset / "run/report").symlink_to(elsewhere)
    prepare(prepare_config(prepared.parent / "source.parquet", dataset, report=True))
    assert not list(elsewhere.iterdir())
    assert (dataset / "run/report/index.html").exists()


def test_no_report_of_what_was_there_before_outlives_a_change(prepared: Path, tmp_path: Path) -> None:
    dataset = shutil.copytree(prepared, tmp_path / "dataset")
    (dataset / "shard_000001.tar").unlink()
    prepare(prepare_config(prepared.parent / "source.parquet", dataset, report=False))
    assert (dataset / ".nv-meta/dataset.yaml").exists()
    assert not (dataset / "run/report").exists()
