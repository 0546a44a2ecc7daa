"""How busy all ranks' stages are, from counters that each rank adds to when it has finished a shard."""

from __future__ import annotations

import time
from collections.abc import Mapping

from diffusion_data.distributed import Ranks

_STAGES = {"decoding": ("decode",), "encoders": ("tokenizer", "text_tokens", "text_encoder"), "writing": ("write",)}


class BusyShares:
    """One rank's part of them.

    lanes: how many of each can be at work at a time on this rank: decode workers, encoder threads or the GPU, writers
    """

    def __init__(self, ranks: Ranks, lanes: Mapping[str, int]) -> None:
        assert lanes.keys() == _STAGES.keys()
        self._ranks = ranks
        self._lanes = lanes
        self._since = time.monotonic()

    def add(self, stage_seconds: Mapping[str, float]) -> None:
        """A shard is finished, which took the time since the last one was."""
        now = time.monotonic()
        passed, self._since = now - self._since, now
        for name, stages in _STAGES.items():
            busy = sum(stage_seconds.get(stage, 0.0) for stage in stages)
            self._ranks.count(f"busy_ms/{name}", round(1000 * busy))
            self._ranks.count(f"passed_ms/{name}", round(1000 * passed * self._lanes[name]))


def busy_shares(ranks: Ranks) -> dict[str, float]:
    """Stage -> 0 to 1, over all shards that this start has finished; empty before the first."""
    passed = {name: ranks.count(f"passed_ms/{name}") for name in _STAGES}
    return {
        name: min(1.0, ranks.count(f"busy_ms/{name}") / milliseconds)
        for name, milliseconds in passed.items()
        if milliseconds
    }
