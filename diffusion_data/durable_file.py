"""Files that are either complete under their final name or not there at all, also after a power cut."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

_PARTIAL_SUFFIX = ".partial"


class HashingFile:
    """A binary file for writing that counts and hashes what passes, so that nothing is read back for it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes) -> int:
        self._sha256.update(data)
        self.num_bytes += len(data)
        return self._file.write(data)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()


@contextmanager
def durable_file(final: Path) -> Iterator[HashingFile]:
    """Write `final`: beside its name, flushed to disk, renamed, and the folder flushed.

    Leaving by an exception removes what was written and leaves `final` as it was.
    """
    partial = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}{_PARTIAL_SUFFIX}")
    try:
        with partial.open("xb") as file:
            yield HashingFile(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(final)
    except BaseException:  # raised again; an interrupt must not leave half a file either
        partial.unlink(missing_ok=True)
        raise
    _flush_folder(final.parent)


def write_json(final: Path, value: Any) -> None:
    """Write `value` as json, durably."""
    with durable_file(final) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def remove_partial_files(folder: Path) -> None:
    """Remove what a killed process left in `folder` under temporary names."""
    for partial in folder.glob(f".*{_PARTIAL_SUFFIX}"):
        partial.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """A rename is on disk only after its folder is."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows flushes renames by itself and can't open folders
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
