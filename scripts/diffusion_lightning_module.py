"""Batch of the datamodules -> rectified flow loss; AdamW with a linear warm-up.

Rectified flow: x_t = (1 - t) x + t noise, with x the scaled latent; the network predicts noise - x.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

Batch = dict[str, Any]

_LENGTH_MULTIPLE = 32  # few different lengths, which attention kernels like


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    learning_rate: float
    warmup_steps: int  # optimizer steps over which the learning rate rises to its full value
    weight_decay: float
    betas: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    sigma_data: float  # what raw latents are multiplied by: datasets store them unscaled
    text_dropout: float  # share of samples trained without caption, for classifier-free guidance


class DiffusionLightningModule(LightningModule):
    """Trains `model`, called as scripts/dit.py's DiT is.

    Noise and timesteps are a function of (seed, rank, micro batch number), so a resumed run draws what an
    uninterrupted one would have drawn.
    """

    def __init__(self, model: nn.Module, loss: LossOptions, optimizer: OptimizerOptions, seed: int) -> None:
        super().__init__()
        self.model = model
        self.loss_options = loss
        self.optimizer_options = optimizer
        self.seed = seed
        self.micro_batches_done = 0
        self.step_losses: list[Tensor] = []  # of the micro batches since the last optimizer step

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return trim_padding(batch)  # here, where lengths are still on the CPU

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        random = self._generator("train", self.micro_batches_done)
        self.micro_batches_done += 1
        keep_text = torch.rand(len(batch["video"]), device=self.device, generator=random)
        text_mask = batch["t5_text_mask"] * (keep_text >= self.loss_options.text_dropout)[:, None]
        loss = self._loss({**batch, "t5_text_mask": text_mask}, random)
        self.step_losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss = self._loss(batch, self._generator("val", batch_idx))
        self.log("val_loss", loss, on_epoch=True, sync_dist=True, batch_size=len(batch["video"]))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        options = self.optimizer_options
        # Biases, norms and single vectors are not decayed.
        decayed = [parameter for parameter in self.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in self.parameters() if parameter.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=options.learning_rate,
            betas=options.betas,
        )
        warm_up = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / max(1, options.warmup_steps))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["micro_batches_done"] = self.micro_batches_done

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.micro_batches_done = checkpoint["micro_batches_done"]

    def _loss(self, batch: Batch, random: torch.Generator) -> Tensor:
        latents = batch["video"].float()
        noise = torch.randn(latents.shape, device=latents.device, generator=random)
        timesteps = torch.randn(len(latents), device=latents.device, generator=random).sigmoid()  # logit-normal
        return rectified_flow_loss(self.model, batch, noise, timesteps, self.loss_options.sigma_data)

    def _generator(self, purpose: str, number: int) -> torch.Generator:
        name = f"{purpose}/{self.seed}/{self.global_rank}/{number}"
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
        return torch.Generator(self.device).manual_seed(seed)


def trim_padding(batch: Batch) -> Batch:
    """The batch without the positions and tokens that are padding in all of its samples.

    Datasets pad to their longest sample, which may be many times what this batch holds.
    """
    trimmed = dict(batch)
    for length_key, keys in (
        ("seq_len_q", ("video", "loss_mask", "pos_ids")),
        ("seq_len_kv", ("t5_text_embeddings", "t5_text_mask")),
    ):
        longest = int(batch[length_key].max())
        length = -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        trimmed.update({key: batch[key][:, :length] for key in keys})
    return trimmed


def rectified_flow_loss(model: nn.Module, batch: Batch, noise: Tensor, timesteps: Tensor, sigma_data: float) -> Tensor:
    """noise: float32, shaped as batch["video"].  timesteps: float32 (B,) -> mean squared error of real positions."""
    latents = batch["video"].float() * sigma_data
    time = timesteps[:, None, None]
    velocity = model(
        (1 - time) * latents + time * noise,
        timesteps,
        position_ids=batch["pos_ids"],
        mask=batch["loss_mask"],
        text=batch["t5_text_embeddings"].float(),
        text_mask=batch["t5_text_mask"],
        image_size=batch["image_size"],
        fps=batch["fps"],
        num_frames=batch["num_frames"],
    )
    error = (velocity.float() - (noise - latents)).square().mean(dim=-1)
    mask = batch["loss_mask"].float()
    return (error * mask).sum() / mask.sum()
