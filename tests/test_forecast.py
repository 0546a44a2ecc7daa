"""plan=true: what it tells is what the run then does, and it writes nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_data.batching import Budgets
from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.distributed import Ranks
from diffusion_data.encode_cost import EncodeCost
from diffusion_data.encode_shards import decode_workers
from diffusion_data.encoders import load_encoders
from diffusion_data.errors import UserError
from diffusion_data.forecast import Forecast, _places, make_forecast
from diffusion_data.forecast_text import Machines, expected_bytes, forecast_text, seconds_per_row
from diffusion_data.prepare_config import PrepareConfig, TextEncoderConfig
from diffusion_data.prepare_energon_dataset import prepare
from diffusion_data.shard_plan import Shard, plan_shards
from diffusion_data.sources import ParquetSource, SourceFile
from diffusion_data.spread import at_even_distances, coarse_to_fine
from diffusion_data.t5_text_encoder import T5TextEncoder
from tests.small_source import picture_bytes, prepare_config, source_rows, write_source


def planned(config: PrepareConfig, capsys: pytest.CaptureFixture[str], **options: object) -> str:
    capsys.readouterr()
    assert prepare(replace(config, plan=True, **options)) is None  # type: ignore[arg-type]
    return capsys.readouterr().out


def test_the_plan_is_what_the_run_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = source_rows(14)
    rows[5]["media"]["bytes"] = picture_bytes(5)[:200]
    rows[6]["caption"] = None
    source = write_source(tmp_path / "source.parquet", rows)
    config = prepare_config(source, tmp_path / "out", text_encoder=TextEncoderConfig(name="tiny-t5", max_length=7))
    said = planned(config, capsys, plan_gpus=4, plan_price=1000.0)
    assert list(tmp_path.iterdir()) == [source]

    totals = prepare(config)
    assert totals is not None
    assert "plan: 14 rows, 14 of them looked at; nothing is written" in said
    assert f"samples   about {totals.written}; shards: 4 of 4 rows" in said
    assert "rejected  about 2 (14.3%):" in said
    assert "truncated 1 (1 seen)" in said
    assert "null_caption 1 (1 seen)" in said
    assert "more than max_reject_rate=0.05, which stops runs of 300 rows or more" in said
    assert "16 x 1 x 6 x 8: 58.3%" in said
    assert "largest seen: 16 x 3 x 6 x 8" in said
    assert f"about {totals.captions_cut} ({totals.captions_cut / 12:.1%}) are cut to 7" in said
    (megabytes,) = re.findall(r"disk      ([\d.]+) MB of shards", said)
    assert float(megabytes) == pytest.approx(totals.num_bytes / 1e6, rel=0.1)
    assert "with 4 ranks" in said
    assert re.search(r"money     \d+\.\d\d", said)


def test_the_bytes_of_a_source_that_is_only_sampled_are_within_a_tenth(tmp_path: Path) -> None:
    """Shapes and captions are not spread evenly: the first part has small pictures, the last long captions."""
    rows = []
    for number in range(900):
        side = 16 if number < 300 else 32
        caption = "red circle " * (1 + number % 4 + 20 * (number >= 600))
        rows.append({"media": {"bytes": picture_bytes(number % 7, side, side), "path": None}, "caption": caption})
    for part in range(3):
        write_source(tmp_path / f"rows/{part}.parquet", rows[300 * part : 300 * part + 300], row_group_size=64)
    media = replace(prepare_config(tmp_path, tmp_path).media, short_side=None)
    config = prepare_config(
        tmp_path / "rows", tmp_path / "out", metadata_columns=(), samples_per_shard=300, media=media
    )
    encoders = load_encoders(config, CosmosTokenizer.from_pretrained("tiny-cosmos").device)
    source = ParquetSource.open(config.source.path)
    shards = plan_shards(source.num_rows, 300, (1, 0, 0))
    with Ranks.connect() as ranks, decode_workers(config, ranks, encoders.tokenizer) as workers:
        budgets = config.batching.budgets(None)
        forecast = make_forecast(source, workers, encoders.tokenizer, encoders.text_encoder, budgets)
    assert forecast.looked_at == 384
    totals = prepare(config, encoders)
    assert totals is not None
    assert expected_bytes(forecast, shards) == pytest.approx(totals.num_bytes, rel=0.1)


def test_places_are_spread_disjoint_and_at_the_start_of_row_groups() -> None:
    source = ParquetSource([source_file("a", (1000,) * 10), source_file("b", (50, 60_000))])
    places = _places(source)
    assert len(places) == 48
    assert all(stop - start == 8 for start, stop in places)
    assert all(before[1] <= after[0] for before, after in pairwise(places))
    starts = [start for start, _ in places]
    assert starts[:3] == [0, 1000, 2000]
    assert 10_050 in starts  # the large row group, from its start once
    assert sum(start > 10_050 for start in starts) > 35  # and all over it
    small = ParquetSource([source_file("a", (13,))])
    assert [row for start, stop in _places(small) for row in range(start, stop)] == list(range(13))


def source_file(name: str, row_groups: tuple[int, ...]) -> SourceFile:
    return SourceFile(url=name, name=name, num_bytes=1, row_group_rows=row_groups, columns=(), footer_sha256="")


def test_wherever_looking_stops_it_has_looked_everywhere() -> None:
    assert coarse_to_fine(8) == [0, 4, 2, 6, 1, 5, 3, 7]
    assert sorted(coarse_to_fine(11)) == list(range(11))
    assert at_even_distances(range(10), 4) == [0, 3, 6, 9]
    assert at_even_distances(range(3), 4) == [0, 1, 2]
    assert at_even_distances(range(10), 1) == [0]


def test_a_clip_longer_than_a_batch_is_tried_with_fewer_frames() -> None:
    cost = EncodeCost(
        CosmosTokenizer.from_pretrained("tiny-cosmos"),
        T5TextEncoder.from_pretrained("tiny-t5"),
        Budgets(pixels=9 * 32 * 32, tokens=4096),
    )
    cost.add(np.zeros((41, 32, 32, 3), np.uint8), [1, 2])
    cost.add(np.zeros((1, 32, 32, 3), np.uint8), [1, 2])
    assert [batch[0].shape for batch in cost._batches.values()] == [(9, 32, 32, 3), (1, 32, 32, 3)]
    assert cost.frame_seconds() > 0
    assert cost.caption_seconds() > 0


def test_a_batch_that_memory_does_not_suffice_for_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = CosmosTokenizer.from_pretrained("tiny-cosmos")
    cost = EncodeCost(tokenizer, T5TextEncoder.from_pretrained("tiny-t5"), Budgets(pixels=5 * 32 * 32, tokens=4096))
    for _ in range(5):
        cost.add(np.zeros((1, 32, 32, 3), np.uint8), [1, 2])
    tried, encode, limit = [], tokenizer.encode, 2

    def with_little_memory(frames: torch.Tensor) -> torch.Tensor:
        tried.append(len(frames))
        if len(frames) > limit:
            raise torch.OutOfMemoryError
        return encode(frames)

    monkeypatch.setattr(tokenizer, "encode", with_little_memory)
    assert cost.frame_seconds() > 0
    assert tried == [5, 3, 2, 2]
    limit = 0
    with pytest.raises(UserError, match=r"cpu has too little memory for one sample of \(1, 32, 32, 3\) pixels"):
        cost.frame_seconds()


def test_the_slowest_part_decides_how_long_it_takes() -> None:
    forecast = Forecast(
        looked_at=10, decode_seconds=4.0, decode_cpu_seconds=2.0, frame_seconds=1.0, caption_seconds=0.5
    )
    forecast.store_seconds = 0.1
    forecast.latent_shapes[(16, 1, 8, 8)] = 10
    forecast.token_lengths = [5] * 10
    on_gpu = Machines(num_ranks=2, num_workers=8, threads=None, price_per_hour=3.0)
    assert seconds_per_row(forecast, on_gpu) == pytest.approx(
        {"the GPU": 0.15, "fetching and decoding": 0.05, "writing": 0.01}
    )
    assert seconds_per_row(forecast, replace(on_gpu, threads=4)) == pytest.approx(
        {"the processors": 0.36 / 8, "fetching and decoding": 0.05}
    )
    shards = [Shard(number=0, start=0, stop=480_000)]
    said = forecast_text(forecast, shards, on_gpu, max_length=512, max_reject_rate=0.05)
    assert "10.0 hours with 2 GPUs, 13.3 rows/s, held up by the GPU" in said
    assert "money     60.00" in said
    few = [Shard(number=0, start=0, stop=10)]
    assert "about a second with 2 GPUs" in forecast_text(forecast, few, on_gpu, max_length=512, max_reject_rate=0.05)
    assert "rejected  none of 10, so most likely less than 30.0% of all" in said


def test_a_run_that_its_rejects_would_stop_is_told() -> None:
    forecast = Forecast(looked_at=10)
    forecast.rejected["not_media"] = 1
    machines = Machines(num_ranks=1, num_workers=1, threads=None, price_per_hour=None)
    for rows, limit, told in ((300, 0.05, True), (299, 0.05, False), (300, 0.1, False)):
        shards = [Shard(number=0, start=0, stop=rows)]
        said = forecast_text(forecast, shards, machines, max_length=512, max_reject_rate=limit)
        assert ("more than max_reject_rate=0.05 allows: the run would stop" in said) == told
