"""Exponential moving average of a model's weights: what validation and sampling use, smoother than the last step's."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class EmaOptions:
    decay: float | None  # share of the average that a step keeps; None: no average, and a third of the memory less
    validate: bool  # val_loss of the average, not of the weights in training

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 <= self.decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {self.decay}")


class Ema(nn.Module):
    """Holds the average as `model`, a copy that no optimizer sees. It is part of the state dict, so it resumes exactly.

    Early averages keep less, (1 + step) / (10 + step), for the first weights are noise.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """After optimizer step number `step`, from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages: list[torch.Tensor] = list(self.model.parameters())
        weights: list[torch.Tensor] = list(model.parameters())
        torch._foreach_lerp_(averages, weights, 1 - decay)

    def train(self, mode: bool = True) -> Ema:
        """Stays in evaluation mode, whatever the module that holds it does."""
        return super().train(False)
