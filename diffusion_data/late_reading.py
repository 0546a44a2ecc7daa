"""Order of a split -> shuffled order -> samples: read after the shuffle, and some ahead of their use.

energon reads each sample when its turn comes in the order of the slices, and shuffles what was read: hundreds of
megabytes that have left the processor's caches when they are wanted, and that are read again for each resume. Here the
order goes through the shuffle buffer as sample numbers. What is read last is used first.

`read_ahead` samples are read by as many threads while the ones before them are used. While the system holds the samples
in memory they are taken from there when they are due: handing one over to a thread would take longer. The first that it
doesn't hold brings the threads in, for a while. None of that changes the order of the samples or what is saved of it.
"""

from __future__ import annotations

import tarfile
from collections import deque
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from threading import Thread
from typing import Any

from megatron.energon import SavableDataset, WorkerConfig
from megatron.energon.flavors.webdataset.sample_loader import RawSampleData, WebdatasetSampleLoaderDataset
from megatron.energon.wrappers.base import BaseWrapperDataset
from megatron.energon.wrappers.buffer import SavableSampleBuffer

from diffusion_data.epoch_shuffle import EpochShuffle
from diffusion_data.errors import UserError
from diffusion_data.open_shards import Place
from diffusion_data.sample_reader import LocalTarReader, local_reader

_SAMPLES_FOR_THREADS = 1000  # before memory is tried again, which costs a wait for the disk if it is in vain


def read_late(dataset: SavableDataset[Any]) -> None:
    """Put a `LateReader` above energon's sample loader, wherever `dataset` has one that reads local shards."""
    if not isinstance(dataset, BaseWrapperDataset):
        return
    for inner in dataset.datasets:
        read_late(inner)
    dataset.datasets = tuple(_late(inner) for inner in dataset.datasets)


def _late(dataset: SavableDataset[Any]) -> SavableDataset[Any]:
    if not isinstance(dataset, WebdatasetSampleLoaderDataset) or len(dataset.join_readers) != 1:
        return dataset
    reader = local_reader(dataset.join_readers[0])
    return dataset if reader is None else LateReader(dataset, reader)


def shuffled(dataset: SavableDataset[Any], size: int, worker_config: WorkerConfig) -> SavableDataset[Any]:
    """`dataset`, each pass of it in random order as far as a buffer of `size` allows; before it is read if possible."""
    readers = late_readers(dataset)
    if not readers:
        return EpochShuffle(dataset, size, worker_config=worker_config)
    for reader in readers:
        reader.shuffle(size)
    return dataset


def set_read_ahead(dataset: SavableDataset[Any], count: int) -> None:
    """See `LateReader.read_ahead`; for all in `dataset`."""
    for reader in late_readers(dataset):
        reader.read_ahead = count


def late_readers(dataset: SavableDataset[Any]) -> list[LateReader]:
    """Those in `dataset`, a tree of energon's wrappers."""
    if isinstance(dataset, LateReader):
        return [dataset]
    return [reader for inner in getattr(dataset, "datasets", ()) for reader in late_readers(inner)]


