"""As many samples as are asked for, or as there are, from all over a dataset."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusion_data.spread import even_shares
from diffusion_data.spread_samples import find_shards, spread_samples
from tests.tiny_dataset import tiny_samples, write_dataset


def rows_of(shards: list[Path], number: int, problems: list[str] | None = None) -> list[int]:
    """The numbers of the samples that are given."""
    return [int(sample.key[-9:]) for sample in spread_samples(shards, number, [] if problems is None else problems)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Samples 0 to 31 and 32 to 57."""
    return find_shards(write_dataset(tmp_path_factory.mktemp("spread") / "dataset", tiny_samples(58), per_shard=32))


@pytest.mark.parametrize(("number", "of_each"), [(58, (32, 26)), (60, (32, 26)), (56, (30, 26)), (53, (27, 26))])
def test_what_a_shard_lacks_is_taken_from_another(shards: list[Path], number: int, of_each: tuple[int, int]) -> None:
    for order in (shards, shards[::-1]):
        rows = rows_of(order, number)
        assert len(set(rows)) == len(rows)
        assert (sum(row < 32 for row in rows), sum(row >= 32 for row in rows)) == of_each


def test_samples_are_spread_evenly_over_shards_and_within_them(shards: list[Path]) -> None:
    assert rows_of(shards, 7) == [0, 10, 21, 31, 32, 44, 57]
    assert rows_of(shards, 2) == [0, 32]
    assert rows_of(shards, 1) == [0]


def test_what_an_unreadable_shard_lacks_is_taken_from_the_others(shards: list[Path], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.tar"
    damaged.write_bytes(b"no tar" * 1000)
    problems: list[str] = []
    rows = rows_of([shards[0], damaged, shards[1]], 12, problems)
    assert rows == [0, 6, 12, 19, 25, 31, 32, 37, 42, 47, 52, 57]
    (told,) = problems
    assert told.startswith("damaged.tar can't be read: ")


@pytest.mark.parametrize(
    ("number", "available", "shares"),
    [
        (8, [9, 9, 9], [3, 3, 2]),
        (8, [9, 1, 9], [4, 1, 3]),
        (8, [0, 5, 2], [0, 5, 2]),
        (2, [1, 1, 1], [1, 1, 0]),
        (0, [4], [0]),
        (5, [], []),
    ],
)
def test_shares_are_as_even_as_what_is_there_allows(number: int, available: list[int], shares: list[int]) -> None:
    assert even_shares(number, available) == shares


def test_samples_from_all_over_a_shard_and_one_line_of_what_is_damaged(tmp_path: Path) -> None:
    (whole,) = find_shards(write_dataset(tmp_path / "dataset", tiny_samples(150), per_shard=150))
    problems: list[str] = []
    assert rows_of([whole], 4, problems) == [0, 50, 99, 149]
    cut_off = tmp_path / "b.tar"
    cut_off.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert problems == []
    found = rows_of([cut_off], 3, problems)
    assert found[0] == 0
    assert 30 < found[1] < 45
    (told,) = problems
    assert told.startswith("b.tar can't be read: ")
