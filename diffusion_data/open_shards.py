"""Local tars, open with their indexes: a sample's bytes with one system call, or none where the system has them.

What the system holds in memory, as it does what was written or read lately, is mapped, which saves a copy. Only that:
a page that has to come from a disk stops the whole interpreter, and a failure to read it ends the process. So does
cutting off a shard that is mapped; one that is replaced by renaming, as everything here is, stays as it was for those
who have it open.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.energon.flavors.webdataset.itar import ITAR_SUFFIX

MOST_OPEN = 64  # more than energon reads from at a time: a shuffle buffer reaches back
_OFFSETS = struct.Struct("<2Q")  # where a sample begins and where the next one does
_BYTES_A_PROBE = 1 << 20
_NOWAIT: int | None = getattr(os, "RWF_NOWAIT", None)  # Linux only


@dataclass(frozen=True, slots=True)
class Place:
    """A sample in an open shard, from byte `begin` to byte `end` of it; both are -1 where the index has none."""

    shard: Shard
    shard_name: str
    begin: int
    end: int

    def read(self) -> memoryview | None:
        """Headers and contents, with one system call; None if they aren't where they should be. In any thread."""
        return self.shard.read(self.begin, self.end)

    def read_from_memory(self) -> memoryview | None:
        """What `read` gives; None if that would have to wait for a disk or network."""
        return self.shard.read_from_memory(self.begin, self.end)


class Shard:
    """A tar and its index, open. Reads name their offset, so that forked workers may share it."""

    def __init__(self, tar: Path) -> None:
        self._tar = os.open(tar, os.O_RDONLY)
        self._index = os.open(tar.with_suffix(ITAR_SUFFIX), os.O_RDONLY)
        self._num_bytes = os.fstat(self._tar).st_size
        self._mapped: memoryview | None = None

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        for name in ("_tar", "_index"):
            if name in self.__dict__:  # not if opening failed
                close(self.__dict__[name])

    def place(self, number: int, shard_name: str) -> Place:
        """Of the sample of that number in this shard."""
        offsets = os.pread(self._index, _OFFSETS.size, _OFFSETS.size // 2 * number)
        begin, end = _OFFSETS.unpack(offsets) if len(offsets) == _OFFSETS.size else (-1, -1)
        return Place(self, shard_name, *((begin, end) if begin <= end <= self._num_bytes else (-1, -1)))

    def read(self, begin: int, end: int) -> memoryview | None:
        """The bytes [begin, end); None if the tar doesn't have all of them."""
        if begin < 0:
            return None
        # Not a bytearray, which would be filled with zeros first.
        block, done = memoryview(np.empty(end - begin, np.uint8).data), 0
        while done < len(block):
            count = os.preadv(self._tar, [block[done:]], begin + done)
            if count <= 0:
                return None
            done += count
        return block

    def read_from_memory(self, begin: int, end: int) -> memoryview | None:
        """`read` without a copy, if the system holds these bytes in memory; they mustn't be written to."""
        probes = (*range(begin, end, _BYTES_A_PROBE), end - 1)
        if begin < 0 or not all(map(self._is_in_memory, probes)):
            return None
        if self._mapped is None:
            try:
                # Private, so that no file changes if they are; writable, since torch has nothing to do with what isn't.
                mapped = mmap.mmap(self._tar, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            except OSError:  # this file system has no mappings, or the system no memory to promise
                return None
            self._mapped = memoryview(mapped)
        return self._mapped[begin:end]

    def _is_in_memory(self, position: int) -> bool:
        """Of one byte, and mostly of what is around it: pages come and go together."""
        if _NOWAIT is None:
            return False
        try:
            return os.preadv(self._tar, [bytearray(1)], position, _NOWAIT) == 1
        except OSError:  # it would have to wait, or this file system can't tell; an error comes again with `read`
            return False


class OpenShards:
    """Those that were used last, by (reader, number)."""

    def __init__(self) -> None:
        self._shards: OrderedDict[tuple[int, int], Shard] = OrderedDict()

    def get(self, key: tuple[int, int]) -> Shard | None:
        shard = self._shards.get(key)
        if shard is not None:
            self._shards.move_to_end(key)
        return shard

    def open(self, key: tuple[int, int], tar: Path) -> Shard:
        shard = self._shards[key] = Shard(tar)
        if len(self._shards) > MOST_OPEN:
            self._shards.popitem(last=False)
        return shard

    def close_all_of(self, reader: int) -> None:
        for key in [key for key in self._shards if key[0] == reader]:
            del self._shards[key]
