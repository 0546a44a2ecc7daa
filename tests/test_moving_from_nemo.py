"""Names, order and meaning of what NeMo's users pass, as in nemo/collections/diffusion/data of NeMo 2.7.3."""

import inspect

import pytest

from diffusion_data.diffusion_energon_datamodule import DiffusionDataModule
from diffusion_data.diffusion_fake_datamodule import VideoLatentFakeDataModule
from diffusion_data.diffusion_taskencoder import BasicDiffusionTaskEncoder
from diffusion_data.errors import UserError
from tests.datamodules import flat, module, rows
from tests.tiny_dataset import tiny_sample, write_dataset


def positional(function) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [each.name for each in inspect.signature(function).parameters.values() if each.kind in kinds]


def defaults(function) -> dict[str, object]:
    return {each.name: each.default for each in inspect.signature(function).parameters.values()}


def test_the_datamodules_leading_parameters_are_nemos():
    assert positional(DiffusionDataModule) == [
        "path",
        "seq_length",
        "micro_batch_size",
        "global_batch_size",
        "num_workers",
        "pin_memory",
        "task_encoder",
        "use_train_split_for_val",
        "virtual_epoch_length",
        "packing_buffer_size",
        "max_samples_per_sequence",
    ]


def test_the_fake_datamodules_leading_parameters_are_nemos():
    assert positional(VideoLatentFakeDataModule) == [
        "model_config",
        "seq_length",
        "micro_batch_size",
        "global_batch_size",
        "num_workers",
        "pin_memory",
        "task_encoder",
        "use_train_split_for_val",
    ]


def test_the_task_encoder_takes_nemos_names_with_their_defaults():
    nemos = {
        "max_frames": None,
        "text_embedding_padding_size": 512,
        "seq_length": None,
        "max_seq_length": None,
        "patch_spatial": 2,
        "patch_temporal": 1,
        "aesthetic_score": 0.0,
    }
    assert {name: defaults(BasicDiffusionTaskEncoder)[name] for name in nemos} == nemos


def test_positional_arguments_mean_what_they_mean_in_nemo(tmp_path):
    path = write_dataset(tmp_path / "ds", [tiny_sample(row) for row in range(4)])
    encoder = BasicDiffusionTaskEncoder(max_seq_length=8)
    data = DiffusionDataModule(path, None, 1, 2, 0, False, encoder, True, 1_000_000_000, 3, 2)
    loader = data.train_dataloader()
    assert len(loader) == 1_000_000_000
    assert next(iter(loader))["cu_seqlens_q"].tolist() == [0, 4, 8]  # two samples of 4 patches in a sequence of 8
    assert data.max_samples_per_sequence == 2


def test_a_long_shard_counts_as_several_of_max_samples_per_sequence(tmp_path):
    path = write_dataset(tmp_path / "ds", [tiny_sample(row) for row in range(40)], per_shard=40)
    options = {"shuffle_buffer_size": 1}  # so that nothing else changes the order
    assert flat(rows(module(path, **options).train_dataloader())) == list(range(40))
    seen = flat(rows(module(path, **options, max_samples_per_sequence=10).train_dataloader()))
    assert seen != list(range(40))
    for first in (0, 10, 20, 30):
        part = range(first, first + 10)
        assert [row for row in seen if row in part] == list(part)


@pytest.mark.parametrize("changed", [None, 3])
def test_refuses_to_resume_with_other_runs(tmp_path, changed):
    path = write_dataset(tmp_path / "ds", [tiny_sample(row) for row in range(4)])
    reference = module(path, max_samples_per_sequence=2)
    next(iter(reference.train_dataloader()))
    resumed = module(path, max_samples_per_sequence=changed)
    resumed.load_state_dict(reference.state_dict())
    with pytest.raises(UserError, match=f"max_samples_per_sequence was 2, now {changed}"):
        resumed.train_dataloader()
