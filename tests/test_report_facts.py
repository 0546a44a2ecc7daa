"""What a report tells and draws is what the job, or the samples, say: every number of it."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion_data.media import MediaLoader
from diffusion_data.prepare_energon_dataset import prepare
from diffusion_data.process_funcs import MediaSample, media_caption
from diffusion_data.report_facts import format_bytes, gather_facts
from diffusion_data.report_plots import Bars, Plot, Spreads
from diffusion_data.shard_reader import read_shard
from diffusion_data.spread_samples import find_shards
from tests.small_source import picture_bytes, prepare_config, source_rows, write_source
from tests.tiny_dataset import tiny_sample, write_dataset

STATS: dict[str, Any] = {
    "rows": 1200,
    "written": 1150,
    "samples": 1400,
    "rejected": {"timeout": 3, "not_found": 40, "truncated": 7},
    "captions_cut": 17,
    "shards": 6,
    "num_bytes": 12_345_678,
    "stage_seconds": {
        "decode": 40.26, "text_encoder": 3.0, "tokenizer": 90.04, "write": 0.05, "text_tokens": 0.049,
        "wait_for_rows": 12.5, "wait_for_encoders": 60.0, "wait_for_writer": 0.01,
    },
    "splits": {"train": 1300, "val": 100, "test": 0},
    "left_out": {"frames_cut": 31, "clips_dropped": 4, "seconds_kept": 75.0, "seconds_left_out": 25.0},
    "latent_mean": [0.5, -1.25],
    "latent_std": [1.0, 0.75],
    "resolutions": {"512x512": 700, "768x512": 300, "256x4096": 250, "640x360": 150},
    "num_frames": {"1": 1000, "17": 400},
    "framerates": {"24": 100, "29.97": 300},
    "text_tokens": {"3": 900, "40": 480, "512": 20},
    "cropped_percent": {"0": 1000, "12": 400},
}  # fmt: skip


def plots_of(dataset: Path) -> dict[str, Plot]:
    return {plot.name: plot for plot in gather_facts(dataset, find_shards(dataset)).plots}


def values_of(plot: Plot) -> dict[str, float]:
    assert isinstance(plot, Bars)
    return plot.values


def counts(values: list[Any]) -> dict[str, float]:
    """Value -> how many there are, in rising order of the values."""
    return {str(value): float(number) for value, number in sorted(Counter(values).items())}


def test_each_plot_is_of_what_the_job_told(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/stats.json").write_text(json.dumps(STATS))
    facts = gather_facts(tmp_path, [])
    assert {plot.name: list(values_of(plot).items()) for plot in facts.plots if isinstance(plot, Bars)} == {
        "resolutions": [("512x512", 700), ("768x512", 300), ("256x4096", 250), ("640x360", 150)],
        "aspect_ratios": [("taller", 250), ("1:1", 700), ("3:2", 300), ("16:9", 150)],
        "cropped": [("0", 1000), ("12", 400)],
        "frames": [("1", 1000), ("17", 400)],
        "fps": [("24", 100), ("29.97", 300)],
        "caption_lengths": [("3", 900), ("40", 480), ("512", 20)],
        "rejects": [("not_found", 40), ("truncated", 7), ("timeout", 3)],
        "stage_times": [
            ("tokenizer", 90.0),
            ("decode", 40.3),
            ("text encoder", 3.0),
            ("write", 0.1),
            ("waiting for the encoders", 60.0),
            ("waiting for decoding", 12.5),
        ],
    }
    latents, times = facts.plots[-3], facts.plots[-1]
    assert isinstance(latents, Spreads)
    assert (latents.name, latents.means, latents.deviations) == ("latents", [0.5, -1.25], [1.0, 0.75])
    assert isinstance(times, Bars)
    assert times.muted & {*times.values} == {"waiting for the encoders", "waiting for decoding"}
    assert [(plot.title, plot.unit) for plot in facts.plots if isinstance(plot, Bars)] == [
        ("Resolutions", "samples"),
        ("Aspect ratios, nearest", "samples"),
        ("Area cropped away, percent", "samples"),
        ("Frames (1 is a picture)", "samples"),
        ("Frames per second of clips", "samples"),
        ("Caption tokens", "samples"),
        ("Rejected rows", "rows"),
        ("Stage times, summed over ranks", "seconds"),
    ]
    assert facts.notes == []


def test_the_numbers_are_those_of_the_job(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/stats.json").write_text(json.dumps(STATS))
    assert list(gather_facts(tmp_path, []).numbers.items()) == [
        ("samples", "1,400"),
        ("rows", "1,200"),
        ("rejected", "50 (4.2%)"),
        ("shards", "6"),
        ("size", "12.3 MB"),
        ("captions cut", "17"),
        ("of videos in no sample", "25.0 s (25.0%)"),
        ("clips too short", "4"),
        ("frames cut off clips", "31"),
        ("train split", "1,300"),
        ("val split", "100"),
    ]


def test_plots_without_a_value_are_not_drawn(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    none = {"rejected": {}, "framerates": {}, "stage_seconds": {"decode": 0.01}}
    (tmp_path / "run/stats.json").write_text(json.dumps({**STATS, **none}))
    assert [plot.name for plot in gather_facts(tmp_path, []).plots] == [
        "resolutions",
        "aspect_ratios",
        "cropped",
        "frames",
        "caption_lengths",
        "latents",
    ]


def test_a_prepared_dataset_is_plotted_as_its_rows_and_samples_are(tmp_path: Path) -> None:
    rows = source_rows(12)  # clips at 3 and 10; every third row is square
    rows[5]["media"]["bytes"] = picture_bytes(5)[:200]
    rows[7]["media"]["bytes"] = picture_bytes(7, height=112, width=48)
    dataset = tmp_path / "dataset"
    prepare(prepare_config(write_source(tmp_path / "source.parquet", rows), dataset, max_reject_rate=0.5))
    samples = [sample for shard in find_shards(dataset) for sample in read_shard(shard)]
    plots = plots_of(dataset)
    drawn = {name: values_of(plots[name]) for name in ("resolutions", "aspect_ratios", "frames", "fps", "rejects")}
    assert drawn == {
        "resolutions": {"64x48": 7, "48x48": 3, "48x112": 1},
        "aspect_ratios": {"9:21": 1, "1:1": 3, "4:3": 7},
        "frames": {"1": 9, "9": 2},
        "fps": {"8": 2},
        "rejects": {"truncated": 1},
    }
    lengths = counts([len(sample.text_embedding) for sample in samples])
    assert len(lengths) == 5
    assert list(values_of(plots["caption_lengths"]).items()) == list(lengths.items())
    latents = plots["latents"]
    assert isinstance(latents, Spreads)
    values = np.concatenate([sample.latent.double().flatten(1).numpy() for sample in samples], axis=1)
    np.testing.assert_allclose(latents.means, values.mean(1))
    np.testing.assert_allclose(latents.deviations, values.std(1))


def slow_decoding(row: dict[str, Any], *, media: MediaLoader) -> MediaSample:
    time.sleep(0.1)
    return media_caption(row, media=media)


def test_stage_times_are_those_of_the_ledger(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source.parquet", source_rows(3))
    process_func = {"_target_": f"{__name__}.slow_decoding"}
    prepare(prepare_config(source, tmp_path / "dataset", process_func=process_func, samples_per_shard=1))
    spent: Counter[str] = Counter()
    for entry in (tmp_path / "dataset/run/ledger").glob("*.json"):
        spent.update(json.loads(entry.read_text())["stage_seconds"])
    names = {name: name.replace("_", " ") for name in spent} | {"wait_for_rows": "waiting for decoding"}
    names |= {"wait_for_encoders": "waiting for the encoders", "wait_for_writer": "waiting for writing"}
    summed = json.loads((tmp_path / "dataset/run/stats.json").read_text())["stage_seconds"]
    assert summed == pytest.approx(spent, abs=0.001)
    drawn = values_of(plots_of(tmp_path / "dataset")["stage_times"])
    assert min(drawn["decode"], drawn["waiting for decoding"]) >= 0.3
    assert drawn == {names[stage]: round(each, 1) for stage, each in summed.items() if each >= 0.05}


def test_a_dataset_made_elsewhere_is_plotted_as_its_samples_are(tmp_path: Path) -> None:
    shape = (16, 1, 4, 4)
    samples = [tiny_sample(row, latent_shape=shape, tokens=1 + row % 3) for row in range(6)]
    samples.append(tiny_sample(6, latent_shape=(16, 3, 4, 8), tokens=9, framerate=12.0))
    dataset = write_dataset(tmp_path / "elsewhere", samples, with_stats=False)
    facts = gather_facts(dataset, find_shards(dataset))
    assert {plot.name: values_of(plot) for plot in facts.plots if isinstance(plot, Bars)} == {
        "resolutions": {"32x32": 6, "64x32": 1},
        "aspect_ratios": {"1:1": 6, "16:9": 1},
        "cropped": {"0": 6, "2": 1},
        "frames": {"1": 6, "9": 1},
        "fps": {"12": 1},
        "caption_lengths": {"1": 2, "2": 2, "3": 2, "9": 1},
    }
    latents = facts.plots[-1]
    assert isinstance(latents, Spreads)
    values = np.concatenate([sample.latent.double().flatten(1).numpy() for sample in samples], axis=1)
    np.testing.assert_allclose(latents.means, values.mean(1))
    np.testing.assert_allclose(latents.deviations, values.std(1))
    assert facts.numbers == {
        "samples looked at": "7",
        "with a caption": "7",
        "shards": "2",
        "size": format_bytes(sum(path.stat().st_size for path in find_shards(dataset))),
    }


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_949, "99.9 kB"), (123_456, "123 kB"), (999_600, "1.0 MB"),
     (4_000_000, "4.0 MB"), (40e12, "40.0 TB")],
)  # fmt: skip
def test_bytes_are_told_in_the_units_of_disks(number: float, said: str) -> None:
    assert format_bytes(int(number)) == said
