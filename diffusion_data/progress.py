"""Shared counters -> a bar in a terminal, plain lines in a log file; on rank 0 only."""

from __future__ import annotations

import math
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
from diffusion_data.encoded_share import encoded_share
from diffusion_data.errors import UserError

ROWS_DECODED, ROWS_REJECTED, SAMPLES_DECODED = "rows_decoded", "rows_rejected", "samples_decoded"

_SECONDS_BETWEEN_LINES = 15.0  # in a log file
_SECONDS_BETWEEN_LOOKS = 0.5
_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} rows [{elapsed}{postfix}]"


class Progress:
    """Shows how far all ranks are: rows, samples/s, time left, rejects, how busy stages are. A context manager.

    Rows, rate and time are those of encoding: decoding runs ahead by up to some shards, and would promise too much.
    """

    def __init__(self, ranks: Ranks, total_rows: int, done_before: int, stream: TextIO | None = None) -> None:
        self._ranks = ranks
        self._total_rows = total_rows
        self._done_before = done_before
        self._stream: TextIO | None = stream or sys.stderr  # which is None in a process without one
        self._shown_rows = done_before
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
            dynamic_ncols=True,
        ) as bar:
            while True:
                stopping = self._stopped.wait(_SECONDS_BETWEEN_LOOKS)
                bar.n, told = self._told(time.monotonic() - started, stopping)
                bar.set_postfix_str(told)
                if stopping:
                    return

    def _show_lines(self) -> None:
        started = time.monotonic()
        while True:
            stopping = self._stopped.wait(_SECONDS_BETWEEN_LINES)
            rows, told = self._told(time.monotonic() - started, stopping)
            print(f"{rows}/{self._total_rows} rows, {told}", file=self._stream, flush=True)
            if stopping:
                return

    def _told(self, seconds: float, stopping: bool) -> tuple[int, str]:
        """Rows that are done, and the rest of the line."""
        decoded, rejected, samples = map(self._ranks.count, (ROWS_DECODED, ROWS_REJECTED, SAMPLES_DECODED))
        share = encoded_share(self._ranks, samples)
        encoded, todo = decoded * share, self._total_rows - self._done_before
        # The first captions show what they take: the share may fall then, but no row is taken back.
        self._shown_rows = max(self._shown_rows, self._done_before + math.floor(encoded))
        if encoded < todo:
            left = f"{format_seconds((todo - encoded) * seconds / encoded if encoded else None)} left"
        else:
            left = "0:00:00 left" if stopping else "finishing the last"
        rate = samples * share / seconds
        return self._shown_rows, f"{rate:.1f} samples/s, {left}, {rejected} rejected{_busy(self._ranks)}"


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
