import json

import pytest
import torch

from diffusion_data.diffusion_taskencoder import BasicDiffusionTaskEncoder
from diffusion_data.errors import UserError
from diffusion_data.latent_scaling import LatentScaling
from diffusion_data.patchify import unpatchify
from tests.datamodules import module
from tests.tiny_dataset import tiny_sample, write_dataset

SAMPLES = [tiny_sample(row, (4, 1, 4, 4) if row % 2 else (4, 3, 4, 4)) for row in range(6)]


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("six") / "ds", SAMPLES)


def latents(data) -> dict[int, torch.Tensor]:
    return {
        int(batch["__key__"][0][-9:]): unpatchify(batch["video"][0], batch["latent_shape"][0].tolist(), 2, 1)
        for batch in data.train_dataloader()
    }


def scaled(path, scaling):
    return module(path, task_encoder=BasicDiffusionTaskEncoder(latent_scaling=scaling))


def test_latents_are_raw_by_default(six):
    assert all(torch.equal(latent, SAMPLES[row].latent) for row, latent in latents(scaled(six, None)).items())
    assert scaled(six, None).latent_scaling is None


def test_a_number_multiplies(six):
    for row, latent in latents(scaled(six, 0.5)).items():
        assert torch.equal(latent, SAMPLES[row].latent * 0.5)


def test_per_channel_gives_mean_0_and_deviation_1(six):
    positions = torch.cat([latent.float().flatten(1) for latent in latents(scaled(six, "per_channel")).values()], dim=1)
    assert positions.mean(1).abs().max() < 0.01
    assert (positions.std(1) - 1).abs().max() < 0.01


def test_the_inverse_gives_raw_latents_for_decoding(six):
    for scaling in ("per_channel", 0.5):
        data = scaled(six, scaling)
        for row, latent in latents(data).items():
            raw = data.latent_scaling.invert(latent.float())
            assert (raw - SAMPLES[row].latent.float()).abs().max() < 0.3  # of values up to 68, in bfloat16
            batched = data.latent_scaling.invert(latent.float()[None])
            assert torch.equal(batched[0], raw)


def test_statistics_of_several_datasets_are_those_of_all_their_latents(tmp_path):
    together = write_dataset(tmp_path / "all", SAMPLES)
    apart = [write_dataset(tmp_path / "a", SAMPLES[:2]), write_dataset(tmp_path / "b", SAMPLES[2:])]
    expected, pooled = (
        LatentScaling.of_stats([json.loads((path / "run" / "stats.json").read_text()) for path in paths])
        for paths in ([together], apart)
    )
    assert torch.allclose(expected.shift, pooled.shift)
    assert torch.allclose(expected.scale, pooled.scale)


def test_statistics_that_are_missing_or_do_not_fit_are_refused(tmp_path, six):
    path = write_dataset(tmp_path / "ds", SAMPLES, with_stats=False)
    with pytest.raises(UserError, match=r"latent_scaling=per_channel needs latent_mean"):
        module(
            path, seq_length=12, task_encoder=BasicDiffusionTaskEncoder(latent_scaling="per_channel")
        ).train_dataloader()
    flat = {"latent_mean": [0.0], "latent_std": [0.0], "latent_shapes": [[1, 1, 2, 2, 1]]}
    with pytest.raises(UserError, match="doesn't vary"):
        LatentScaling.of_stats([flat])
    with pytest.raises(UserError, match="for 4 channels, a latent has 2"):
        LatentScaling(shift=torch.zeros(4), scale=torch.ones(4)).apply(torch.zeros(2, 1, 2, 2))


@pytest.mark.parametrize("scaling", ["per_chanel", 0, -1, float("inf"), True])
def test_other_scalings_are_refused(scaling):
    with pytest.raises(UserError, match="latent_scaling must be null, per_channel or a number above 0"):
        BasicDiffusionTaskEncoder(latent_scaling=scaling)
