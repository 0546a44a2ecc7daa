"""Rows that become several samples, from the parquet to the finished dataset and back."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset

from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.decoded_row import DecodedRow
from diffusion_data.errors import UserError
from diffusion_data.latent_sample import parse_key
from diffusion_data.media import MediaLoader
from diffusion_data.media_config import ClipsConfig, MediaConfig
from diffusion_data.prepare_energon_dataset import prepare
from diffusion_data.process_func_options import row_decoder
from diffusion_data.process_funcs import MediaSample
from diffusion_data.scripts.inspect_shard import sample_of
from diffusion_data.source_frames import SourceFrames
from diffusion_data.sources import ParquetSource
from diffusion_data.verify_dataset import verify_dataset
from tests.media_files import frame_numbers, write_video
from tests.small_source import picture_bytes, prepare_config, write_source
from tests.test_prepare import read_samples, tar_bytes

MEDIA = MediaConfig(short_side=48, mirror=True, clips=ClipsConfig(num_frames=9, stride_frames=10, max_per_row=3))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, videos of 25 frames (two whole clips of 9), of 9 and of 5, and a row without media."""
    folder = tmp_path_factory.mktemp("source")
    long, whole, short = (
        write_video(folder / f"{number}.mp4", number, height=48, width=64).read_bytes() for number in (25, 9, 5)
    )
    media = [picture_bytes(0), long, whole, short, None, picture_bytes(1)]
    rows = [
        {"media": {"bytes": each, "path": None}, "caption": f"row {row}", "score": row / 10}
        for row, each in enumerate(media)
    ]
    return write_source(folder / "source.parquet", rows)


@pytest.fixture(scope="module")
def prepared(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dataset = tmp_path_factory.mktemp("prepared") / "dataset"
    prepare(prepare_config(source, dataset, media=MEDIA, max_reject_rate=1.0))
    return dataset


def test_rows_are_accounted_for_and_samples_counted(prepared: Path) -> None:
    stats = json.loads((prepared / "run/stats.json").read_text())
    assert (stats["rows"], stats["written"], stats["samples"]) == (6, 4, 10)
    assert stats["rejected"] == {"too_few_frames": 1, "null_media": 1}
    assert stats["splits"]["train"] == 10
    assert stats["left_out"] == {"frames_cut": 0, "clips_dropped": 1, "seconds_kept": 2.7, "seconds_left_out": 0.7}
    counts = json.loads((prepared / ".nv-meta/.info.json").read_text())["shard_counts"]
    assert counts == {"shard_000000.tar": 8, "shard_000001.tar": 2}
    assert verify_dataset(prepared, num_workers=1).faults == []


def test_keys_and_json_tell_row_clip_and_mirroring(prepared: Path) -> None:
    samples = read_samples(prepared)
    told = [(parse_key(each.key), each.metadata.get("start_seconds"), each.metadata["mirrored"]) for each in samples]
    assert told == [
        ((0, 0), None, False), ((0, 1), None, True),
        ((1, 0), 0.0, False), ((1, 1), 0.0, True), ((1, 2), 1.0, False), ((1, 3), 1.0, True),
        ((2, 0), 0.0, False), ((2, 1), 0.0, True),
        ((5, 0), None, False), ((5, 1), None, True),
    ]  # fmt: skip
    assert [each.metadata["end_seconds"] for each in samples[2:8:2]] == [0.9, 1.9, 0.9]
    assert {each.metadata["score"] for each in samples[2:6]} == {0.1}


def test_the_frames_of_each_sample_are_found_again(prepared: Path, source: Path) -> None:
    tokenizer = CosmosTokenizer.from_pretrained("tiny-cosmos", decoder=False)
    config = prepare_config(source, prepared, media=MEDIA)
    sources = SourceFrames(ParquetSource.open(str(source)), row_decoder(config, tokenizer))
    for sample in read_samples(prepared):
        frames = sources.frames_of(sample)
        assert frames is not None
        latent = tokenizer.encode(torch.from_numpy(frames[None].copy()))[0]
        np.testing.assert_allclose(latent.float().numpy(), sample.latent.float().numpy(), atol=0.05)
    second = sources.frames_of(read_samples(prepared)[4])
    assert second is not None
    assert frame_numbers(second) == list(range(10, 19))


def test_workers_and_ranks_change_no_byte(prepared: Path, source: Path, tmp_path: Path) -> None:
    prepare(prepare_config(source, tmp_path / "again", media=MEDIA, max_reject_rate=1.0, num_workers=2))
    assert tar_bytes(tmp_path / "again") == tar_bytes(prepared)


def test_options_that_the_tokenizer_refuses_leave_the_folder_to_the_next_run(source: Path, tmp_path: Path) -> None:
    config = prepare_config(source, tmp_path / "out", media=MediaConfig(short_side=48, extra_short_sides=(44,)))
    with pytest.raises(UserError, match="some are the same"):
        prepare(config)
    totals = prepare(replace(config, media=MediaConfig(short_side=48), max_reject_rate=1.0))
    assert totals is not None
    assert totals.samples == totals.written == 5


def test_rows_of_one_sample_have_the_bytes_that_they_always_had(source: Path, tmp_path: Path) -> None:
    """A run of clips and one that cuts to the first clip write the same picture."""
    plain = prepare_config(
        source, tmp_path / "plain", media=MediaConfig(short_side=48, num_frames=9), max_reject_rate=1.0
    )
    clips = ClipsConfig(num_frames=9, max_per_row=1)
    prepare(plain)
    prepare(
        prepare_config(source, tmp_path / "clips", media=MediaConfig(short_side=48, clips=clips), max_reject_rate=1.0)
    )
    one, other = read_samples(tmp_path / "plain"), read_samples(tmp_path / "clips")
    assert [each.key for each in one][:3] == [each.key for each in other][:3] == [
        "samples/sample_000000000", "samples/sample_000000001", "samples/sample_000000002",
    ]  # fmt: skip
    assert one[0].to_parts() == other[0].to_parts()
    assert one[1].to_parts()["pth"] == other[1].to_parts()["pth"]
    assert "start_seconds" not in one[1].metadata


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("samples/sample_000000001_001"), "sample_000000001_002: sample 2 of its row, expected 1"),
        (lambda s: s.pop("samples/sample_000000001_003"), "shard_000000.tar: 7 samples, 8 were written"),
        (
            lambda s: s.update({"samples/sample_000000003": s.pop("samples/sample_000000002_001")}),
            "shard_000000.tar: samples of 4 rows, 3 rows were written",
        ),
        (
            lambda s: s.update({"samples/sample_000000002": s.pop("samples/sample_000000002_001")}),
            "samples/sample_000000002: comes after row 2",
        ),
    ],
)
def test_a_sample_that_is_missing_among_a_rows_is_found(prepared: Path, tmp_path: Path, change: Any, told: str) -> None:
    dataset = shutil.copytree(prepared, tmp_path / "dataset")
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(dataset / "shard_000000.tar") as old:
        for member in old:
            key, _, part = member.name.partition(".")
            file = old.extractfile(member)
            assert file is not None
            samples.setdefault(key, {})[part] = file.read()
    change(samples)
    with webdataset.TarWriter(str(dataset / "shard_000000.tar"), encoder=False, mtime=0) as new:
        for key, parts in samples.items():
            new.write({"__key__": key, **parts})
    found = verify_dataset(dataset, num_workers=1).faults
    assert any(told in fault for fault in found), found


