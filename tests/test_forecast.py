"""plan=true: what it tells is what the run then does, and it writes nothing."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed import HashStore

from diffusion_data.batching import Budgets
from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.distributed import Ranks, usable_cpus
from diffusion_data.encode_cost import EncodeCost
from diffusion_data.encode_shards import decode_workers
from diffusion_data.encoders import load_encoders
from diffusion_data.errors import UserError
from diffusion_data.forecast import Forecast, _places, make_forecast
from diffusion_data.forecast_text import Machines, expected_bytes, forecast_text, rows_of_busiest_rank, seconds_per_row
from diffusion_data.media_config import ClipsConfig, MediaConfig
from diffusion_data.prepare_config import PrepareConfig, TextEncoderConfig
from diffusion_data.prepare_energon_dataset import _forecast, prepare
from diffusion_data.shard_plan import Shard, plan_shards
from diffusion_data.sources import ParquetSource, SourceFile
from diffusion_data.spread import at_even_distances, coarse_to_fine
from diffusion_data.t5_text_encoder import T5TextEncoder
from tests.media_files import write_video
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
    assert f"1 rank a node of {usable_cpus()} processors, 0 decode processes each" in said
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


ON_GPU = Machines(
    num_ranks=2,
    ranks_per_node=2,
    processors_per_node=16,
    num_workers=8,
    encode_threads=None,
    price_per_hour=3.0,
)


def ten_rows() -> Forecast:
    """Of pictures that a GPU takes 0.15 s for."""
    return Forecast(
        looked_at=10,
        latent_shapes=Counter({(16, 1, 8, 8): 10}),
        token_lengths=[5] * 10,
        decode_seconds=4.0,
        decode_cpu_seconds=2.0,
        store_seconds=0.1,
        frame_seconds=1.0,
        caption_seconds=0.5,
    )


def shards_of(num_rows: int, size: int) -> list[Shard]:
    return plan_shards(num_rows, size, (1, 0, 0))


def told(forecast: Forecast, shards: list[Shard], machines: Machines) -> list[str]:
    said = forecast_text(forecast, shards, machines, max_length=512, max_reject_rate=0.05)
    return [line.strip() for line in said.splitlines()]


def test_the_slowest_part_decides_how_long_it_takes() -> None:
    assert seconds_per_row(ten_rows(), ON_GPU) == pytest.approx(
        {"the GPU": 0.15, "the processors": 0.21 / 8, "fetching and decoding": 0.05, "writing": 0.01}
    )
    on_cpu = replace(ON_GPU, encode_threads=4)
    assert seconds_per_row(ten_rows(), on_cpu) == pytest.approx(
        {"the processors": 0.36 / 8, "encode_threads": 0.15 / 4, "fetching and decoding": 0.05, "writing": 0.01}
    )
    said = told(ten_rows(), shards_of(480_000, 240_000), ON_GPU)
    assert said[-4:] == [
        "time      10.0 hours with 2 GPUs, 13.3 rows/s, held up by the GPU",
        "2 GPUs a node of 16 processors, 8 decode processes each",
        "ms a row: decoding 200.00, tokenizer 100.00, text encoder 50.00, writing 10.00",
        "money     60.00",
    ]
    one = replace(ON_GPU, ranks_per_node=1, processors_per_node=1, num_workers=1)
    said = told(ten_rows(), shards_of(10, 5), one)
    assert said[-4:-2] == [
        "time      2 seconds with 2 GPUs, 5.0 rows/s, held up by fetching and decoding",
        "1 GPU a node of 1 processor, 1 decode process each",
    ]
    assert "rejected  none of 10, so most likely less than 30.0% of all" in told(ten_rows(), shards_of(480, 240), one)
    assert "time      about a second with 2 GPUs, 13.3 rows/s, held up by the GPU" in told(
        ten_rows(), shards_of(10, 5), ON_GPU
    )


@pytest.mark.parametrize(
    ("ranks_per_node", "num_workers", "encode_threads", "seconds"),
    [(1, 8, 4, 0.36 / 4), (1, 1, 1, 0.36 / 4), (8, 1, 1, 0.36 / 0.5), (2, 64, None, 0.21 / 2)],
)
def test_neither_processes_nor_threads_make_processors(
    ranks_per_node: int, num_workers: int, encode_threads: int | None, seconds: float
) -> None:
    machines = Machines(
        num_ranks=8,
        ranks_per_node=ranks_per_node,
        processors_per_node=4,
        num_workers=num_workers,
        encode_threads=encode_threads,
        price_per_hour=None,
    )
    assert seconds_per_row(ten_rows(), machines)["the processors"] == pytest.approx(seconds)


def test_the_plan_of_one_of_several_processes_shares_the_node_with_them(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source.parquet", source_rows(4))
    config = prepare_config(source, tmp_path / "out", encode_threads=None)
    first = Ranks(rank=0, world_size=8, local_rank=0, local_world_size=4, store=HashStore())
    said = _forecast(config, first, None)
    assert "with 8 ranks" in said
    assert f"4 ranks a node of {usable_cpus()} processors, 0 decode processes each" in said


def test_a_rank_works_on_whole_shards() -> None:
    assert rows_of_busiest_rank(shards_of(360, 180), 64) == 180
    assert rows_of_busiest_rank(shards_of(51_200, 100), 1000) == 100
    assert rows_of_busiest_rank(shards_of(450, 100), 1) == 450
    assert rows_of_busiest_rank(shards_of(450, 100), 2) == 250  # the third turn is the last shard's alone
    assert rows_of_busiest_rank(shards_of(450, 100), 3) == 200


def test_gpus_without_a_shard_make_nothing_quicker_but_cost() -> None:
    many = replace(ON_GPU, num_ranks=64)
    said = told(ten_rows(), shards_of(360, 180), many)
    assert "time      27 seconds with 64 GPUs, 13.3 rows/s, held up by the GPU" in said
    assert "62 of the 64 GPUs would have no shard: take fewer, or a samples_per_shard of at most 5" in said
    assert "money     1.44" in said  # 27 s of 64 at 3 an hour
    assert "time      14 seconds with 4 GPUs, 26.7 rows/s, held up by the GPU" in told(
        ten_rows(), shards_of(360, 90), replace(many, num_ranks=4)
    )
    few = told(ten_rows(), shards_of(10, 5), replace(many, num_ranks=11, encode_threads=1))
    assert "9 of the 11 ranks would have no shard: take fewer" in few


@pytest.mark.parametrize(
    ("num_ranks", "size", "idle"), [(5, 100, None), (6, 100, "17%"), (9, 100, "44%"), (10, 100, None), (9, 10, None)]
)
def test_gpus_that_wait_for_the_last_shards_are_told(num_ranks: int, size: int, idle: str | None) -> None:
    said = told(ten_rows(), shards_of(1000, size), replace(ON_GPU, num_ranks=num_ranks))
    assert [line for line in said if "would" in line] == (
        [f"{idle} of their time they would wait for the last of 10 shards: lower samples_per_shard"] if idle else []
    )


@pytest.mark.parametrize(
    ("price", "money"), [(0.0, "0.00"), (3.0, "0.013"), (0.3, "0.0013"), (3000.0, "12.50"), (3e6, "12,500.00")]
)
def test_small_costs_are_told_in_two_digits(price: float, money: str) -> None:
    said = told(ten_rows(), shards_of(100, 100), replace(ON_GPU, num_ranks=1, price_per_hour=price))
    assert f"money     {money}" in said


def test_what_is_cut_dropped_and_left_out_is_told_before_the_run() -> None:
    forecast = ten_rows()
    forecast.latent_shapes = Counter({(16, 1, 8, side): 9 - side for side in range(2, 9)})  # 7, 6, ... 1 of 28
    forecast.token_lengths = [7] * 14 + [20] * 12 + [513, 900]
    forecast.left_out = Counter(seconds_kept=30.0, seconds_left_out=10.0, clips_dropped=3, frames_cut=40)
    said = told(forecast, shards_of(1000, 100), ON_GPU)
    assert said[3:16] == [
        "latents   7 shapes (C x T x H x W), commonest first:",
        "16 x 1 x 8 x 2: 25.0%",
        "16 x 1 x 8 x 3: 21.4%",
        "16 x 1 x 8 x 4: 17.9%",
        "16 x 1 x 8 x 5: 14.3%",
        "16 x 1 x 8 x 6: 10.7%",
        "16 x 1 x 8 x 7: 7.1%",
        "1 other: 3.6%",
        "largest seen: 16 x 1 x 8 x 8",
        "videos    25.0% of their time is in no sample",
        "about 300 clips too short, 4,000 frames cut to lengths that are allowed",
        "captions  20 tokens in the middle, 95% up to 20, longest 900; about 200 (7.1%) are cut to 512",
        "disk      0.1 MB of shards, 0 kB a sample",
    ]
    nothing = told(ten_rows(), shards_of(1000, 100), ON_GPU)
    assert not [line for line in nothing if line.startswith(("videos", "about"))]
    assert "captions  5 tokens in the middle, 95% up to 5, longest 5; none is cut to 512" in nothing


def test_the_plan_tells_what_the_run_leaves_out_of_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 27 frames, clips of 9 begin at 0, 10 and 20: the last has 7 and is too short, or is cut to 5."""
    video = write_video(tmp_path / "27.mp4", 27, height=48, width=64).read_bytes()
    source = write_source(tmp_path / "source.parquet", [{"media": {"bytes": video}, "caption": "grey", "score": 0.0}])
    whole = MediaConfig(short_side=48, clips=ClipsConfig(num_frames=9, stride_frames=10))
    config = prepare_config(source, tmp_path / "out", media=whole)
    said = planned(config, capsys)
    assert "videos    33.3% of their time is in no sample" in said
    assert "about 1 clip too short, 0 frames cut to lengths that are allowed" in said
    totals = prepare(config)
    assert totals is not None
    assert (totals.left_out["clips_dropped"], totals.left_out["frames_cut"]) == (1, 0)
    cut = replace(config, media=replace(whole, clips=ClipsConfig(num_frames=9, stride_frames=10, min_frames=5)))
    assert "about 0 clips too short, 2 frames cut to lengths that are allowed" in planned(cut, capsys)


def test_a_run_that_its_rejects_would_stop_is_told() -> None:
    forecast = Forecast(looked_at=10)
    forecast.rejected["not_media"] = 1
    machines = replace(ON_GPU, num_ranks=1)
    for rows, limit, told in ((300, 0.05, True), (299, 0.05, False), (300, 0.1, False)):
        shards = [Shard(number=0, start=0, stop=rows)]
        said = forecast_text(forecast, shards, machines, max_length=512, max_reject_rate=limit)
        assert ("more than max_reject_rate=0.05 allows: the run would stop" in said) == told
