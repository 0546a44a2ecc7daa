"""A tar shard -> its LatentSamples, in order, without an index and without running code from it."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusion_data.latent_sample import LatentSample
from diffusion_data.safe_decoder import decode_part


def read_shard(path: Path) -> Iterator[LatentSample]:
    """Members of one sample stand next to each other, as in every WebDataset.

    Raises:
        ValueError: a sample is incomplete or broken; the message names the shard and the key.
    """
    current, parts = "", dict[str, Any]()
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is None:  # a folder or a link
                continue
            folder, _, name = member.name.rpartition("/")
            stem, _, part = name.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if key != current and parts:
                yield _sample(path, current, parts)
                parts = {}
            current = key
            parts[part] = decode_part(part, file.read())
    if parts:
        yield _sample(path, current, parts)


def _sample(path: Path, key: str, parts: dict[str, Any]) -> LatentSample:
    try:
        return LatentSample.from_parts(key, parts)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