def test_the_number_of_a_row_finds_its_first_sample(prepared: Path) -> None:
    shard = prepared / "shard_000000.tar"
    assert sample_of(shard, "1")[0] == "samples/sample_000000001_000"
    assert sample_of(shard, "samples/sample_000000001_003")[0] == "samples/sample_000000001_003"


def halves(row: dict[str, Any], *, media: MediaLoader, number: int) -> list[Any]:
    """A process function of a user's own: left and right half of a picture, or whatever else is asked for."""
    pixels = media.load(row["media"]).pixels
    middle = pixels.shape[2] // 2
    samples = [
        MediaSample(frames=media.load(half[0]), caption=f"half of {row['caption']}", metadata={"half": place})
        for place, half in enumerate((pixels[:, :, :middle], pixels[:, :, middle:]))
    ]
    return [*samples, "no sample"][:number] if number else []


@pytest.mark.parametrize(
    ("number", "told"),
    [(2, None), (0, "returned an empty list, expected MediaSample, or a list of them"), (3, "returned str, expected")],
)
def test_a_users_own_function_may_return_a_list(source: Path, tmp_path: Path, number: int, told: str | None) -> None:
    func = {"_target_": f"{__name__}.halves", "number": number}
    config = prepare_config(source, tmp_path / "out", process_func=func, media=MediaConfig(short_side=48))
    tokenizer = CosmosTokenizer.from_pretrained("tiny-cosmos", decoder=False)
    (row,) = ParquetSource.open(str(source)).read_rows(0, 1)
    decoded = row_decoder(config, tokenizer)(row)
    if told is None:
        assert isinstance(decoded, DecodedRow)
        assert [(each.caption, each.metadata) for each in decoded.samples] == [
            ("half of row 0", {"score": 0.0, "half": 0}),
            ("half of row 0", {"score": 0.0, "half": 1}),
        ]
    else:
        assert not isinstance(decoded, DecodedRow)
        assert told in decoded.message


def test_overlapping_clips_travel_between_processes_once(source: Path, tmp_path: Path) -> None:
    clips = ClipsConfig(num_frames=9, stride_frames=4, max_per_row=4)
    config = prepare_config(source, tmp_path / "out", media=MediaConfig(short_side=48, clips=clips))
    tokenizer = CosmosTokenizer.from_pretrained("tiny-cosmos", decoder=False)
    (row,) = ParquetSource.open(str(source)).read_rows(1, 2)
    decoded = row_decoder(config, tokenizer)(row)
    assert isinstance(decoded, DecodedRow)
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(decoded, protocol=5, buffer_callback=buffers.append)
    assert sum(buffer.raw().nbytes for buffer in buffers) == (9 + 3 * 4) * 48 * 64 * 3
    back = pickle.loads(pickled, buffers=[io.BytesIO(buffer.raw()).getbuffer() for buffer in buffers])
    assert [frame_numbers(each.pixels) for each in back.samples] == [list(range(at, at + 9)) for at in (0, 4, 8, 12)]
    assert np.shares_memory(back.samples[0].pixels, back.samples[1].pixels)
