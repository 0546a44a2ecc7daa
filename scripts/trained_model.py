"""A checkpoint of train.py -> the network, and what it tells of the data it was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion_data.command_line import build_target
from diffusion_data.errors import UserError
from diffusion_data.latent_scaling import LatentScaling
from diffusion_data.scripts.checkpoint_file import read_checkpoint

_PREFIXES = {"ema": "ema.model.", "trained": "model."}
"""Of the two sets of weights in a checkpoint's state dict."""


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    model: nn.Module
    device: torch.device
    weights: str
    step: int
    provenance: dict[str, Any]

    @property
    def patch_spatial(self) -> int:
        return self.provenance["patch_spatial"]

    @property
    def patch_temporal(self) -> int:
        return self.provenance["patch_temporal"]

    @property
    def patch_channels(self) -> int:
        return self.provenance["model"]["patch_channels"]

    @property
    def sigma_data(self) -> float:
        return self.provenance["sigma_data"]

    def raw_latent(self, latent: torch.Tensor) -> torch.Tensor:
        """(C, T, H, W) as the network draws it -> as the tokenizer decodes it."""
        latent = latent / self.sigma_data
        scaling = self.provenance["latent_scaling"]
        return latent if scaling is None else LatentScaling(**scaling).invert(latent)

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Pixels (height, width); what isn't given is the dataset's most frequent size."""
        usual = self.provenance["usual_size"]
        if usual is None and (height is None or width is None):
            raise UserError("the checkpoint doesn't tell its dataset's sizes: give --height and --width")
        return height or usual[0], width or usual[1]

    def model_arguments(self, kind: str, name: str | None, cache_dir: str | None) -> dict[str, Any]:
        """For `from_pretrained` of the dataset's tokenizer or text_encoder (`kind`), or of another `name`."""
        made_with = self.provenance[kind] or {}
        if name is None and "name" not in made_with:
            raise UserError(f"the checkpoint doesn't tell its dataset's {kind}: give --{kind.replace('_', '-')}")
        arguments = {"name_or_path": name or made_with["name"], "cache_dir": cache_dir or made_with.get("cache_dir")}
        if "max_length" in made_with:
            arguments["max_length"] = made_with["max_length"]
        return arguments

    def check_text_width(self, embedding_dim: int) -> None:
        expected = self.provenance["model"]["text_embedding_dim"]
        if embedding_dim != expected:
            raise UserError(f"the text encoder gives {embedding_dim} features, the model was trained with {expected}")


def load_trained_model(path: Path, weights: str | None, device: str) -> TrainedModel:
    """path: the checkpoint, or its run's folder.  weights: ema, trained, or None for the average if there is one."""
    if path.is_dir():
        path = path / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise UserError(f"no such checkpoint: {path}")
    checkpoint = read_checkpoint(path)
    provenance, state = checkpoint["provenance"], checkpoint["state_dict"]
    averaged = any(name.startswith(_PREFIXES["ema"]) for name in state)
    if weights == "ema" and not averaged:
        raise UserError(f"{path} has no average of the weights (ema.decay was null): use --weights trained")
    weights = weights or ("ema" if averaged else "trained")
    prefix = _PREFIXES[weights]
    model = build_target(provenance["model"], "model")
    model.load_state_dict(
        {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    )
    return TrainedModel(
        model=model.to(device).eval(),
        device=torch.device(device),
        weights=weights,
        step=checkpoint["global_step"],
        provenance=provenance,
    )
