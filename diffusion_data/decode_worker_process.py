"""Row -> result through one process, which is spoken to over a pipe of its own.

A row travels as a pickle. A result is a pickle without its arrays, then the arrays' bytes as they lie in
memory: one copy into the pipe, one out of it, and the receiver knows the size before it makes room.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from diffusion_data.process_server import process_context
from diffusion_data.sources import Row

_SECONDS_TO_DIE = 5.0  # of a process that has closed its pipe, before it is killed

# multiprocessing looks after all children whenever it starts one, and of two threads that ask for the same
# exit code at the same time one gets a wrong one.
_PROCESSES = threading.Lock()


class WorkerDied(Exception):
    """The process at the other end of the pipe is gone, or will be in a moment."""


class WorkerTraceback(Exception):
    """Where in the worker an exception was raised: the cause of the one that its caller sees."""


@dataclass(frozen=True)
class Raised:
    """What the decoder raised, in place of a result."""

    error: Exception
    traceback: str


class WorkerProcess:
    """One process that decodes the rows sent to it, in order. Belongs to one thread, except for `kill`."""

    def __init__(self, decoder: Callable[[Row], Any]) -> None:
        context = process_context()
        self._pipe, theirs = context.Pipe()
        # Only the process may hold its end, or its death would not close the pipe.
        with _PROCESSES, theirs:
            self._process = context.Process(target=_work, args=(decoder, theirs), daemon=True)
            self._process.start()

    def wait_until_started(self) -> None:
        """Raises WorkerDied if it never gets to work."""
        try:
            self._pipe.recv_bytes()
        except (EOFError, OSError) as error:
            raise WorkerDied from error

    def has_something(self, timeout_seconds: float | None) -> bool:
        """Wait for a result, or for the process's death."""
        return bool(wait([self._pipe], timeout_seconds))

    def send(self, row: Row) -> None:
        """Returns soon: the process reads rows while it works."""
        try:
            self._pipe.send(row)
        except OSError as error:
            raise WorkerDied from error

    def receive(self, admit: Callable[[int], None]) -> Any:
        """The next result; admit(num_bytes) is called, and may wait, before its arrays are read."""
        try:
            pickled, sizes = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise WorkerDied from error
        admit(sum(sizes))
        arrays = [np.empty(size, np.uint8) for size in sizes]
        try:
            for array in arrays:
                _read_into(self._pipe.fileno(), array.data)
        except (EOFError, OSError) as error:
            raise WorkerDied from error
        return pickle.loads(pickled, buffers=arrays)

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> str:
        """See it gone, and say how it went. A process that still works is killed after a few seconds."""
        if not wait([self._process.sentinel], _SECONDS_TO_DIE):
            self._process.kill()
            wait([self._process.sentinel])
        with _PROCESSES:
            self._process.join()
        self._pipe.close()
        code = self._process.exitcode or 0
        return f"killed by {_signal_name(-code)}" if code < 0 else f"exit code {code}"


def _signal_name(number: int) -> str:
    return next((each.name for each in signal.Signals if each == number), f"signal {number}")


def _read_into(file: int, view: memoryview) -> None:
    while len(view):
        num_read = os.readv(file, [view])
        if not num_read:
            raise EOFError
        view = view[num_read:]


# Below is what the process runs.


def _work(decoder: Callable[[Row], Any], pipe: Connection) -> None:
    """Answer rows until the pipe ends: one thread for the work, deaf to Ctrl-C, which its parent deals with."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.register_at_fork(after_in_child=pipe.close)  # a child of the user's code would keep it open
        import torch

        torch.set_num_threads(1)
        rows: queue.SimpleQueue[Row] = queue.SimpleQueue()
        threading.Thread(target=_receive_rows, args=(pipe, rows), daemon=True).start()
        pipe.send_bytes(b"started")
        while True:
            _send_result(pipe, *_answer(decoder, rows.get()))
    except BaseException:  # noqa: BLE001 - SystemExit too: it ends this process, never the parent
        traceback.print_exc()
    finally:
        os._exit(1)  # at once, whatever threads and exit handlers the user's code has set up


def _receive_rows(pipe: Connection, rows: queue.SimpleQueue[Row]) -> None:
    """Read ahead, so that the parent is never kept; and notice its death, even in the middle of a row."""
    try:
        while True:
            rows.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(0)
    except BaseException:  # noqa: BLE001 - the work must not wait for a thread that is gone
        traceback.print_exc()
        os._exit(1)


def _answer(decoder: Callable[[Row], Any], row: Row) -> tuple[bytes, list[memoryview]]:
    try:
        return _pack(decoder(row))
    except MemoryError:
        raise  # a new process may have enough
    except Exception as error:  # noqa: BLE001 - it is the parent's to raise
        return _pack(Raised(_portable(error), traceback.format_exc()))


def _pack(result: object) -> tuple[bytes, list[memoryview]]:
    arrays: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(result, protocol=5, buffer_callback=arrays.append)
    return pickled, [array.raw() for array in arrays]


def _portable(error: Exception) -> Exception:
    """The error itself, if it survives the journey."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - an exception may be made of anything
        return RuntimeError(f"{type(error).__name__}: {error}")


def _send_result(pipe: Connection, pickled: bytes, arrays: list[memoryview]) -> None:
    pipe.send((pickled, [array.nbytes for array in arrays]))
    for view in arrays:
        while len(view):
            view = view[os.write(pipe.fileno(), view) :]
