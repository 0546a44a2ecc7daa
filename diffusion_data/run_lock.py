"""One run at a time on an output folder: each rank holds a locked file in `<output>/run/locks/` while it lives.

Ranks outlive a torchrun that is killed, so it is ranks that are locked out, not starts. Rank 0 of a new start looks
at the files of other starts before any of its ranks may write:

- the lock is held: its rank lives, the start is refused
- it is free, and of this machine since it was last booted: its rank is gone, the file is cleared
- it is free, but of another machine, or the file system knows no locks: not every shared file system shows a lock to
  other machines, so the file is watched for longer than the period of its rank's heartbeat, a number that it counts
  up. Looks are counted, not seconds: clocks jump, and differ between machines.

Two starts at the same moment: each shows its file first and looks for others then, so at most one goes on.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import random
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from diffusion_data.distributed import Ranks
from diffusion_data.durable_file import explained, flush_folder, make_folder, partial_name, remove_partial_files
from diffusion_data.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: heartbeats only
    fcntl = None  # type: ignore[assignment]

_SECONDS_BETWEEN_BEATS = 10.0
_SECONDS_BETWEEN_LOOKS = 1.0
_LOOKS = 30  # without a beat: then its rank is taken for dead
_SECONDS_OF_PATIENCE = 5.0  # with ranks that are about to end, after their torchrun was
_BEAT_DIGITS = 20
_SUFFIX = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


def lock_folder(output_dir: Path) -> Path:
    return output_dir / "run" / "locks"


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lock, as the file tells.

    boot: identifies the machine's running kernel, which is what locks are sure to be shared within
    since: UTC, for people; nothing is decided by it
    """

    host: str
    boot: str
    pid: int
    rank: int
    since: str

    @classmethod
    def me(cls, rank: int) -> Holder:
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        return cls(host=platform.node(), boot=_boot(), pid=os.getpid(), rank=rank, since=since)

    def __str__(self) -> str:
        return f"rank {self.rank}, process {self.pid} on {self.host}, since {self.since}"


