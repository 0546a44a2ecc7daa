from __future__ import annotations

import time

import numpy as np
import pytest

from diffusion_data.sequence_packing import pack_sequences


def first_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """The same, as it is defined."""
    sequences: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda position: -lengths[position]):
        for sequence in sequences:
            if sum(lengths[other] for other in sequence) + lengths[position] <= capacity:
                sequence.append(position)
                break
        else:
            sequences.append([position])
    return sequences


@pytest.mark.parametrize(
    ("lengths", "capacity", "expected"),
    [
        ([], 4, []),
        ([4], 4, [[0]]),
        ([1, 1, 1], 3, [[0, 1, 2]]),
        ([6, 3, 5, 4], 9, [[0, 1], [2, 3]]),
        ([2, 5, 4, 7, 1, 3, 8], 10, [[6, 0], [3, 5], [1, 2, 4]]),
        ([3, 3, 3, 3], 3, [[0], [1], [2], [3]]),
        ([3, 3, 3, 3], 6, [[0, 1], [2, 3]]),
    ],
)
def test_the_longest_goes_first_into_the_first_sequence_with_room(lengths, capacity, expected):
    assert pack_sequences(lengths, capacity) == expected


@pytest.mark.parametrize("seed", range(30))
def test_equals_first_fit_decreasing_as_it_is_defined(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 60))
    lengths = rng.integers(1, capacity + 1, size=int(rng.integers(0, 130))).tolist()
    assert pack_sequences(lengths, capacity) == first_fit_decreasing(lengths, capacity)


@pytest.mark.parametrize("smallest", [1, 400])
def test_packs_100_000_lengths_quickly_and_each_exactly_once(smallest):
    lengths = np.random.default_rng(0).integers(smallest, 1025, size=100_000).tolist()
    start = time.process_time()
    sequences = pack_sequences(lengths, 1024)
    assert time.process_time() - start < 4  # about half a second on an idle machine
    assert sorted(position for sequence in sequences for position in sequence) == list(range(100_000))
    filled = [sum(lengths[position] for position in sequence) for sequence in sequences]
    assert max(filled) <= 1024
    if smallest == 1:
        assert sum(filled) / (1024 * len(sequences)) > 0.99


def test_pictures_and_clips_fill_their_sequences():
    """Lengths as mixed training has them."""
    rng = np.random.default_rng(0)
    lengths = rng.choice([256, 512, 960, 1024, 1280, 5120], size=4000, p=[0.2, 0.2, 0.2, 0.2, 0.1, 0.1]).tolist()
    sequences = pack_sequences(lengths, 8192)
    assert sum(lengths) / (8192 * len(sequences)) > 0.95


@pytest.mark.parametrize("length", [0, -1, 11])
def test_a_sample_that_fits_nowhere_is_named(length):
    with pytest.raises(ValueError, match=rf"sample 1 has length {length}; a sequence takes 1 to 10"):
        pack_sequences([3, length], 10)
