"""Ranks and workers of which all samples are skipped, while others have some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffusion_data.diffusion_energon_datamodule import DiffusionDataModule
from diffusion_data.diffusion_taskencoder import BasicDiffusionTaskEncoder
from diffusion_data.errors import UserError
from tests.datamodules import as_rank, flat, module, rows
from tests.tiny_dataset import tiny_sample, write_dataset


@pytest.fixture(scope="module")
def pictures_then_clips(tmp_path_factory) -> Path:
    """Sorted, as many sources are: rows 0 to 3, then 4 to 7. A rank's or worker's share is a stretch of them."""
    samples = [tiny_sample(row, (4, 1, 4, 4) if row < 4 else (4, 2, 4, 4)) for row in range(8)]
    return write_dataset(tmp_path_factory.mktemp("sorted") / "ds", samples, per_shard=4)


def only_pictures(path: Path, **options: Any) -> DiffusionDataModule:
    encoder = BasicDiffusionTaskEncoder(filters={"num_frames": {"max": 1}})
    return module(path, task_encoder=encoder, use_train_split_for_val=True, **options)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("packing", [{}, {"max_seq_length": 12, "packing_buffer_size": 3}])
def test_a_rank_whose_share_is_filtered_validates_without_samples(
    pictures_then_clips, monkeypatch, num_workers, packing
):
    found = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        data = only_pictures(pictures_then_clips, global_batch_size=2, num_workers=num_workers, **packing)
        batches = list(data.val_dataloader())
        found.append(sorted(flat(rows(batches))))
        if rank == 1 and not packing:  # packed, ranks tell each other when they are done, which these two can't
            assert [batch["loss_mask"].sum().item() for batch in batches] == [0] * 4
            assert batches[0]["video"].shape == (1, 8, 16)
        assert data.task_encoder.skips.by_reason() == ({"num_frames_out_of_bounds": 4} if rank else {})
    assert found == [[0, 1, 2, 3], []]


def test_a_rank_whose_share_is_filtered_trains_a_pass_without_samples(pictures_then_clips, monkeypatch):
    found = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        data = only_pictures(pictures_then_clips, global_batch_size=2, repeat=False)
        found.append(rows(data.train_dataloader()))
    assert [sorted(flat(each)) for each in found] == [[0, 1, 2, 3], []]
    assert [len(each) for each in found] == [4, 4]


def test_an_endless_stream_says_that_a_workers_share_is_filtered_and_what_to_do(pictures_then_clips):
    data = only_pictures(pictures_then_clips, num_workers=2)
    with pytest.raises(UserError, match=r"one of the 2 workers of all ranks can use no sample of its share.*mix them"):
        list(data.train_dataloader())


def test_validation_tells_what_was_skipped(pictures_then_clips, caplog):
    data = only_pictures(pictures_then_clips)
    assert sorted(flat(rows(data.val_dataloader()))) == [0, 1, 2, 3]
    assert caplog.messages[-1] == "samples skipped so far, by reason: num_frames_out_of_bounds 4"
    caplog.clear()
    data.teardown()
    assert not caplog.messages
