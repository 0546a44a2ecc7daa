"""Raw latents <-> latents of about unit variance, as a model may want them.

latent_scaling: null          raw, as stored
latent_scaling: 0.5           times a number
latent_scaling: per_channel   (latent - mean) / deviation, of each channel, from the dataset's run/stats.json
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from diffusion_data.errors import UserError

PER_CHANNEL = "per_channel"


@dataclass(frozen=True, kw_only=True)
class LatentScaling:
    """shift, scale: float32 (C,), or () for all channels alike."""

    shift: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def by(cls, factor: float) -> LatentScaling:
        """Multiply by a number."""
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < float("inf"):
            raise UserError(f"latent_scaling must be null, {PER_CHANNEL} or a number above 0, got {factor!r}")
        return cls(shift=torch.tensor(0.0), scale=torch.tensor(float(factor)))

    @classmethod
    def of_stats(cls, stats: Sequence[dict[str, Any]]) -> LatentScaling:
        """Mean 0 and deviation 1 in each channel, over all positions of all datasets whose stats.json these are.

        Raises:
            UserError: a stats.json lacks what is needed, or their latents have different channels.
        """
        try:
            counts = np.array([_positions(each["latent_shapes"]) for each in stats], dtype=np.float64)
            means = np.array([each["latent_mean"] for each in stats], dtype=np.float64)
            deviations = np.array([each["latent_std"] for each in stats], dtype=np.float64)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"latent_scaling={PER_CHANNEL} needs latent_mean, latent_std and latent_shapes, of equally many "
                f"channels, in the run/stats.json of each dataset ({type(error).__name__}: {error})"
            ) from error
        shares = (counts / counts.sum())[:, None]
        mean = (shares * means).sum(0)
        deviation = np.sqrt((shares * (deviations**2 + means**2)).sum(0) - mean**2)
        if not (np.isfinite(mean).all() and np.isfinite(deviation).all() and (deviation > 0).all()):
            raise UserError(f"latent_scaling={PER_CHANNEL}: a channel of run/stats.json doesn't vary, or isn't finite")
        return cls(
            shift=torch.from_numpy(-mean).to(torch.float32), scale=torch.from_numpy(1 / deviation).to(torch.float32)
        )

    def apply(self, latent: torch.Tensor) -> torch.Tensor:
        """Raw (..., C, T, H, W) -> scaled, same dtype."""
        shift, scale = self._like(latent)
        return ((latent.float() + shift) * scale).to(latent.dtype)

    def invert(self, latent: torch.Tensor) -> torch.Tensor:
        """Scaled (..., C, T, H, W) -> raw, as the tokenizer decodes it, same dtype."""
        shift, scale = self._like(latent)
        return (latent.float() / scale - shift).to(latent.dtype)

    def _like(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shift, scale = self.shift.to(latent.device), self.scale.to(latent.device)
        if shift.ndim == 0:
            return shift, scale
        if latent.shape[-4] != len(shift):
            raise UserError(f"latent_scaling is for {len(shift)} channels, a latent has {latent.shape[-4]}")
        return shift[:, None, None, None], scale[:, None, None, None]


def _positions(latent_shapes: Sequence[Sequence[int]]) -> int:
    """Positions a channel, from stats.json's [C, T, H, W, number of samples]."""
    return sum(frames * height * width * samples for _, frames, height, width, samples in latent_shapes)
