"""Rows -> shards -> splits: functions of the config alone, and no split that was asked for is empty."""

from __future__ import annotations

from itertools import pairwise

import pytest

from diffusion_data.errors import UserError
from diffusion_data.shard_plan import assign_splits, plan_shards


def sizes(num_rows: int, samples_per_shard: int | None, ratio: tuple[float, ...] = (1, 0, 0)) -> list[int]:
    shards = plan_shards(num_rows, samples_per_shard, ratio)
    assert [shard.number for shard in shards] == list(range(len(shards)))
    assert shards[0].start == 0
    assert shards[-1].stop == num_rows
    assert all(a.stop == b.start for a, b in pairwise(shards))
    return [shard.num_rows for shard in shards]


def test_shards_have_the_size_asked_for_and_the_last_the_rest() -> None:
    assert sizes(10, 4) == [4, 4, 2]
    assert sizes(8, 4) == [4, 4]
    assert sizes(3, 4) == [3]


@pytest.mark.parametrize(
    ("num_rows", "first", "count"),
    [(1, 1, 1), (56, 32, 2), (300, 32, 10), (1_000_000, 1954, 512), (100_000_000, 10_000, 10_000)],
)
def test_the_default_size_suits_a_few_rows_and_a_hundred_million(num_rows: int, first: int, count: int) -> None:
    found = sizes(num_rows, None)
    assert (found[0], len(found)) == (first, count)


@pytest.mark.parametrize(
    ("num_rows", "sample_bytes", "rows"),
    [(100_000_000, 213_000, 5_041), (1_000_000, 213_000, 1_954), (100_000_000, 10**9, 32), (100, 10**9, 32)],
)
def test_the_default_size_keeps_a_shard_below_a_gibibyte(num_rows: int, sample_bytes: int, rows: int) -> None:
    assert plan_shards(num_rows, None, (1, 0, 0), sample_bytes)[0].num_rows == rows
    assert plan_shards(num_rows, 50, (1, 0, 0), sample_bytes)[0].num_rows == 50  # what was asked for counts


def test_there_are_at_least_as_many_shards_as_splits() -> None:
    assert sizes(10, 100, (8, 1, 1)) == [3, 4, 3]
    assert sizes(3, 100, (8, 1, 1)) == [1, 1, 1]


def test_a_size_that_is_chosen_suits_the_ratio_too() -> None:
    assert len(sizes(45, None, (8, 1, 1))) == 12
    assert [len(each) for each in assign_splits(files(12), (8, 1, 1), seed=0).values()] == [9, 2, 1]
    assert sizes(3, None, (8, 1, 1)) == [1, 1, 1]


def test_fewer_rows_than_splits_is_refused() -> None:
    with pytest.raises(UserError, match="2 rows can't fill 3 splits"):
        plan_shards(2, None, (8, 1, 1))


@pytest.mark.parametrize("ratio", [(0, 0, 0), (1, 0), (1, -1, 0)])
def test_a_ratio_that_makes_no_sense_is_refused(ratio: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="split_ratio"):
        plan_shards(10, None, ratio)


def files(count: int) -> list[str]:
    return [f"shard_{number:06d}.tar" for number in range(count)]


def test_every_file_is_in_one_split_and_the_ratio_is_kept() -> None:
    splits = assign_splits(files(100), (8, 1, 1), seed=0)
    assert {name: len(each) for name, each in splits.items()} == {"train": 80, "val": 10, "test": 10}
    assert sorted(splits["train"] + splits["val"] + splits["test"]) == files(100)


def test_no_split_that_was_asked_for_is_empty() -> None:
    assert [len(each) for each in assign_splits(files(3), (98, 1, 1), seed=0).values()] == [1, 1, 1]
    assert [len(each) for each in assign_splits(files(5), (98, 1, 1), seed=0).values()] == [3, 1, 1]
    assert [len(each) for each in assign_splits(files(1), (1, 0, 0), seed=0).values()] == [1, 0, 0]


def test_splits_are_spread_by_seed_and_repeatable() -> None:
    first = assign_splits(files(20), (8, 2, 0), seed=0)
    assert first == assign_splits(files(20), (8, 2, 0), seed=0)
    assert first["val"] != assign_splits(files(20), (8, 2, 0), seed=1)["val"]


def test_too_few_files_for_the_splits_is_refused() -> None:
    with pytest.raises(UserError, match="1 shards hold samples, too few for train and val"):
        assign_splits(files(1), (9, 1, 0), seed=0)
