"""Noise levels, and validation: of which weights, and what batches without samples do to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from diffusion_data.energon_loaders import without_samples
from diffusion_data.scripts.diffusion_lightning_module import DiffusionLightningModule, LossOptions
from diffusion_data.scripts.ema import EmaOptions
from tests.test_dit import make_batch, optimizer_options, tiny_dit


def val_loss(batches: list[dict[str, Any]], *, validate_average: bool = True, moved: float = 0.0) -> float:
    """moved: how far the weights in training have gone from their average."""
    ema = EmaOptions(decay=0.9, validate=validate_average)
    module = DiffusionLightningModule(
        tiny_dit(), LossOptions(sigma_data=0.5, timesteps="uniform"), optimizer_options(), ema, seed=0
    )
    for parameter in module.model.parameters():
        parameter.data += moved
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,
    )
    loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset
    (metrics,) = trainer.validate(module, loader, verbose=False)
    return metrics["val_loss"]


@pytest.mark.filterwarnings("ignore")  # what Lightning thinks of a loader without workers
def test_validation_is_of_the_average_unless_told_otherwise() -> None:
    unmoved = val_loss([make_batch()])

    assert val_loss([make_batch()], moved=0.1) == unmoved
    assert val_loss([make_batch()], moved=0.1, validate_average=False) != pytest.approx(unmoved, rel=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_batches_without_samples_do_not_change_the_mean() -> None:
    batch = make_batch()

    assert val_loss([batch, without_samples(batch)]) == val_loss([batch])


@pytest.mark.parametrize(("timesteps", "low", "high"), [("uniform", 0.1, 0.1), ("logit_normal", 0.014, 0.014)])
def test_timesteps_are_distributed_as_asked(timesteps: str, low: float, high: float) -> None:
    loss = LossOptions(sigma_data=0.5, timesteps=timesteps)
    ema = EmaOptions(decay=None, validate=False)
    module = DiffusionLightningModule(tiny_dit(), loss, optimizer_options(), ema, seed=0)
    drawn = module._timesteps(20_000, torch.Generator().manual_seed(0))

    assert (drawn < 0.1).float().mean().item() == pytest.approx(low, rel=0.15)
    assert (drawn > 0.9).float().mean().item() == pytest.approx(high, rel=0.15)


def test_unknown_timesteps_are_refused() -> None:
    with pytest.raises(ValueError, match="timesteps must be uniform or logit_normal, got 'cosine'"):
        LossOptions(sigma_data=0.5, timesteps="cosine")
