"""A stored sample -> the frames that its latent decodes to, for people to look at."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.errors import UserError
from diffusion_data.latent_sample import LatentSample
from diffusion_data.made_with import made_with


def decode_sample(sample: LatentSample, tokenizer: CosmosTokenizer, max_frames: int | None = None) -> np.ndarray:
    """uint8 (T, H, W, 3); of a clip its first frames, no more than max_frames.

    The network is causal in time, so the beginning of a latent decodes to the beginning of its clip.
    """
    latent = sample.latent
    if max_frames is not None:
        latent = latent[:, : 1 + (max(1, max_frames) - 1) // tokenizer.temporal_compression]
    return tokenizer.decode(latent[None])[0].cpu().numpy()


def tokenizer_of(dataset: Path) -> str:
    """The name of the tokenizer that made the dataset, from its run/config.yaml.

    Raises:
        UserError: the dataset doesn't tell.
    """
    try:
        return str(made_with(dataset)["tokenizer"]["name"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{dataset} doesn't tell what made it (no run/config.yaml): give --tokenizer") from error


def frames_per_second(metadata: dict[str, Any]) -> float | None:
    """`framerate` of a sample's json, where it is one that a player can play."""
    rate = metadata.get("framerate")
    if not isinstance(rate, int | float) or not math.isfinite(rate) or not 0 < rate <= 1000:
        return None
    return float(rate)


def psnr_db(picture: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 arrays of one shape, in dB; infinite where they are equal."""
    mean_square = float(np.mean((picture.astype(np.float32) - other.astype(np.float32)) ** 2))
    return math.inf if mean_square == 0 else 10 * math.log10(255**2 / mean_square)
