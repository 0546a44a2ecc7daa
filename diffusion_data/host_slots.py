"""Who may talk to a host now: so many at a time, over all processes of a user on a node.

A slot is a file that is locked while it is taken, so whoever dies leaves it free. Files stay, so hosts share a fixed
number of names: two that meet in one, which is rare, share their slots too.
"""

from __future__ import annotations

import hashlib
import os
import random
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

_DIGITS = 3  # of a hash: 4096 names
_POLL_SECONDS = (0.005, 0.1)  # between two looks for a free slot: at first, and at last


class NoSlot(Exception):
    """All were taken until the deadline, or there is no place to keep them."""


class HostSlots:
    """At most `number` users of each host at a time; picklable."""

    def __init__(self, number: int) -> None:
        self.number = number

    @contextmanager
    def hold(self, host: str, deadline: float) -> Iterator[None]:
        """Wait for a slot and keep it inside. deadline: of time.monotonic(). Raises NoSlot."""
        try:
            taken = self._take(_folder() / hashlib.sha256(host.encode()).hexdigest()[:_DIGITS], host, deadline)
        except OSError as error:  # a disk that is full, not a row that is bad
            raise NoSlot(f"no file for its connection in {tempfile.gettempdir()}: {error}") from error
        try:
            yield
        finally:
            taken.release()

    def _take(self, path: Path, host: str, deadline: float) -> FileLock:
        wait, longest = _POLL_SECONDS
        while True:
            for slot in range(self.number):
                lock = FileLock(f"{path}.{slot}")
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    continue
                return lock
            left = deadline - time.monotonic()
            if left <= 0:
                raise NoSlot(
                    f"media.max_connections_per_host={self.number} connections to {host} were busy until the end"
                )
            time.sleep(min(wait * random.uniform(0.5, 1.5), left))
            wait = min(2 * wait, longest)


def _folder() -> Path:
    """A folder for all processes of this user, which nobody else may write to."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    for number in range(100):
        folder = Path(tempfile.gettempdir()) / f"diffusion_data-{user}-{number}"
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == user and not found.st_mode & 0o022:
            return folder
    raise PermissionError(f"{folder} and all others like it belong to somebody else")
