"""Sample number -> its parts as memoryviews into one stretch of a local tar (`open_shards`).

energon reads a tar's members through tarfile and a client for object stores, which copies each part several times and
measures every read of 512 bytes. For local files neither is needed: energon's index tells where a sample begins
and ends, and between are plain headers and contents. Whatever is not plain is left to energon's reader.

Order, state and resume are not touched: they are decided by which sample numbers are asked for.
"""

from __future__ import annotations

import os
import re
import tarfile
import zlib
from bisect import bisect_right
from typing import Any

from megatron.energon.flavors.webdataset.config import skip_meta_re, split_name_re
from megatron.energon.flavors.webdataset.itar import ITarFile
from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader
from megatron.energon.source_info import SourceInfo

from diffusion_data.open_shards import OpenShards, Place

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
_ADLER_PRIME = 65521

_open_shards = OpenShards()  # of all readers of this process: a blend has many datasets


def local_reader(reader: Any) -> LocalTarReader | None:
    """What reads the same shards as energon's `reader`; None if they aren't plain files."""
    if type(reader) is not ShardInfosITarReader or not reader.base_path.is_local() or not hasattr(os, "preadv"):
        return None
    return LocalTarReader(
        reader.base_path,
        reader.shard_infos,
        part_filter=reader.part_filter,
        itar_cache_size=reader.itar_cache_size,
        sample_filter=reader.sample_filter,
    )


class LocalTarReader(ShardInfosITarReader):
    """energon's reader of indexed tars; parts are memoryviews instead of bytes."""

    def __del__(self) -> None:
        _open_shards.close_all_of(id(self))

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
        shard = _open_shards.get((id(self), tar))
        if shard is None:
            shard = _open_shards.open((id(self), tar), self.tar_filepaths[tar].local_path())
        return shard.place(index - self.shard_count_cumsum[shard_number], self.tar_filenames[tar])

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
        if not _adds_up(header, checksum):
            return None
        start = position + _BLOCK
        stop = start + int(size, 8)
        if stop > len(content):
            return None
        members.append(((prefix + b"/" + name if prefix else name).decode(), content[start:stop]))
        position = start + -((start - stop) // _BLOCK) * _BLOCK
    return members


def _adds_up(header: bytes, checksum: bytes) -> bool:
    """True if the header's bytes sum up to what its checksum says, the checksum itself counted as spaces.

    The lower half of zlib's adler32 is 1 and the sum of the bytes, modulo a prime, several times as fast as `sum`.
    """
    total = (zlib.adler32(header) & 0xFFFF) - 1 - sum(checksum) + len(checksum) * _SPACE
    return (total - int(checksum.rstrip(b"\0 "), 8)) % _ADLER_PRIME == 0
