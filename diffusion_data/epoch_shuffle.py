"""Samples of one pass over a split -> the same samples in random order, as far as a buffer allows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron.energon.wrappers import ShuffleBufferDataset


class EpochShuffle(ShuffleBufferDataset[Any]):
    """energon's shuffle buffer, which is emptied at the end of a pass; where that began is part of its state."""

    _savable_fields = (*ShuffleBufferDataset._savable_fields, "_emptying")

    def reset_state_own(self) -> None:
        super().reset_state_own()
        self._emptying = False

    def __iter__(self) -> Iterator[Any]:
        self._active_buffer.worker_start()
        if not self._emptying:
            # Also after a resume: the buffer may be full, and then gives before it takes.
            while len(self._active_buffer.buffer) >= self.size:
                yield self._pop()
            for _ in self._active_buffer.append_iter():
                if len(self._active_buffer.buffer) >= self.size:
                    yield self._pop()
            self._emptying = True
        while len(self._active_buffer.buffer) > 0:
            yield self._pop()
        self._emptying = False

    def _pop(self) -> Any:
        return self._active_buffer.pop(self._worker_rng.randbelow(len(self._active_buffer.buffer)))
