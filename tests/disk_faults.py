"""What a run asks of its disk, one operation after the other: counted, made to fail, or kept to be played back.

Names (open to write, rename, remove, make or remove a folder, link) are seen by Python's audit hook, which no code
can pass by; data by `HashingFile.write`, `os.write` and `os.fsync`. What energon's indexer does in its own process is
not seen, until its files are flushed. The heartbeat in a lock file, whose time is chance, is left alone.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from diffusion_data import durable_file


@dataclass(frozen=True)
class Operation:
    """One operation, before it happens. data: what is written, or what a flushed file holds."""

    kind: str
    path: Path
    target: Path | None = None
    data: bytes = b""


Handler = Callable[[int, Operation], None]
_handler: list[Callable[[Operation], None]] = []  # the audit hook stays for the process's life


@contextmanager
def watched(root: Path, handler: Handler) -> Iterator[None]:
    """Call `handler` before each operation below `root`, with its number; what it raises is what the run gets."""
    lock = threading.Lock()
    count = 0

    def handle(operation: Operation) -> None:
        nonlocal count
        is_heartbeat = operation.path.suffix == ".lock" and operation.kind in ("write", "flush")
        if root not in (operation.path, *operation.path.parents) or is_heartbeat:
            return
        with lock:
            number, count = count, count + 1
            handler(number, operation)

    _install_hook()
    with pytest.MonkeyPatch.context() as patch:
        _patch_data(patch, handle)
        _handler.append(handle)
        try:
            yield
        finally:
            _handler.clear()


def _install_hook() -> None:
    if not hasattr(sys, "_disk_faults_hook"):
        sys._disk_faults_hook = True  # type: ignore[attr-defined]
        sys.addaudithook(_hook)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _handler:
        return
    operation = None
    match event, arguments:
        case "open", (path, _, flags) if isinstance(path, (str, os.PathLike)) and flags & (os.O_WRONLY | os.O_CREAT):
            operation = Operation("create", _absolute(path))
        case "os.rename", (source, target, source_folder, target_folder):
            operation = Operation("rename", _absolute(source, source_folder), _absolute(target, target_folder))
        case "os.remove", (path, folder):
            operation = Operation("remove", _absolute(path, folder))
        case "os.mkdir", (path, _, folder):
            operation = Operation("make folder", _absolute(path, folder))
        case "os.rmdir", (path, folder):
            operation = Operation("remove folder", _absolute(path, folder))
        case "os.symlink", (target, path, folder):
            operation = Operation("link", _absolute(path, folder), Path(os.fsdecode(target)))
        case (("os.link" | "os.truncate" | "os.chmod" | "os.chown" | "os.utime"), (path, *_)):
            operation = Operation(event, _absolute(path))  # none that a run is known to need
    if operation is not None:
        _handler[0](operation)


def _absolute(path: Any, folder: int = -1) -> Path:
    return (_opened(folder) if folder != -1 else Path.cwd()) / os.fsdecode(path)


def _opened(descriptor: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{descriptor}"))


def _patch_data(patch: pytest.MonkeyPatch, handle: Callable[[Operation], None]) -> None:
    fsync, write, hashing_write = os.fsync, os.write, durable_file.HashingFile.write

    def watched_fsync(descriptor: int) -> None:
        path = _opened(descriptor)
        folder = path.is_dir()
        handle(Operation("flush folder" if folder else "flush", path, data=b"" if folder else path.read_bytes()))
        fsync(descriptor)

    def watched_write(descriptor: int, data: bytes) -> int:
        handle(Operation("write", _opened(descriptor), data=bytes(data)))
        return write(descriptor, data)

    def watched_hashing_write(self: durable_file.HashingFile, data: bytes) -> int:
        handle(Operation("write", _opened(self._file.fileno()), data=bytes(data)))
        return hashing_write(self, data)

    patch.setattr(os, "fsync", watched_fsync)
    patch.setattr(os, "write", watched_write)
    patch.setattr(durable_file.HashingFile, "write", watched_hashing_write)


def kill_at(number: int) -> Handler:
    def handler(now: int, operation: Operation) -> None:
        if now == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return handler


def fail_at(number: int) -> Handler:
    """One input/output error."""

    def handler(now: int, operation: Operation) -> None:
        if now == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(operation.path))

    return handler


def full_from(number: int) -> Handler:
    """No space and no inodes from then on; what frees some still works."""

    def handler(now: int, operation: Operation) -> None:
        if now >= number and operation.kind in ("create", "write", "make folder", "link", "flush"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(operation.path))

    return handler


def noted(handler: Handler, failed: list[Operation]) -> Handler:
    """`handler`, with the operations that it lets fail listed."""

    def noting(now: int, operation: Operation) -> None:
        try:
            handler(now, operation)
        except OSError:
            failed.append(operation)
            raise

    return noting


@dataclass
class _Node:
    """A file, folder or link. What a power cut leaves of it: `flushed` data, `flushed_names` of a folder."""

    link: Path | None = None
    written: bytes = b""
    flushed: bytes = b""
    names: dict[str, _Node] = field(default_factory=dict)
    flushed_names: dict[str, _Node] = field(default_factory=dict)
    is_folder: bool = False


class DiskModel:
    """Operations below `root` -> what a disk holds after a power cut: all that was flushed, and maybe more.

    What was there before the first operation is on disk. POSIX promises no more than: a file's data once it was
    flushed, a name once its folder was.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._top = _read(root)

    def apply(self, operation: Operation) -> None:
        path = operation.path
        match operation.kind:
            case "create" | "link":
                self._folder(path.parent).names.setdefault(path.name, _Node(link=operation.target))
            case "make folder":
                self._folder(path.parent).names[path.name] = _Node(is_folder=True)
            case "write":
                self._folder(path.parent).names[path.name].written += operation.data
            case "flush":  # of files that energon's indexer made, the first that is heard
                file = self._folder(path.parent).names.setdefault(path.name, _Node())
                file.written = file.flushed = operation.data
            case "flush folder":
                folder = self._folder(path)
                folder.flushed_names = dict(folder.names)
            case "rename":
                assert operation.target is not None
                moved = self._folder(path.parent).names.pop(path.name)
                self._folder(operation.target.parent).names[operation.target.name] = moved
            case "remove" | "remove folder":
                self._folder(path.parent).names.pop(path.name, None)

    def materialise(self, root: Path, *, names: str, data: str, seed: int = 0) -> None:
        """Write to `root` what is left.

        names: "flushed" only, or "all": the file system has written folders on its own; or, by `seed`, of "some"
        data: of files that were not flushed: "gone", or "torn" to half
        """
        chance = random.Random(seed)

        def write(node: _Node, path: Path) -> None:
            if node.link is not None:
                path.symlink_to(node.link)
            elif node.is_folder:
                path.mkdir()
                flushed = names == "flushed" or (names == "some" and chance.random() < 0.5)
                for name, each in (node.flushed_names if flushed else node.names).items():
                    write(each, path / name)
            else:
                torn = node.written[: len(node.written) // 2] if data == "torn" else b""
                path.write_bytes(node.flushed or torn)

        write(self._top, root)

    def _folder(self, path: Path) -> _Node:
        node = self._top
        for name in path.relative_to(self._root).parts:  # the indexer's folders are made when they are first heard of
            node = node.names.setdefault(name, _Node(is_folder=True))
        return node


def _read(path: Path) -> _Node:
    if path.is_symlink():
        return _Node(link=path.readlink())
    if path.is_dir():
        names = {each.name: _read(each) for each in path.iterdir()}
        return _Node(is_folder=True, names=names, flushed_names=dict(names))
    return _Node(written=path.read_bytes(), flushed=path.read_bytes())
