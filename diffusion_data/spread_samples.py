"""A folder of shards -> a bounded number of its samples, spread over them, however large the dataset is."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from diffusion_data.errors import UserError
from diffusion_data.latent_sample import LatentSample
from diffusion_data.shard_reader import read_shard
from diffusion_data.spread import at_even_distances

_FIRST_OF_SHARD = 64  # samples of a shard that may be chosen: for those behind, all before would have to be read


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
    """Up to `number` samples, from shards at even distances, about as many from each.

    problems: gets a line for each shard that can't be read, or not as far as it was asked
    """
    chosen = at_even_distances(shards, number)
    for place, shard in enumerate(chosen):
        count = number // len(chosen) + (place < number % len(chosen))
        yield from at_even_distances(_first_samples(shard, max(count, _FIRST_OF_SHARD), problems), count)


def _first_samples(shard: Path, number: int, problems: list[str]) -> list[LatentSample]:
    samples: list[LatentSample] = []
    try:
        samples.extend(islice(read_shard(shard), number))
    except (ValueError, OSError, tarfile.TarError) as error:
        problems.append(f"{shard.name} can't be read: {' '.join(str(error).split())}")
    return samples
