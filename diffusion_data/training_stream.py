"""The datasets of a train split -> one stream of samples, each dataset's passes shuffled by themselves.

energon repeats and blends first and shuffles the endless stream, so that a small dataset's samples come again while
others wait. Here, as far as a buffer allows, each pass is in random order and holds every sample exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from megatron.energon import SavableDataset, WorkerConfig
from megatron.energon.metadataset.loader_interface import DatasetBlendMode, LoadedDataset
from megatron.energon.wrappers import BlendDataset, RepeatDataset
from megatron.energon.wrappers.base import BaseWrapperDataset

from diffusion_data.epoch_shuffle import EpochShuffle
from diffusion_data.errors import UserError
from diffusion_data.late_reading import shuffled as shuffled_passes

Batch = dict[str, Any]
Load = Callable[[LoadedDataset, int], SavableDataset[Any]]


def training_stream(
    datasets: Sequence[LoadedDataset],
    load: Load,
    *,
    blend_mode: DatasetBlendMode,
    shuffle_buffer_size: int | None,
    repeat: bool,
    worker_config: WorkerConfig,
) -> SavableDataset[Any]:
    """load: (dataset, worker rotation offset) -> its samples.

    Raises:
        UserError: one pass is asked of a blend by weight, which has no end.
    """

    size = shuffle_buffer_size or 1

    def shuffled(stream: SavableDataset[Any]) -> SavableDataset[Any]:
        return shuffled_passes(stream, size, worker_config) if size > 1 else stream

    def repeated(stream: SavableDataset[Any], times: float | None = None) -> SavableDataset[Any]:
        return RepeatDataset(stream, repeats=times, worker_config=worker_config)

    by_weight = blend_mode == DatasetBlendMode.DATASET_WEIGHT
    if by_weight and not repeat and len(datasets) > 1:
        raise UserError("repeat=False needs one dataset or a blend_epochized: a blend by weight has no end")
    loaded = [
        load(dataset, offset) for dataset, offset in zip(datasets, _rotations(datasets, worker_config), strict=True)
    ]
    if len(loaded) == 1 and datasets[0].repetitions in (None, 1):
        stream = shuffled(loaded[0])
        return repeated(stream) if repeat else stream
    if by_weight:
        weighted = [
            (repeated(shuffled(stream)), float(dataset.weight or 1))
            for dataset, stream in zip(datasets, loaded, strict=True)
        ]
        return BlendDataset(*weighted, worker_config=worker_config)
    shares = [
        (repeated(stream, dataset.repetitions or 1), len(dataset.dataset) * (dataset.repetitions or 1))
        for dataset, stream in zip(datasets, loaded, strict=True)
    ]
    stream = BlendDataset(*shares, worker_config=worker_config)
    if size > 1:  # the blend's passes, not the datasets', of which there may be parts in one
        stream = EpochShuffle(stream, size, worker_config=worker_config)
    return repeated(stream) if repeat else stream


def _rotations(datasets: Sequence[LoadedDataset], config: WorkerConfig) -> list[int]:
    """Where each dataset's remainder begins among the workers, so that not all of them fall on the same ones."""
    workers = max(1, config.num_workers) * config.world_size
    before = accumulate((len(dataset.dataset) for dataset in datasets[:-1]), initial=0)
    return [total % workers for total in before]


class WholePasses(BaseWrapperDataset[Batch, Batch]):
    """Passes over a dataset of batches, one after another, each `length` batches long.

    A pass that ends before is filled with empty dicts, which `TrainLoader` turns into batches without samples. Every
    worker of every rank gives equally many this way, also one whose samples were all skipped.
    """

    _savable_fields = ("_done", "_ended")

    def __init__(self, dataset: SavableDataset[Batch], length: int, *, worker_config: WorkerConfig) -> None:
        super().__init__(dataset, worker_config=worker_config)
        self._length = length
        self.reset_state_own()

    def reset_state_own(self) -> None:
        self._done = 0
        self._ended = False

    def len_worker(self, worker_idx: int | None = None) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        while True:
            if not self._ended:
                for batch in self.dataset:
                    self._done += 1
                    yield batch
                self._ended = True
            while self._done < self._length:
                self._done += 1
                yield {}
            self._done, self._ended = 0, False

    def config(self) -> dict[str, Any]:
        return {"type": type(self).__qualname__, "length": self._length, "dataset": self.dataset.config()}
