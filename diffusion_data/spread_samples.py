"""A folder of shards -> a bounded number of its samples, spread over them, however large the dataset is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from diffusion_data.errors import UserError
from diffusion_data.latent_sample import LatentSample
from diffusion_data.shard_reader import read_keys, read_shard
from diffusion_data.spread import at_even_distances, even_shares

_PASSED_OVER = 64  # samples for each that is chosen: their headers are read, which bounds what a large shard takes


def find_shards(dataset: Path) -> list[Path]:
    """All tars of the dataset, in order.

    Raises:
        UserError: there are none.
    """
    shards = sorted(dataset.rglob("*.tar"))
    if not shards:
        raise UserError(f"{dataset} holds no .tar file" if dataset.is_dir() else f"{dataset} is not a folder")
    return shards


def spread_samples(shards: Sequence[Path], number: int, problems: list[str]) -> Iterator[LatentSample]:
    """Up to `number` samples, from shards at even distances: as many from each, or what others lack.

    problems: gets a line for each shard that can't be read, or not as far as it was asked
    """
    chosen = at_even_distances(shards, number)
    passed_over = _PASSED_OVER * math.ceil(number / max(len(chosen), 1))
    heads = [_first_keys(shard, passed_over) for shard in chosen]
    counts = even_shares(number, [len(keys) for keys, _ in heads])
    for shard, (keys, problem), count in zip(chosen, heads, counts, strict=True):
        wanted = set(at_even_distances(keys, count))
        try:
            yield from islice(read_shard(shard, wanted), len(wanted))
        except (ValueError, OSError) as error:
            problem = problem or error
        if problem is not None:
            problems.append(f"{shard.name} can't be read: {' '.join(str(problem).split())}")


def _first_keys(shard: Path, number: int) -> tuple[list[str], Exception | None]:
    """Up to `number`, and what kept it from giving more."""
    keys: list[str] = []
    try:
        keys.extend(islice(read_keys(shard), number))
    except (ValueError, OSError) as error:
        return keys, error
    return keys, None
