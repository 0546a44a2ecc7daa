"""Shared counters -> a bar in a terminal, plain lines in a log file; on rank 0 only."""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from diffusion_data.busy_shares import busy_shares
from diffusion_data.distributed import Ranks
from diffusion_data.errors import UserError

ROWS_DONE, ROWS_REJECTED, SAMPLES_DONE = "rows_done", "rows_rejected", "samples_done"

_SECONDS_BETWEEN_LINES = 15.0  # in a log file
_SECONDS_BETWEEN_LOOKS = 0.5
_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} rows [{elapsed}<{remaining}{postfix}]"


class Progress:
    """Shows how far all ranks are: rows, samples/s, time left, rejects, how busy stages are. A context manager."""

    def __init__(self, ranks: Ranks, total_rows: int, done_before: int, stream: TextIO | None = None) -> None:
        self._ranks = ranks
        self._total_rows = total_rows
        self._done_before = done_before
        self._stream: TextIO | None = stream or sys.stderr  # which is None in a process without one
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)

    def __enter__(self) -> Progress:
        if self._ranks.rank == 0:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _show(self) -> None:
        with suppress(UserError):  # the store is gone: the main thread will notice
            if self._stream is None:
                return
            if self._stream.isatty() and os.get_terminal_size(self._stream.fileno()).lines:  # else tqdm draws nothing
                self._show_bar()
            else:
                self._show_lines()

    def _show_bar(self) -> None:
        started = time.monotonic()
        with tqdm(
            total=self._total_rows,
            initial=self._done_before,
            bar_format=_BAR,
            file=self._stream,
            smoothing=0.1,
            dynamic_ncols=True,
        ) as bar:
            while True:
                stopping = self._stopped.wait(_SECONDS_BETWEEN_LOOKS)
                done, rejected, samples = map(self._ranks.count, (ROWS_DONE, ROWS_REJECTED, SAMPLES_DONE))
                rate = samples / (time.monotonic() - started)
                bar.set_postfix_str(f"{rate:.1f} samples/s, {rejected} rejected{_busy(self._ranks)}", refresh=False)
                if not bar.update(self._done_before + done - bar.n):
                    bar.refresh()
                if stopping:
                    return

    def _show_lines(self) -> None:
        started = time.monotonic()
        while True:
            stopping = self._stopped.wait(_SECONDS_BETWEEN_LINES)
            done, rejected, samples = map(self._ranks.count, (ROWS_DONE, ROWS_REJECTED, SAMPLES_DONE))
            seconds = time.monotonic() - started
            finished = self._done_before + done
            if finished == self._total_rows:
                left = "0:00:00 left" if stopping else "encoding the last"  # rows are counted when they are decoded
            else:
                left = f"{format_seconds((self._total_rows - finished) * seconds / done if done else None)} left"
            print(
                f"{finished}/{self._total_rows} rows, {samples / seconds:.1f} samples/s, {left}, "
                f"{rejected} rejected{_busy(self._ranks)}",
                file=self._stream,
                flush=True,
            )
            if stopping:
                return


def _busy(ranks: Ranks) -> str:
    shares = ", ".join(f"{stage} {share:.0%}" for stage, share in busy_shares(ranks).items())
    return f"; busy: {shares}" if shares else ""


def format_seconds(seconds: float | None) -> str:
    """1:02:03, or "unknown time" for None."""
    if seconds is None:
        return "unknown time"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
