"""Numbers by name that the loader's workers add to and the main process reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_WORKERS = 128  # rows of the table; more workers share rows, and may then lose a count now and then


class SharedCounts:
    """Whole numbers in shared memory, which start at 0."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        # One row a worker, so that no two processes add to the same number.
        self._table = torch.zeros(_WORKERS, len(self._names), dtype=torch.int64).share_memory_()

    def add(self, name: str, number: int = 1) -> None:
        self._row()[self._names.index(name)] += number

    def add_each(self, numbers: Sequence[int]) -> None:
        """In the order of the names."""
        self._row()[:] += numbers

    def _row(self) -> np.ndarray:
        """This process's; an array, since an operation of torch's takes ten times as long."""
        worker = torch.utils.data.get_worker_info()
        return self._table.numpy()[0 if worker is None else worker.id % _WORKERS]

    def totals(self) -> dict[str, int]:
        """What all workers have added so far, in the order of the names."""
        return dict(zip(self._names, map(int, self._table.sum(dim=0).tolist()), strict=True))


class PositionCounts:
    """How full the sequences are: positions of the batches made so far, in all workers of this rank."""

    def __init__(self) -> None:
        self._counts = SharedCounts(["used", "padding"])

    def add(self, *, used: int, total: int) -> None:
        self._counts.add_each((used, total - used))

    @property
    def used(self) -> int:
        """Positions that hold a patch."""
        return self._counts.totals()["used"]

    @property
    def padding(self) -> int:
        """Positions that hold none."""
        return self._counts.totals()["padding"]

    @property
    def used_share(self) -> float:
        """used / (used + padding); 1 before the first batch."""
        totals = self._counts.totals()
        everything = totals["used"] + totals["padding"]
        return totals["used"] / everything if everything else 1.0