class LateReader(BaseWrapperDataset[RawSampleData, RawSampleData]):
    """Takes the place of energon's sample loader, which is left with telling the order."""

    read_ahead = 0
    """Samples to read before they are asked for. May differ from one run to the next."""

    _savable_fields = ("_coming", "_emptying")

    def __init__(self, loader: WebdatasetSampleLoaderDataset, reader: LocalTarReader) -> None:
        super().__init__(loader, worker_config=loader.worker_config)
        loader.join_readers = [_Unread()]
        self.reader = reader
        self.reset_state_own()

    def shuffle(self, size: int) -> None:
        self.datasets = (EpochShuffle(self.dataset, size, worker_config=self.worker_config),)
        self.reset_state_own()

    def reset_state_own(self) -> None:
        self._coming = SavableSampleBuffer(self.dataset, worker_config=self.worker_config)
        self._emptying = False

    def len_worker(self, worker_idx: int | None = None) -> int:
        return self.dataset.len_worker(worker_idx)

    def __iter__(self) -> Iterator[RawSampleData]:
        self._coming.worker_start()
        threads = ReadThreads(max(1, self.read_ahead))
        try:
            yield from filter(_is_wanted, self._read_all(threads))
        finally:
            threads.close()

    def _read_all(self, threads: ReadThreads) -> Iterator[RawSampleData]:
        """In order. `_coming` holds the samples that threads read, `places` where they stand."""
        order = iter(()) if self._emptying else iter(self.dataset)
        places = deque[Place | None]()
        for_threads = 0  # so many samples more are left to them

        def leave_to_threads(sample: RawSampleData) -> None:
            place = self.reader.place_of(_number(sample))
            places.append(place)
            threads.begin(_nothing if place is None else place.read)

        for sample in self._coming:  # none but after a resume
            leave_to_threads(sample)
        while True:
            while for_threads and not self._emptying and len(places) < self.read_ahead:
                following = next(order, None)
                if following is None:
                    self._emptying = True
                else:
                    for_threads -= 1
                    leave_to_threads(self._coming.append(following))
            if places:
                block = threads.next()
                yield self._complete(self._coming.pop(0), places.popleft(), block)
                continue
            following = next(order, None)
            if following is None:
                break
            place = self.reader.place_of(_number(following))
            block = None if place is None else place.read_from_memory()
            if block is None and place is not None:
                block = place.read()
                for_threads = _SAMPLES_FOR_THREADS
            yield self._complete(following, place, block)
        self._emptying = False

    def _complete(self, sample: RawSampleData, place: Place | None, block: memoryview | None) -> RawSampleData:
        number = _number(sample)
        try:
            sample.data = (self.reader.sample_of(number, place, block),)
        except (ValueError, tarfile.TarError) as error:
            raise UserError(
                f"{self.reader.base_path}: sample number {number} of the split can't be read: {error}; "
                "scripts/verify_dataset.py finds what is damaged"
            ) from error
        return sample

    def restore_sample(self, restore_key: Any) -> RawSampleData:
        sample = self.dataset.restore_sample(restore_key)
        place = self.reader.place_of(_number(sample))
        return self._complete(sample, place, None if place is None else place.read())

    def config(self) -> dict[str, Any]:
        return self.dataset.config()


class _Unread:
    """Stands where energon's sample loader has its reader: a sample is its number yet."""

    def __getitem__(self, index: int) -> int:
        return index


class ReadThreads:
    """Calls functions in threads, by turns; their results are taken in the order in which they were begun.

    A queue to and from each thread costs the caller a few microseconds a call, a pool's futures as much as reading.
    The threads start with the first call.
    """

    def __init__(self, count: int) -> None:
        self._lanes = [(SimpleQueue[Any](), SimpleQueue[Any]()) for _ in range(count)]
        self._begun = self._taken = 0

    def begin(self, function: Callable[[], Any]) -> None:
        if self._begun == 0:
            for number, lane in enumerate(self._lanes):
                Thread(target=_call_in_turn, args=lane, name=f"read_ahead_{number}", daemon=True).start()
        functions, _ = self._lanes[self._begun % len(self._lanes)]
        self._begun += 1
        functions.put(function)

    def next(self) -> Any:
        """What the next function returned, or raises what it raised."""
        _, results = self._lanes[self._taken % len(self._lanes)]
        self._taken += 1
        result, error = results.get()
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        for functions, _ in self._lanes:
            functions.put(None)


def _call_in_turn(functions: SimpleQueue[Any], results: SimpleQueue[Any]) -> None:
    for function in iter(functions.get, None):
        results.put(_outcome(function))


def _outcome(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return function(), None
    except Exception as error:  # noqa: BLE001 - raised again where the result is taken
        return None, error


def _nothing() -> None:
    """Read where there is no sample."""


def _number(sample: RawSampleData) -> int:
    """The sample's number in the split, as `_Unread` left it."""
    (number,) = sample.data
    assert isinstance(number, int)
    return number


def _is_wanted(sample: RawSampleData) -> bool:
    """False for those that the dataset's metadata excludes."""
    return sample.data[0] is not None
