"""Validation: of which weights, and what batches without samples do to it."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from diffusion_data.energon_loaders import without_samples
from diffusion_data.scripts.diffusion_lightning_module import DiffusionLightningModule, LossOptions
from diffusion_data.scripts.ema import EmaOptions
from tests.test_dit import make_batch, optimizer_options, tiny_dit


def val_loss(batches: list[dict[str, Any]], *, validate_average: bool = True, moved: float = 0.0) -> float:
    """moved: how far the weights in training have gone from their average."""
    ema = EmaOptions(decay=0.9, validate=validate_average)
    module = DiffusionLightningModule(tiny_dit(), LossOptions(sigma_data=0.5), optimizer_options(), ema, seed=0)
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
