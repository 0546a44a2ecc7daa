"""Files and folders that are either complete under their final name or not there at all, also after a power cut.

Whatever changes an output folder goes through here. A flush that fails is an error and never tried again on the
same file: the system may have dropped what it could not write, and would call the next flush a success.
Names are never followed through symbolic links.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from diffusion_data.errors import UserError

_PARTIAL_SUFFIX = ".partial"
_BYTES_PER_READ = 1 << 20
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)


class HashingFile:
    """A binary file for writing that counts and hashes what passes, so that nothing is read back for it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self.num_bytes = 0
        self.discarded = False

    def discard(self) -> None:
        """What has been written is not wanted: it never gets its final name."""
        self.discarded = True

    def write(self, data: bytes) -> int:
        self._sha256.update(data)
        self.num_bytes += len(data)
        return self._file.write(data)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()


@contextmanager
def durable_file(final: Path, before_rename: Callable[[], object] | None = None) -> Iterator[HashingFile]:
    """Write `final`: beside its name, flushed to disk, renamed, and the folder flushed.

    Leaving by an exception, or after `discard`, removes what was written and leaves `final` as it was. An OSError names
    `final`, which is what the user knows.

    before_rename: called when all is flushed and only the renaming is left, the first moment at which `final` changes
    """
    partial = partial_name(final)
    try:
        with open(partial, "xb") as file:
            hashing = HashingFile(file)
            yield hashing
            if not hashing.discarded:
                file.flush()
                os.fsync(file.fileno())
        if hashing.discarded:
            partial.unlink()
            return
        if before_rename is not None:
            before_rename()
        partial.replace(final)
    except BaseException as error:  # raised again; an interrupt must not leave half a file either
        with suppress(OSError):  # what happened first is what has to be told
            partial.unlink()
        if isinstance(error, OSError) and str(error.filename) == str(partial):
            error.filename = str(final)
            del error.filename2
        raise
    flush_folder(final.parent)


def partial_name(final: Path) -> Path:
    """A name beside `final` that nobody else uses, for what becomes `final`; `remove_partial_files` clears it."""
    return final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}{_PARTIAL_SUFFIX}")


def write_json(final: Path, value: Any) -> None:
    """Write `value` as json, durably."""
    with durable_file(final) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def make_folder(folder: Path) -> None:
    """Make `folder` and those above it, each with its entry in the one above flushed."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    flush_folder(folder.parent)


def remove_file(path: Path) -> None:
    """Remove `path`, if it is there, such that it doesn't come back."""
    if os.path.lexists(path):
        path.unlink(missing_ok=True)
        flush_folder(path.parent)


def remove_folder(folder: Path) -> None:
    """Remove `folder`, if it is there: all of it or, if this is cut short, what is left has another name."""
    if folder.is_symlink() or not folder.is_dir():
        remove_file(folder)
        return
    doomed = partial_name(folder)
    folder.rename(doomed)
    flush_folder(folder.parent)
    shutil.rmtree(doomed)


def remove_partial_files(folder: Path) -> None:
    """Remove what a killed process left in `folder` under temporary names."""
    for partial in folder.glob(f".*{_PARTIAL_SUFFIX}"):
        if partial.is_dir() and not partial.is_symlink():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)


def flush_file(path: Path) -> None:
    """Flush a file that another program wrote."""
    descriptor = os.open(path, os.O_RDWR | _NO_FOLLOW)  # some systems flush only what could be written to
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """A rename is on disk only after its folder is."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows flushes renames by itself and can't open folders
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size_of_plain_file(path: Path) -> int | None:
    """Bytes of `path`; None if it isn't there, or is a link, a folder or a device."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def open_plain_file(path: Path) -> BinaryIO:
    """Open `path` for reading.

    Raises:
        OSError: it isn't there, or is a link, a folder or a device.
    """
    if size_of_plain_file(path) is None and os.path.lexists(path):
        raise OSError(f"{path} is not a plain file")
    return os.fdopen(os.open(path, os.O_RDONLY | _NO_FOLLOW), "rb")


def read_plain_file(path: Path) -> bytes:
    """The content of `path`; raises what `open_plain_file` does."""
    with open_plain_file(path) as file:
        return file.read()


def sha256_of_file(path: Path) -> str:
    """Of the content; raises what `open_plain_file` does."""
    digest = hashlib.sha256()
    with open_plain_file(path) as file:
        while chunk := file.read(_BYTES_PER_READ):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def explained(output_dir: Path) -> Iterator[None]:
    """What the disk refuses becomes an error that says so, and how to go on."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"output_dir: can't work in {output_dir}: {error}; what is finished is kept: make room or mend the disk "
            "and run the same command again"
        ) from error
