import subprocess
import sys

import torch

from diffusion_data.latent_sample import LatentSample
from diffusion_data.testing import EMPTY_CAPTION_VALUE, LATENT_SHAPES, tiny_samples
from tests.datamodules import flat, module, rows


def test_the_fixture_is_a_dataset_with_three_splits_and_statistics(tiny_dataset):
    data = module(tiny_dataset)
    splits = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader()]
    assert [sorted(flat(rows(loader))) for loader in splits] == [[0, 1, 2, 3, 4, 5], [6, 7], [8, 9]]
    assert {tuple(shape) for shape, _ in data.source.latent_shapes()} == set(LATENT_SHAPES)
    assert (tiny_dataset / "run" / "empty_caption.pickle").is_file()


def test_each_call_makes_a_new_dataset_as_asked(make_tiny_dataset):
    first = make_tiny_dataset(3, latent_shapes=[(2, 1, 2, 2)])
    second = make_tiny_dataset(4, split={"train": 0, "val": 1})
    assert first != second
    batch = next(iter(module(first).train_dataloader()))
    assert batch["latent_shape"].tolist() == [[2, 1, 2, 2]]
    assert flat(rows(module(second).val_dataloader())) == [0, 1, 2, 3]


def test_values_can_be_computed():
    sample = tiny_samples(6)[5]
    assert isinstance(sample, LatentSample)
    assert sample.latent.flatten()[:3].tolist() == [5, 6, 7]
    assert sample.text_embedding.shape == (2, 8)
    assert (torch.from_numpy(sample.text_embedding) == 6).all()
    assert EMPTY_CAPTION_VALUE == -1


def test_it_works_without_pytest():
    code = "import sys; sys.modules['pytest'] = None; import diffusion_data.testing"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
