"""Number of rows -> shards, each a fixed range of rows; shards -> splits.

Both follow from the rows and the config alone, never from the number of ranks: that is what makes a
shard's bytes reproducible and a resumed run identical to an undisturbed one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from diffusion_data.errors import UserError

SPLITS = ("train", "val", "test")

# 512 shards leave the slowest of a hundred ranks within a few percent of the others. Fewer than 32 rows
# would batch badly, and more than 10,000 shards slow energon down (its documentation).
_SHARDS_WANTED = 512
_FEWEST_SAMPLES, _MOST_SAMPLES = 32, 10_000
_MOST_BYTES = 1 << 30  # a rank holds up to four shards: one in the making, others on their way to the disk


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Rows [start, stop) of the source, written to one tar file."""

    number: int
    start: int
    stop: int

    @property
    def file_name(self) -> str:
        return f"shard_{self.number:06d}.tar"

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


def plan_shards(
    num_rows: int, samples_per_shard: int | None, split_ratio: Sequence[float], sample_bytes: int = 0
) -> list[Shard]:
    """Cut the rows into shards.

    Args:
        samples_per_shard: rows of a shard; None chooses by the number of rows and the ratio.
        split_ratio: weights of train, val, test. Splits are made of whole shards, so there are at least as many
            shards as splits asked for, with fewer rows in each than `samples_per_shard` if need be; where the
            size is chosen here, there are enough to come near the ratio.
        sample_bytes: estimate of what a sample will hold; a size that is chosen here keeps a shard below 1 GiB of them,
            but for the fewest samples a shard has.

    Raises:
        UserError: fewer rows than splits, or a size or ratio that makes no sense.
    """
    num_splits = len(asked_splits(split_ratio))
    if samples_per_shard is not None and samples_per_shard < 1:
        raise UserError(f"samples_per_shard: expected at least 1, got {samples_per_shard}")
    if num_rows < num_splits:
        raise UserError(f"split_ratio: {num_rows} rows can't fill {num_splits} splits")
    size = samples_per_shard or min(
        max(math.ceil(num_rows / _SHARDS_WANTED), _FEWEST_SAMPLES),
        _MOST_SAMPLES,
        max(_MOST_BYTES // max(1, sample_bytes), _FEWEST_SAMPLES),
        max(1, num_rows // _shards_for_ratio(split_ratio)),
    )
    count = max(math.ceil(num_rows / size), num_splits)
    if count == num_splits:  # the last shards must not stay empty
        bounds = [round(number * num_rows / count) for number in range(count + 1)]
    else:
        bounds = [*range(0, num_rows, size), num_rows]
    return [Shard(number=number, start=start, stop=stop) for number, (start, stop) in enumerate(pairwise(bounds))]


def _shards_for_ratio(split_ratio: Sequence[float]) -> int:
    """Shards that whole ones of come near the ratio: 10 for 8, 1, 1. Not beyond 100, for a split of a promille."""
    asked = [weight for weight in split_ratio if weight > 0]
    return min(math.ceil(sum(asked) / min(asked)), 100)


def asked_splits(split_ratio: Sequence[float]) -> list[str]:
    """Names of the splits whose weight is not zero."""
    if len(split_ratio) != len(SPLITS) or min(split_ratio) < 0 or sum(split_ratio) <= 0:
        raise UserError(f"split_ratio: expected weights of train, val and test, got {list(split_ratio)}")
    return [name for name, weight in zip(SPLITS, split_ratio, strict=True) if weight > 0]


def assign_splits(file_names: Sequence[str], split_ratio: Sequence[float], seed: int) -> dict[str, list[str]]:
    """Files of each split: shuffled by `seed`, in the ratio asked for, none that was asked for empty.

    Raises:
        UserError: fewer files than splits.
    """
    asked = asked_splits(split_ratio)
    if len(file_names) < len(asked):
        raise UserError(
            f"split_ratio: {len(file_names)} shards hold samples, too few for {' and '.join(asked)}; "
            "ask for fewer splits"
        )
    weights = dict(zip(SPLITS, split_ratio, strict=True))
    # Each split gets one file first; the rest go one by one to whichever is furthest below its share.
    counts = {name: int(name in asked) for name in SPLITS}
    for _ in range(len(file_names) - len(asked)):
        neediest = min(asked, key=lambda name: counts[name] / weights[name])
        counts[neediest] += 1
    shuffled = list(file_names)
    random.Random(seed).shuffle(shuffled)
    splits: dict[str, list[str]] = {}
    for name in SPLITS:
        splits[name] = sorted(shuffled[: counts[name]])
        del shuffled[: counts[name]]
    return splits
