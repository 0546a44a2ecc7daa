"""Sample number -> its parts as memoryviews into one buffer: local tars read with one system call a sample.

energon reads a tar's members through tarfile and a client for object stores, which copies each part several times and
measures every read of 512 bytes. For local files neither is needed: energon's index tells where a sample begins
and ends, and between are plain headers and contents. Whatever is not plain is left to energon's reader.

Order, state and resume are not touched: they are decided by which sample numbers are asked for.
"""

from __future__ import annotations

import os
import re
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
_SPACE = ord(" ")  # what each byte of the checksum counts as
# Plain: a file in the format of POSIX without extensions, with names in ASCII, owned by no matter whom. Anything else,
# as a size beyond 8 GB, which isn't written in octal, is not matched.
_PLAIN_HEADER = re.compile(
    rb"(?=([\x01-\x7f]{100}|[\x01-\x7f]{1,99}(?=\0))).{100}"  # name
    rb".{24}([0-7]{11})[\0 ].{12}"  # mode, uid, gid; size; mtime
    rb"([0-7]{6}[\0 ]{2}|[0-7]{7}[\0 ])0.{100}ustar.{3}.{80}"  # checksum; type; linkname; magic; owner, device
    rb"(?=([\x01-\x7f]{155}|[\x01-\x7f]{0,154}(?=\0))).{155}.{12}",  # prefix
    re.DOTALL,
)
_OFFSETS = struct.Struct("<2Q")  # where a sample begins and where the next one does
_NOWAIT: int | None = getattr(os, "RWF_NOWAIT", None)  # Linux only


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

    def is_cached(self) -> bool:
        """True if `read` need not wait for a disk or network."""
        return self.shard.is_cached(self.number)


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

    def is_cached(self, number: int) -> bool:
        """True if the system holds the sample's first and last byte in memory, and so most likely all between."""
        if _NOWAIT is None:
            return False
        tar, index = self._files
        offsets, byte = bytearray(_OFFSETS.size), bytearray(1)
        try:
            if os.preadv(index, [offsets], _OFFSETS.size // 2 * number, _NOWAIT) != _OFFSETS.size:
                return False
            begin, end = _OFFSETS.unpack(offsets)
            return all(os.preadv(tar, [byte], place, _NOWAIT) == 1 for place in (begin, end - 1))
        except OSError:  # it would have to wait, or this file system can't tell; an error comes again with `read`
            return False


def _members(content: memoryview) -> list[tuple[str, memoryview]] | None:
    """Names and contents of the files in a stretch of a tar; None if it holds anything but plain files."""
    members = []
    position = 0
    while position < len(content):
        header = bytes(content[position : position + _BLOCK])
        matched = _PLAIN_HEADER.fullmatch(header)
        if matched is None:
            return None
        name, size, checksum, prefix = matched.groups()
        if sum(header) - sum(checksum) + len(checksum) * _SPACE != int(checksum.rstrip(b"\0 "), 8):
            return None
        start = position + _BLOCK
        stop = start + int(size, 8)
        if stop > len(content):
            return None
        members.append(((prefix + b"/" + name if prefix else name).decode(), content[start:stop]))
        position = start + -((start - stop) // _BLOCK) * _BLOCK
    return members
