"""Sample number -> its parts as memoryviews into one buffer: local tars read with one system call a sample.

energon reads a tar's members through tarfile and a client for object stores, which copies each part several times and
measures every read of 512 bytes. For local files neither is needed: energon's index tells where a sample begins
and ends, and between are plain headers and contents. Whatever is not plain is left to energon's reader.

Order, state and resume are not touched: they are decided by which sample numbers are asked for.
"""

from __future__ import annotations

import os
import struct
import tarfile
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.energon.flavors.webdataset.config import skip_meta_re, split_name_re
from megatron.energon.flavors.webdataset.itar import ITAR_SUFFIX, ITarFile
from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader
from megatron.energon.source_info import SourceInfo

_OPEN_SHARDS = 64  # more than energon reads from at a time: a shuffle buffer reaches back
_BLOCK = 512  # bytes of a tar header; contents are filled up to a multiple
_CHECKSUM = slice(148, 156)  # counted as spaces
_SPACES = 8 * ord(" ")
_OFFSETS = struct.Struct("<2Q")  # where a sample begins and where the next one does


def local_reader(reader: Any) -> LocalTarReader | None:
    """What reads the same shards as energon's `reader`; None if they aren't plain files."""
    if type(reader) is not ShardInfosITarReader or not reader.base_path.is_local() or not hasattr(os, "preadv"):
        return None
    return LocalTarReader(
        reader.base_path,
        reader.shard_infos,
        part_filter=reader.part_filter,
        itar_cache_size=max(reader.itar_cache_size, _OPEN_SHARDS),
        sample_filter=reader.sample_filter,
    )


class LocalTarReader(ShardInfosITarReader):
    """energon's reader of indexed tars; parts are memoryviews that can be written to, instead of bytes."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._open_shards: OrderedDict[int, _Shard] = OrderedDict()

    def close(self) -> None:
        self._open_shards.clear()
        super().close()

    def _get_itarfile_cached(self, tar_file_id: int) -> ITarFile:
        tar = super()._get_itarfile_cached(tar_file_id)
        tar.fileobject = _open_member
        return tar

    def __getitem__(self, index: int) -> Any:
        place = self.place_of(index)
        return self.sample_of(index, place, None if place is None else place.read())

    def place_of(self, index: int) -> Place | None:
        """Where the sample stands; None if there is none."""
        shard_number = bisect_right(self.shard_count_cumsum, index) - 1
        if not 0 <= shard_number < len(self.shard_infos):
            return None
        tar = self.shard_tar_file_idxs[shard_number]
        shard = self._open_shards.get(tar)
        if shard is None:
            if len(self._open_shards) >= self.itar_cache_size:
                self._open_shards.popitem(last=False)
            self._open_shards[tar] = shard = _Shard(self.tar_filepaths[tar].local_path())
        else:
            self._open_shards.move_to_end(tar)
        return Place(shard, index - self.shard_count_cumsum[shard_number], self.tar_filenames[tar])

    def sample_of(self, index: int, place: Place | None, block: memoryview | None) -> Any:
        """The sample whose stretch of the tar `place` gave, as energon's reader would return it."""
        members = None if block is None else _members(block)
        sample = None if place is None or members is None else self._sample(members, place.shard_name, index)
        return super().__getitem__(index) if sample is None else sample

    def _sample(self, members: list[tuple[str, memoryview]], shard_name: str, index: int) -> dict[str, Any] | None:
        key, parts, names = None, {}, []
        for name, content in members:
            matched = split_name_re.match(name)
            if matched is None or skip_meta_re.match(name):
                continue
            base, extension = matched.groups()
            if key is None:
                key = base
                if self.sample_filter is not None and not self.sample_filter(f"{shard_name}/{key}"):
                    return None
            elif base != key:
                return None
            if self.part_filter is None or self.part_filter(extension):
                parts[extension] = content
                names.append(name)
        if key is None:
            return None
        source = SourceInfo(dataset_path=self.base_path, index=index, shard_name=shard_name, file_names=tuple(names))
        return {
            "__key__": key,
            "__shard__": shard_name,
            "__restore_key__": ("Webdataset", index),
            "__sources__": (source,),
            **parts,
        }


def _open_member(tar: ITarFile, member: tarfile.TarInfo) -> tarfile.ExFileObject:
    """For energon's reader, which would fill the memory with the zeros that a sparse file may stand for."""
    if member.issparse():
        raise ValueError(f"{tar.name}: {member.name} is a sparse file, which is refused")
    return tarfile.ExFileObject(tar, member)


@dataclass(frozen=True, slots=True)
class Place:
    """A sample in an open shard."""

    shard: _Shard
    number: int
    shard_name: str

    def read(self) -> memoryview | None:
        """Headers and contents, with one system call; None if they aren't where they should be. In any thread."""
        return self.shard.read(self.number)


class _Shard:
    """A tar and its index, open. Reads name their offset, so that forked workers may share it."""

    def __init__(self, tar: Path) -> None:
        self._files = [os.open(path, os.O_RDONLY) for path in (tar, tar.with_suffix(ITAR_SUFFIX))]
        self._num_bytes = os.fstat(self._files[0]).st_size

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        for file in self.__dict__.get("_files", ()):
            close(file)

    def read(self, number: int) -> memoryview | None:
        """Headers and contents of a sample; None if the index and the tar don't have all of them."""
        tar, index = self._files
        offsets = os.pread(index, _OFFSETS.size, _OFFSETS.size // 2 * number)
        if len(offsets) != _OFFSETS.size:
            return None
        begin, end = _OFFSETS.unpack(offsets)
        if end > self._num_bytes:
            return None
        block = memoryview(
            np.empty(max(0, end - begin), np.uint8).data
        )  # not a bytearray, which would be filled with zeros first
        done = 0
        while done < len(block):
            count = os.preadv(tar, [block[done:]], begin + done)
            if count <= 0:
                return None
            done += count
        return block


def _members(content: memoryview) -> list[tuple[str, memoryview]] | None:
    """Names and contents of the files in a stretch of a tar; None if it holds anything but plain files."""
    members = []
    position = 0
    while position < len(content):
        header = bytes(content[position : position + _BLOCK])
        # Plain: a file in the format of POSIX without extensions, owned by no matter whom.
        if len(header) < _BLOCK or header[156:157] != b"0" or header[257:262] != b"ustar":
            return None
        size, checksum = _octal(header[124:136]), _octal(header[_CHECKSUM])
        if size is None or sum(header) - sum(header[_CHECKSUM]) + _SPACES != checksum:
            return None
        name, prefix = (field.partition(b"\0")[0] for field in (header[:100], header[345:500]))
        start = position + _BLOCK
        if start + size > len(content) or not name.isascii() or not prefix.isascii():
            return None
        members.append(((prefix + b"/" + name if prefix else name).decode(), content[start : start + size]))
        position = start + -(-size // _BLOCK) * _BLOCK
    return members


def _octal(field: bytes) -> int | None:
    """A number of a tar header; None if it is written in another way, as those beyond 8 GB are."""
    digits = field.partition(b"\0")[0].strip()
    return int(digits, 8) if digits.isdigit() and not digits.strip(b"01234567") else None
