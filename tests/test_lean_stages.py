"""Lean stages give what energon's give, are restored as they are, and leave out what they leave out."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from megatron.energon import SavableDataset, SkipSample, WorkerConfig, stateless
from megatron.energon.errors import FatalSampleError
from megatron.energon.wrappers import BatchDataset, MapDataset

from diffusion_data.errors import UserError
from diffusion_data.lean_stages import LeanBatch, LeanMap, lean
from tests.datamodules import module
from tests.tiny_dataset import tiny_sample, write_dataset


def worker(handler: Any = None) -> WorkerConfig:
    options = {} if handler is None else {"global_error_handler": handler}
    return WorkerConfig(rank=0, world_size=1, num_workers=0, **options)


class Numbers(SavableDataset[Any]):
    """0, 1, ..."""

    def __init__(self, count: int, config: WorkerConfig) -> None:
        super().__init__(worker_config=config)
        self._count = count

    def __iter__(self) -> Iterator[Any]:
        for number in range(self._count):
            yield self.restore_sample(("Numbers", number))

    def restore_sample(self, restore_key: Any) -> dict[str, Any]:
        return {"value": restore_key[1], "__restore_key__": restore_key}

    def can_restore_sample(self) -> bool:
        return True

    def assert_can_restore(self) -> None: ...

    def len_worker(self, worker_idx: int | None = None) -> int:
        return self._count

    def worker_has_samples(self) -> bool:
        return True

    def reset_state_own(self) -> None: ...

    def config(self) -> dict[str, Any]:
        return {}


@stateless
def plus_ten(sample: dict[str, Any]) -> dict[str, Any]:
    return {**sample, "value": sample["value"] + 10}


@stateless
def without_threes(sample: dict[str, Any]) -> dict[str, Any]:
    if sample["value"] % 3 == 0:
        raise SkipSample()
    if sample["value"] % 5 == 0:
        raise ValueError("a multiple of five")
    return {**sample, "call": WorkerConfig.active_worker_config.active_worker_sample_index}


@stateless
def together(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {"values": [sample["value"] for sample in samples], "__restore_key__": ()}


def stages(config: WorkerConfig, function: Any = without_threes, count: int = 12) -> SavableDataset[Any]:
    numbers = Numbers(count, config)
    return MapDataset(
        MapDataset(numbers, plus_ten, stateless_map_fn=True, worker_config=config),
        function,
        stateless_map_fn=True,
        failure_tolerance=2,
        worker_config=config,
    )


def given(dataset: SavableDataset[Any]) -> list[Any]:
    dataset.worker_config.worker_activate(0)
    try:
        return list(dataset)
    finally:
        dataset.worker_config.worker_deactivate()


def test_maps_give_skip_and_number_what_energons_do() -> None:
    errors: list[str] = []
    config = worker(lambda error, *_: errors.append(str(error)))
    expected, expected_errors = given(stages(config)), list(errors)
    errors.clear()
    found = given(lean(stages(config)))

    def told(samples: list[Any]) -> list[Any]:
        return [(sample["value"], sample["call"]) for sample in samples]

    assert told(found) == told(expected)
    assert errors == expected_errors == ["a multiple of five"] * 2
    assert WorkerConfig._sample_index_stack is None


def test_maps_that_follow_each_other_are_one_and_restore_what_they_gave() -> None:
    dataset = lean(stages(worker(lambda *_: None)))
    assert type(dataset) is LeanMap
    assert type(dataset.dataset) is Numbers
    for sample in given(dataset):
        dataset.worker_config.worker_activate(0)
        assert dataset.restore_sample(sample["__restore_key__"]) == sample
        dataset.worker_config.worker_deactivate()


def test_too_many_failures_in_a_row_end_the_stream_as_with_energon() -> None:
    @stateless
    def failing(sample: dict[str, Any]) -> dict[str, Any]:
        raise ValueError("always")

    for make in (lambda dataset: dataset, lean):
        with pytest.raises(FatalSampleError, match="failed 2 times in a row"):
            given(make(stages(worker(lambda *_: None), failing)))


@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_are_energons(drop_last: bool) -> None:
    config = worker(lambda *_: None)
    made = [
        BatchDataset(
            stages(config, plus_ten, count=7),
            3,
            together,
            batcher_stateless=True,
            drop_last=drop_last,
            worker_config=config,
        )
        for _ in range(2)
    ]
    expected, batches = given(made[0]), given(dataset := lean(made[1]))
    assert type(dataset) is LeanBatch
    assert [batch["values"] for batch in batches] == [batch["values"] for batch in expected]
    assert [len(batch["values"]) for batch in batches] == ([3, 3] if drop_last else [3, 3, 1])
    config.worker_activate(0)
    assert dataset.restore_sample(batches[1]["__restore_key__"]) == batches[1]
    config.worker_deactivate()


def test_functions_of_several_samples_and_those_with_state_are_left_to_energon() -> None:
    def several(sample: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield sample

    config = worker()
    numbers = Numbers(3, config)
    assert type(lean(MapDataset(numbers, several, stateless_map_fn=True, worker_config=config))) is MapDataset
    assert type(lean(MapDataset(numbers, plus_ten, worker_config=config))) is MapDataset
    assert type(lean(BatchDataset(numbers, 2, together, worker_config=config))) is BatchDataset
    assert lean(numbers) is numbers


def test_workers_that_are_not_forked_get_the_functions() -> None:
    dataset = lean(stages(worker()))
    assert isinstance(dataset, LeanMap)
    again = pickle.loads(pickle.dumps(dataset.map_fn))
    assert again.first({"value": 1}) == {"value": 11}
    assert again.second is without_threes


def test_a_place_saved_by_other_stages_is_refused_in_words(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "ds", [tiny_sample(row) for row in range(3)])
    data = module(folder)
    next(iter(data.train_dataloader()))
    state = data.state_dict()
    del state["settings"]["stages_version"]  # as before there was one
    resumed = module(folder)
    resumed.load_state_dict(state)
    with pytest.raises(UserError, match="stages_version was None, now 1"):
        resumed.train_dataloader()
