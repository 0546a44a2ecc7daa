"""A tar shard -> its LatentSamples, in order, without an index and without running code from it."""

from __future__ import annotations

import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path

from diffusion_data.latent_sample import LatentSample
from diffusion_data.safe_decoder import decode_part


def read_shard(path: Path, keys: Collection[str] | None = None) -> Iterator[LatentSample]:
    """The samples, decoded.

    keys: of those that are wanted; the others are passed over unread. None is all

    Raises:
        ValueError: a sample is incomplete, broken or refused; the message names the shard and the key.
    """
    return (_sample(path, key, parts) for key, parts in read_parts(path, keys))


def read_parts(path: Path, keys: Collection[str] | None = None) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, bytes of each part), as stored; keys as for read_shard.

    Members of one sample stand next to each other, as in every WebDataset; folders, links and devices are passed by.

    Raises:
        ValueError: the tar is damaged or holds what is refused; the message names the shard.
    """
    current, parts = "", dict[str, bytes]()
    try:
        with tarfile.open(path, "r:") as tar:
            for key, part, member in _members(tar):
                if key != current and parts:
                    yield current, parts
                    parts = {}
                current = key
                if keys is None or key in keys:
                    parts[part] = _content(tar, member, path)
    except tarfile.TarError as error:
        raise ValueError(f"{path}: damaged after {current or 'its start'}: {error}") from error
    if parts:
        yield current, parts


def read_keys(path: Path) -> Iterator[str]:
    """Of each sample, in order, by the headers alone: a sample that is cut off has one too.

    Raises:
        ValueError: the tar is damaged.
    """
    current = ""
    try:
        with tarfile.open(path, "r:") as tar:
            for key, _, _ in _members(tar):
                if key != current:
                    yield key
                current = key
    except tarfile.TarError as error:
        raise ValueError(f"{path}: damaged after {current or 'its start'}: {error}") from error


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(key, part, member) of the files."""
    for member in tar:
        if member.isreg():  # extractfile would follow a link
            folder, _, name = member.name.rpartition("/")
            stem, _, part = name.partition(".")
            yield f"{folder}/{stem}" if folder else stem, part, member


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> bytes:
    if member.issparse():  # of which a few bytes may stand for any number of zeros
        raise ValueError(f"{path}: {member.name} is a sparse file, which is refused")
    file = tar.extractfile(member)
    assert file is not None, "a regular file has content"
    if member.offset_data + member.size > path.stat().st_size:
        raise tarfile.ReadError(f"{member.name} ends beyond the end of the file")
    return file.read()


def _sample(path: Path, key: str, parts: dict[str, bytes]) -> LatentSample:
    try:
        return LatentSample.from_parts(key, {part: decode_part(part, raw) for part, raw in parts.items()})
    except ValueError as error:
        raise ValueError(f"{path}: {key}: {str(error).removeprefix(f'{key}: ')}") from error
