import pickle

import numpy as np
import pytest
import torch

from diffusion_data.diffusion_taskencoder import BasicDiffusionTaskEncoder
from diffusion_data.errors import UserError
from diffusion_data.testing import EMPTY_CAPTION_VALUE
from diffusion_data.text_dropout import uniform
from tests.datamodules import module, through_a_checkpoint
from tests.tiny_dataset import tiny_sample, write_dataset


@pytest.fixture(scope="module")
def twenty(tmp_path_factory):
    samples = [tiny_sample(row, tokens=2 + row % 3) for row in range(20)]
    return write_dataset(tmp_path_factory.mktemp("twenty") / "ds", samples)


def dropping(path, probability, **options):
    encoder = BasicDiffusionTaskEncoder(text_dropout=probability, text_embedding_padding_size=4)
    return module(path, task_encoder=encoder, **options)


def seen(loader):
    """(row, was its caption dropped) of each sample."""
    return [
        (int(key[-9:]), length == 1)
        for batch in loader
        for key, length in zip(batch["__key__"], batch["seq_len_kv"].tolist(), strict=True)
    ]


def test_a_dropped_caption_is_the_stored_empty_one(twenty):
    batch = next(iter(dropping(twenty, 1.0).train_dataloader()))
    assert batch["seq_len_kv"].tolist() == [1]
    assert batch["t5_text_mask"].tolist() == [[1, 0, 0, 0]]
    assert batch["t5_text_embeddings"][0, :, 0].tolist() == [EMPTY_CAPTION_VALUE, 0, 0, 0]


def test_the_probability_holds_and_other_samples_are_dropped_in_other_epochs(twenty):
    loader = dropping(twenty, 0.3).train_dataloader()
    epochs = [seen(loader) for _ in range(10)]
    dropped = [{row for row, was in epoch if was} for epoch in epochs]
    assert 40 <= sum(map(len, dropped)) <= 80
    assert len(set(map(frozenset, dropped))) > 5


def test_nothing_is_dropped_in_validation_nor_by_default(twenty):
    data = dropping(twenty, 1.0, use_train_split_for_val=True)
    assert not any(was for _, was in seen(data.val_dataloader()))
    assert not any(was for _, was in seen(module(twenty).train_dataloader()))


@pytest.mark.parametrize("options", [{}, {"max_seq_length": 16, "packing_buffer_size": 5}, {"num_workers": 1}])
def test_after_a_resume_the_same_captions_are_dropped(twenty, options):
    options = {"virtual_epoch_length": 30, **options}
    reference = dropping(twenty, 0.5, **options)
    iterator = iter(reference.train_dataloader())
    for _ in range(6):
        next(iterator)
    state = through_a_checkpoint(reference.state_dict())
    resumed = dropping(twenty, 0.5, **options)
    resumed.load_state_dict(state)
    rest = seen(iterator)
    assert seen(resumed.train_dataloader()) == rest
    assert {was for _, was in rest} == {False, True}


def test_the_seed_decides_which(twenty):
    first, same, other = (
        dict(seen(dropping(twenty, 0.5, seed=seed, shuffle_buffer_size=1).train_dataloader())) for seed in (1, 1, 2)
    )
    assert first == same != other


def test_another_share_refuses_a_place_in_the_stream(twenty):
    reference = dropping(twenty, 0.5)
    next(iter(reference.train_dataloader()))
    resumed = dropping(twenty, 0.1)
    resumed.load_state_dict(reference.state_dict())
    with pytest.raises(UserError, match=r"text_dropout was 0\.5, now 0\.1"):
        resumed.train_dataloader()


def test_a_dataset_without_the_empty_caption_is_refused_with_what_to_do(tmp_path):
    path = write_dataset(tmp_path / "ds", [tiny_sample(0)], with_stats=False)
    with pytest.raises(UserError, match=r"run/empty_caption\.pickle.*copy it from a dataset"):
        dropping(path, 0.1, seq_length=4).train_dataloader()


@pytest.mark.parametrize("content", [b"torn", pickle.dumps(np.zeros((0, 8))), pickle.dumps(np.full((1, 8), np.nan))])
def test_an_empty_caption_that_can_not_be_used_is_refused(tmp_path, content):
    path = write_dataset(tmp_path / "ds", [tiny_sample(0)])
    (path / "run" / "empty_caption.pickle").write_bytes(content)
    with pytest.raises(UserError, match=r"empty_caption\.pickle can't be used"):
        dropping(path, 0.1).train_dataloader()


def test_an_empty_caption_of_another_text_encoder_is_refused(tmp_path):
    path = write_dataset(tmp_path / "ds", [tiny_sample(0)])
    (path / "run" / "empty_caption.pickle").write_bytes(pickle.dumps(np.zeros((1, 16), np.float16)))
    with pytest.raises(UserError, match=r"the empty caption is 16 wide, the text of .* 8"):
        next(iter(dropping(path, 1.0).train_dataloader()))


def test_a_share_is_between_0_and_1():
    with pytest.raises(UserError, match="text_dropout must be a share"):
        BasicDiffusionTaskEncoder(text_dropout=1.1)


def test_numbers_are_evenly_distributed_and_fixed():
    numbers = torch.tensor([uniform("text dropout", 3, number) for number in range(4000)], dtype=torch.float64)
    assert abs(numbers.mean() - 0.5) < 0.02
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert uniform("a", 1) == uniform("a", 1) != uniform("a", 2)
