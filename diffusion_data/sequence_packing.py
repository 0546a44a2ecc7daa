"""Lengths of samples, capacity of a sequence -> which samples share a sequence: first fit decreasing.

    pack_sequences([6, 3, 5, 4], 9) == [[0, 1], [2, 3]]

The longest sample goes first, each into the first sequence that has room for it. The result is at most 22% longer than
the best there is, and for lengths as they occur nearly full. n samples take about n log n steps.
"""

from __future__ import annotations

from collections.abc import Sequence


def pack_sequences(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Positions in `lengths` of the samples of each sequence; equal input gives equal output.

    Raises:
        ValueError: a length is below 1 or above `capacity`; the message names its position.
    """
    for position, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(f"sample {position} has length {length}; a sequence takes 1 to {capacity}")
    decreasing = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    sequences: list[list[int]] = []
    # A tree over all sequences there may ever be: a node holds the most room that any below it has, so that
    # the first sequence with room enough is found on one way down. Unused sequences are empty ones.
    leaves = 1 << max(0, len(lengths) - 1).bit_length()
    room = [capacity] * (2 * leaves)
    for position in decreasing:
        length = lengths[position]
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        if node - leaves == len(sequences):
            sequences.append([])
        sequences[node - leaves].append(position)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return sequences
