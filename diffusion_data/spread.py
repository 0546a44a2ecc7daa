"""Which of many to look at, when not all can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def at_even_distances(items: Sequence[Item], number: int) -> list[Item]:
    """`number` of the items, the first and the last among them; all where there are no more."""
    if len(items) <= number:
        return list(items)
    step = (len(items) - 1) / max(number - 1, 1)
    return [items[round(place * step)] for place in range(number)]


def even_shares(number: int, available: Sequence[int]) -> list[int]:
    """How many to take from each so that they are `number`, as evenly as can be: what one lacks, others give.

    The first ones give one more where it can't be even; all is taken where there are no more than `number`.
    """
    shares, left = [0] * len(available), number
    poorest_first = sorted(range(len(available)), key=lambda place: (available[place], -place))
    for done, place in enumerate(poorest_first):
        shares[place] = min(available[place], left // (len(available) - done))
        left -= shares[place]
    return shares


def coarse_to_fine(number: int) -> list[int]:
    """0 .. number - 1, so that wherever one stops, what came until then is spread over all: 0, 4, 2, 6, 1, 5, 3, 7."""
    return sorted(range(number), key=lambda place: f"{place:032b}"[::-1])
