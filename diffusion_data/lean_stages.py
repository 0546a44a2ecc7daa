"""energon's maps and batches with less around each call, which cost as much as reading a picture's sample.

They keep energon's state, restoring and handling of errors; what they leave out are its context managers, and what
functions need that give several samples for one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron.energon import SavableDataset, WorkerConfig
from megatron.energon.errors import ErrorContext
from megatron.energon.flavors.base_dataset import add_sample_restore_key, set_sample_restore_key
from megatron.energon.wrappers import BatchDataset, MapDataset
from megatron.energon.wrappers.base import SampleIndex, get_sample_restore_key


def lean(dataset: SavableDataset[Any]) -> SavableDataset[Any]:
    """`dataset`, if it is a stage that can be lean, and the maps right below it, which become one with it.

    Not what is farther below: wrappers with buffers know their dataset in more than one place.
    """
    if type(dataset) is MapDataset and dataset.stateless_map_fn and not inspect.isgeneratorfunction(dataset.map_fn):
        return _lean_map(dataset)
    if type(dataset) is BatchDataset and dataset.batcher_stateless and not inspect.isgeneratorfunction(dataset.batcher):
        return LeanBatch(
            dataset.dataset,
            dataset.batch_size,
            dataset.batcher,
            batcher_stateless=True,
            batcher_config=dataset.batcher_config,
            drop_last=dataset.drop_last,
            failure_tolerance=dataset.failure_tolerance,
            worker_config=dataset.worker_config,
        )
    return dataset


def _lean_map(dataset: MapDataset[Any, Any]) -> LeanMap:
    inner, function = lean(dataset.dataset), dataset.map_fn
    if type(inner) is LeanMap:
        inner, function = inner.dataset, _Both(inner.map_fn, function)
    return LeanMap(
        inner,
        function,
        stateless_map_fn=True,
        map_fn_config=dataset.config(),
        failure_tolerance=dataset.failure_tolerance,
        worker_config=dataset.worker_config,
    )


class LeanMap(MapDataset[Any, Any]):
    """Of a stateless function that returns one sample for one sample."""

    def __iter__(self) -> Iterator[Any]:
        for sample in self.dataset:
            number, mapped = _call(self._sample_index, self._map_failure_handler, self.map_fn, sample)
            if number is not None:
                yield add_sample_restore_key(mapped, number, src=self)


class LeanBatch(BatchDataset[Any, Any]):
    """Of a stateless function that returns one batch."""

    def __iter__(self) -> Iterator[Any]:
        samples: list[Any] = []
        for sample in self.dataset:
            samples.append(sample)
            if len(samples) == self.batch_size:
                yield from self._batch(samples)
                samples = []
        if samples and not self.drop_last:
            yield from self._batch(samples)

    def _batch(self, samples: list[Any]) -> tuple[Any, ...]:
        number, batch = _call(self._sample_index, self._batch_failure_handler, self.batcher, samples)
        if number is None:
            return ()
        return (set_sample_restore_key(batch, number, *map(get_sample_restore_key, samples), src=self),)


def _call(
    index: SampleIndex, errors: ErrorContext, function: Callable[[Any], Any], argument: Any
) -> tuple[int | None, Any]:
    """The call's number and result; no number if energon has it left out, as where it raised."""
    number = index.get_next()
    numbers = WorkerConfig._sample_index_stack
    assert numbers is not None, "energon calls its stages in an active worker"
    numbers.append(number)
    try:
        result = function(argument)
    except Exception:  # raised again to energon, which leaves the sample out or ends the stream
        with errors.handle_errors(argument):
            raise
        return None, None
    finally:
        numbers.pop()
    errors.reset()
    return number, result


@dataclass(frozen=True)
class _Both:
    """One function after the other; workers that don't fork need it pickled."""

    first: Callable[[Any], Any]
    second: Callable[[Any], Any]

    def __call__(self, sample: Any) -> Any:
        return self.second(self.first(sample))
