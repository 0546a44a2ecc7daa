"""How much of what was decoded is encoded too, from counters that each rank adds to when a batch is done.

A sample's frames and its caption are encoded apart, captions when all of the shard is decoded. So each counts with the
time that it takes: as many seconds a sample as those took that are done.
"""

from __future__ import annotations

import threading
import time
from collections import Counter

from diffusion_data.distributed import Ranks

_KINDS = ("frames", "tokens")
_SECONDS_BETWEEN_COUNTS = 0.5


class EncodedCounts:
    """One rank's part of it; any thread may add."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._lock = threading.Lock()
        self._untold: Counter[str] = Counter()  # to the others
        self._told_at = time.monotonic()

    def add(self, kind: str, num_samples: int, seconds: float) -> None:
        """A batch is done: the frames, or the tokens, of so many samples, which took the device so long."""
        assert kind in _KINDS
        with self._lock:
            self._untold[f"encoded/{kind}"] += num_samples
            self._untold[f"encoded_us/{kind}"] += max(1, round(1e6 * seconds))
            is_due = time.monotonic() - self._told_at > _SECONDS_BETWEEN_COUNTS
        if is_due:
            self.tell()

    def tell(self) -> None:
        """The others, of what they don't know yet."""
        with self._lock:
            untold, self._untold = self._untold, Counter()
            self._told_at = time.monotonic()
        for counter, amount in untold.items():
            self._ranks.count(counter, amount)


def encoded_share(ranks: Ranks, samples_decoded: int) -> float:
    """0 to 1, of the work on all ranks' decoded samples; 1 if there is none.

    Until the first captions are done nobody knows what they take, and only frames count.
    """
    done = needed = 0.0
    for kind in _KINDS:
        samples, microseconds = ranks.count(f"encoded/{kind}"), ranks.count(f"encoded_us/{kind}")
        if samples:
            done += microseconds
            needed += microseconds * max(1.0, samples_decoded / samples)  # ranks don't count all at the same moment
    if needed:
        return done / needed
    return 0.0 if samples_decoded else 1.0
