"""Batch of the datamodules -> rectified flow loss; AdamW, a learning-rate schedule, an average of the weights."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from diffusion_data.scripts.ema import Ema, EmaOptions
from diffusion_data.scripts.optimizer_state import with_keys
from diffusion_data.scripts.rectified_flow import rectified_flow_loss
from diffusion_data.scripts.sample_layout import Batch, without_padding


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    learning_rate: float
    schedule: str  # constant or cosine, after the warm-up
    warmup_steps: int  # optimizer steps over which the learning rate rises to its full value
    decay_steps: int  # optimizer step at which cosine reaches final_learning_rate, and stays there
    final_learning_rate: float
    weight_decay: float
    betas: tuple[float, float]

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule must be constant or cosine, got {self.schedule!r}")
        if self.warmup_steps < 0 or self.decay_steps < 1:
            raise ValueError(f"{self.warmup_steps = } and {self.decay_steps = } must be at least 0 and 1")


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    sigma_data: float  # what latents, of a deviation of about 1, are multiplied by
    timesteps: str  # drawn uniform, or logit_normal: most of them of medium noise

    def __post_init__(self) -> None:
        if self.timesteps not in ("uniform", "logit_normal"):
            raise ValueError(f"timesteps must be uniform or logit_normal, got {self.timesteps!r}")


class DiffusionLightningModule(LightningModule):
    """Trains `model`, called as scripts/dit.py's DiT is.

    Noise and timesteps are a function of (seed, rank, micro batch number), so a resumed run draws what an
    uninterrupted one would have drawn. provenance: plain values that checkpoints carry, for who uses the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossOptions,
        optimizer: OptimizerOptions,
        ema: EmaOptions,
        seed: int,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.ema = None if ema.decay is None else Ema(model, ema.decay)
        self.loss_options = loss
        self.optimizer_options = optimizer
        self.ema_options = ema
        self.seed = seed
        self.provenance = provenance
        self.micro_batches_done = 0
        self.step_losses: list[Tensor] = []  # of the micro batches since the last optimizer step

    def configure_model(self) -> None:
        """Share the weights out over the ranks, where the strategy does that: block by block, then the rest."""
        if self.device_mesh is None:
            return
        mesh = self.device_mesh["data_parallel"]
        for model in filter(None, (self.model, self.ema and self.ema.model)):
            for block in getattr(model, "blocks", ()):
                fully_shard(block, mesh=mesh)
            # Also after a forward without a backward, as validation has: else the weights would stay whole there.
            fully_shard(model, mesh=mesh, reshard_after_forward=True)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return without_padding(batch)  # here, where lengths are still on the CPU

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        random = self._generator("train", self.micro_batches_done)
        self.micro_batches_done += 1
        loss = self._loss(self.model, batch, random)
        self.step_losses.append(loss.detach())
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.model, self.global_step)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        model = self.ema.model if self.ema is not None and self.ema_options.validate else self.model
        loss = self._loss(model, batch, self._generator("val", batch_idx))
        self.log("val_loss", loss, on_epoch=True, sync_dist=True, batch_size=batch["num_samples"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        options = self.optimizer_options
        decayed, others = ([parameter for _, parameter in group] for group in self._parameter_groups())
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=options.learning_rate,
            betas=options.betas,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(learning_rate_share, options))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["micro_batches_done"] = self.micro_batches_done
        checkpoint["provenance"] = self.provenance
        numbered = chain(*self._parameter_groups()) if self.device_mesh is None else self.named_parameters()
        names = [name for name, _ in numbered]
        states = checkpoint.get("optimizer_states", ())  # empty on all ranks but the first, where they are shared out
        checkpoint["optimizer_states"] = [state and with_keys(state, names) for state in states]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.micro_batches_done = checkpoint["micro_batches_done"]
        if self.device_mesh is None:  # else the strategy has loaded the optimizer's state, by name
            numbers = {name: number for number, (name, _) in enumerate(chain(*self._parameter_groups()))}
            states = checkpoint.get("optimizer_states", ())
            checkpoint["optimizer_states"] = [with_keys(state, numbers) for state in states]

    def _parameter_groups(self) -> tuple[list[tuple[str, nn.Parameter]], list[tuple[str, nn.Parameter]]]:
        """(name, parameter) of those that decay, and of biases, norms and single vectors, which don't."""
        trained = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        return [each for each in trained if each[1].ndim > 1], [each for each in trained if each[1].ndim <= 1]

    def _loss(self, model: nn.Module, batch: Batch, random: torch.Generator) -> Tensor:
        noise = torch.randn(batch["video"].shape, device=self.device, generator=random)
        timesteps = self._timesteps(len(batch["lengths"]), random)
        return rectified_flow_loss(model, batch, noise, timesteps, self.loss_options.sigma_data)

    def _timesteps(self, count: int, random: torch.Generator) -> Tensor:
        if self.loss_options.timesteps == "uniform":
            return torch.rand(count, device=self.device, generator=random)
        return torch.randn(count, device=self.device, generator=random).sigmoid()

    def _generator(self, purpose: str, number: int) -> torch.Generator:
        name = f"{purpose}/{self.seed}/{self.global_rank}/{number}"
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
        return torch.Generator(self.device).manual_seed(seed)


def learning_rate_share(options: OptimizerOptions, step: int) -> float:
    """What optimizer step `step`, from 0, multiplies the learning rate by."""
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    if options.schedule == "constant":
        return 1.0
    final = options.final_learning_rate / options.learning_rate
    done = min(1.0, (step - options.warmup_steps) / max(1, options.decay_steps - options.warmup_steps))
    return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2
