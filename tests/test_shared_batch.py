"""A batch in one piece of shared memory is the batch; the datamodule's workers send such pieces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from megatron.energon import SavableDataLoader

from diffusion_data.shared_batch import SharedBatch
from tests.datamodules import module
from tests.tiny_dataset import tiny_sample, write_dataset


def equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


def test_tensors_of_any_kind_and_what_else_there_is_come_back_in_order() -> None:
    batch = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "video": torch.randn(2, 3, 5).bfloat16(),
        "__key__": ["a", "b"],
        "strided": torch.arange(12).reshape(3, 4).t(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "mask": torch.tensor([[True, False]]),
        "nothing": None,
    }
    shared = SharedBatch.of(batch)
    assert shared.memory.is_shared()
    found = shared.batch()
    assert list(found) == list(batch)
    assert all(equal(found[name], value) for name, value in batch.items())


def test_tensors_can_be_changed_one_by_one() -> None:
    found = SharedBatch.of({"a": torch.zeros(5), "b": torch.ones(5)}).batch()
    found["a"] += 2
    assert found["b"].tolist() == [1] * 5


def test_a_batch_without_tensors_takes_no_memory() -> None:
    assert SharedBatch.of({}).batch() == {}
    assert SharedBatch.of({"array": np.arange(2)}).memory.nbytes == 0


def test_workers_send_one_piece_a_batch_and_give_what_no_workers_give(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "ds", [tiny_sample(row) for row in range(6)], split={"train": 1, "val": 1})
    batches = {}
    for workers in (0, 1):
        data = module(folder, num_workers=workers, shuffle_buffer_size=1, use_train_split_for_val=True)
        batches[workers] = list(data.val_dataloader())
        if workers:
            loader = data.train_dataloader()
            next(iter(loader))
            assert isinstance(loader.loader, SavableDataLoader)
            sent = loader.loader.collate_fn((0, 0, batches[0][0]))
            assert isinstance(sent[2], SharedBatch)
    assert len(batches[0]) == len(batches[1]) > 0
    for one, other in zip(*batches.values(), strict=True):
        assert list(one) == list(other)
        names = one.keys() - {"__restore_key__"}
        assert all(equal(one[name], other[name]) for name in names)
        storages = {value.untyped_storage().data_ptr() for value in other.values() if isinstance(value, torch.Tensor)}
        assert len(storages) == 1