class RunLock:
    """This rank's lock; a thread keeps its heart beating."""

    def __init__(self, folder: Path, start: str, rank: int) -> None:
        self._path = folder / f"{start}.{rank}{_SUFFIX}"
        self._ended = threading.Event()
        partial = partial_name(self._path)
        self._file = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _try_to_lock(self._file, shared=False)
            self._beat(0)
            os.write(self._file, json.dumps(asdict(Holder.me(rank))).encode())
            os.fsync(self._file)
            partial.rename(self._path)  # seen only now that it is locked
            flush_folder(folder)
        except BaseException:  # raised again; a lock that nobody holds must not stay behind
            os.close(self._file)
            for path in (partial, self._path):
                path.unlink(missing_ok=True)
            raise
        self._thread = threading.Thread(target=self._keep_beating, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises UserError if another start has taken this rank for dead and cleared its file."""
        try:
            os.stat(self._path)
        except FileNotFoundError as error:
            raise UserError(
                f"output_dir: another run has taken over while this process was not heard of ({self._path} is gone); "
                "it ends here"
            ) from error

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(OSError):  # the next start clears it
            self._path.unlink(missing_ok=True)
        os.close(self._file)

    def _keep_beating(self) -> None:
        number = 0
        while not self._ended.wait(_SECONDS_BETWEEN_BEATS):
            number += 1
            with suppress(OSError):  # a disk that is full or gone is found out by whoever writes what counts
                self._beat(number)
                os.fsync(self._file)

    def _beat(self, number: int) -> None:
        line = f"{number:0{_BEAT_DIGITS}}\n".encode()
        os.lseek(self._file, 0, os.SEEK_SET)
        os.write(self._file, line)


@contextmanager
def run_lock(output_dir: Path, ranks: Ranks) -> Iterator[RunLock]:
    """Hold the output folder for this start. Entered by all its ranks before any of them writes.

    Raises:
        UserError: a rank of another start works there.
    """
    folder = lock_folder(output_dir)
    with explained(output_dir):
        if ranks.rank == 0:
            start = uuid.uuid4().hex
            _refuse_if_in_use(output_dir, start, _SECONDS_OF_PATIENCE)
            make_folder(folder)
            lock = RunLock(folder, start, 0)
        else:
            start = ranks.receive("lock")
            lock = RunLock(folder, start, ranks.rank)
            ranks.publish(f"locked/{ranks.rank}", True)
    try:
        if ranks.rank == 0:
            # Whoever came at the same moment sees us as we see them: by chance one is more patient and stays.
            with explained(output_dir):
                _refuse_if_in_use(output_dir, start, _SECONDS_OF_PATIENCE * random.random())
                remove_partial_files(folder)
            ranks.publish("lock", start)
            for rank in range(1, ranks.world_size):
                ranks.receive(f"locked/{rank}", publisher=rank)
        yield lock
    finally:
        lock.release()


def _refuse_if_in_use(output_dir: Path, start: str, patience_seconds: float) -> None:
    """Return when no rank of another start is alive, and their files are cleared.

    Raises:
        UserError: one is; it says which.
    """
    deadline = time.monotonic() + patience_seconds
    while True:
        others = _others(lock_folder(output_dir), start)
        alive = [other for other in others if other.is_locked]
        if not alive:
            alive = _that_beat([other for other in others if not other.is_surely_dead])
        if not alive:
            break
        if time.monotonic() > deadline:
            more = f"; and {len(alive) - 1} more" if len(alive) > 1 else ""
            holder = alive[0].holder
            raise UserError(
                f"output_dir: a run is at work in {output_dir} ({holder or alive[0].path}{more}); wait for its end, or "
                f"end it{f' (on {holder.host}: kill {holder.pid})' if holder else ''}, and run the same command again"
            )
        time.sleep(min(_SECONDS_BETWEEN_LOOKS, patience_seconds / 10))
    for other in others:
        other.path.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class _Other:
    """The lock file of a rank of another start, at one look. holder: None if the file is damaged."""

    path: Path
    is_locked: bool
    is_surely_dead: bool
    beat: bytes
    holder: Holder | None


def _others(folder: Path, start: str) -> list[_Other]:
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    looked_at = [_look_at(folder / name) for name in names if name.endswith(_SUFFIX) and not name.startswith(start)]
    return [other for other in looked_at if other is not None]


def _look_at(path: Path) -> _Other | None:
    """None if it has just been released."""
    try:
        file = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(
            f"output_dir: {path} can't be looked at ({error}); remove it if it is none of a run's"
        ) from error
    try:
        beat, _, rest = os.read(file, 1 << 16).partition(b"\n")
        try:
            holder = Holder(**json.loads(rest))
        except (ValueError, TypeError):
            holder = None
        locked = _try_to_lock(file, shared=True)  # shared, so that those who look don't take each other for ranks
    finally:
        os.close(file)
    return _Other(
        path=path,
        is_locked=locked is False,
        is_surely_dead=locked is True and holder is not None and holder.boot == _boot(),
        beat=beat,
        holder=holder,
    )


def _that_beat(suspects: list[_Other]) -> list[_Other]:
    """Those whose number changes while they are watched."""
    beats = {suspect.path: suspect.beat for suspect in suspects}
    if suspects:
        print(
            f"{suspects[0].path.parent}: waiting {_LOOKS * _SECONDS_BETWEEN_LOOKS:.0f} s for a sign of life of "
            f"{len(suspects)} ranks of an earlier run, first {suspects[0].holder}",
            file=sys.stderr,
            flush=True,
        )
    for _ in range(_LOOKS if suspects else 0):
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        now = [_look_at(path) for path in beats]
        if alive := [
            other for other in now if other is not None and (other.is_locked or other.beat != beats[other.path])
        ]:
            return alive
    return []


def _try_to_lock(file: int, shared: bool) -> bool | None:
    """Lock an open file: whether it could be had; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()
