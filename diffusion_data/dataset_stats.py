"""LatentSamples -> run/stats.json: latent mean and deviation per channel, shapes, lengths.

Each shard's part is kept in its ledger entry, so the dataset's is a sum that reads no shard again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from diffusion_data.latent_sample import LatentSample


@dataclass(kw_only=True)
class DatasetStats:
    """Sums over samples. The counters map a value to the number of samples that have it.

    latent_sum, latent_square_sum: float64 (C,), over `latent_count` positions a channel
    """

    latent_count: int = 0
    latent_sum: np.ndarray = field(default_factory=lambda: np.zeros(0))
    latent_square_sum: np.ndarray = field(default_factory=lambda: np.zeros(0))
    latent_shapes: Counter[str] = field(default_factory=Counter)
    resolutions: Counter[str] = field(default_factory=Counter)
    num_frames: Counter[str] = field(default_factory=Counter)
    framerates: Counter[str] = field(default_factory=Counter)
    text_tokens: Counter[str] = field(default_factory=Counter)
    cropped_percent: Counter[str] = field(default_factory=Counter)

    def add(self, sample: LatentSample) -> None:
        values = sample.latent.flatten(1).to(torch.float64)
        self._add_moments(values.shape[1], values.sum(1).numpy(), values.square().sum(1).numpy())
        self.latent_shapes["x".join(map(str, sample.latent.shape))] += 1
        self.resolutions[sample.metadata["resolution"]] += 1
        if sample.metadata["num_frames"] is not None:  # as of clips whose writer didn't tell
            self.num_frames[str(sample.metadata["num_frames"])] += 1
        if sample.metadata["framerate"] is not None:
            self.framerates[f"{sample.metadata['framerate']:.6g}"] += 1
        self.text_tokens[str(len(sample.text_embedding))] += 1
        self.cropped_percent[str(_cropped_percent(sample.metadata))] += 1

    def _add_moments(self, count: int, total: np.ndarray, square_total: np.ndarray) -> None:
        if self.latent_count:
            total, square_total = self.latent_sum + total, self.latent_square_sum + square_total
        self.latent_count += count
        self.latent_sum, self.latent_square_sum = total, square_total

    def to_json(self) -> dict[str, Any]:
        """The sums themselves, for a ledger entry."""
        return {
            "latent_count": self.latent_count,
            "latent_sum": self.latent_sum.tolist(),
            "latent_square_sum": self.latent_square_sum.tolist(),
            **{name: dict(getattr(self, name)) for name in _COUNTERS},
        }

    def add_json(self, part: dict[str, Any]) -> None:
        """Add what `to_json` gave."""
        if part["latent_count"]:
            self._add_moments(part["latent_count"], np.array(part["latent_sum"]), np.array(part["latent_square_sum"]))
        for name in _COUNTERS:
            getattr(self, name).update(part[name])

    def report(self) -> dict[str, Any]:
        """What users read in stats.json: `latent_shapes` is a list of [C, T, H, W, number of samples]."""
        mean = self.latent_sum / max(self.latent_count, 1)
        variance = self.latent_square_sum / max(self.latent_count, 1) - mean**2
        return {
            "latent_mean": mean.tolist(),
            "latent_std": np.sqrt(np.maximum(variance, 0)).tolist(),
            "latent_shapes": [
                [*map(int, shape.split("x")), count] for shape, count in sorted(self.latent_shapes.items())
            ],
            "resolutions": dict(self.resolutions.most_common()),
            "num_frames": _by_number(self.num_frames),
            "framerates": _by_number(self.framerates),
            "text_tokens": _by_number(self.text_tokens),
            "cropped_percent": _by_number(self.cropped_percent),
        }


_COUNTERS = ("latent_shapes", "resolutions", "num_frames", "framerates", "text_tokens", "cropped_percent")


def _cropped_percent(metadata: dict[str, Any]) -> int:
    """Share of the source's area that the crop to another aspect cost."""
    source = metadata["image_width"] / metadata["image_height"]
    kept = metadata["width"] / metadata["height"]
    return round(100 * (1 - min(source, kept) / max(source, kept)))


def _by_number(counter: Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda item: float(item[0])))
