"""A checkpoint of train.py on disk: read, and refused where a run that went on from it would be another one."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_data.errors import UserError


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Its tensors are mapped: those that nobody looks at are not read.

    Raises:
        UserError: the file is damaged, or of something else.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged, or no checkpoint") from error
    if not isinstance(checkpoint, dict) or "provenance" not in checkpoint:
        raise UserError(f"{path} is no checkpoint of this version's train.py: it doesn't tell its model")
    return checkpoint


def refuse_unfit_checkpoint(
    path: Path, *, model_options: Mapping[str, Any], weights: Mapping[str, Tensor], datamodule: str
) -> None:
    """Stop where Lightning would fail with a traceback, or begin the data anew without a word.

    model_options: that built the model
    weights: of the whole Lightning module, not yet shared out over ranks
    datamodule: its class's name, by which Lightning keeps its state

    Raises:
        UserError: naming what differs.
    """
    checkpoint = read_checkpoint(path)
    _refuse_other_options(path, checkpoint["provenance"]["model"], model_options)
    _refuse_other_weights(path, checkpoint["state_dict"], weights)
    if datamodule not in checkpoint:
        raise UserError(
            f"{path} holds no place in the data of {datamodule}, for it was trained on others: go on with the data= "
            "it was trained with, or start a new run, in another output_dir and without ckpt_path"
        )


def _refuse_other_options(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Options that only one of the two has may be a version's own; if they matter, weights differ."""
    changed = [
        f"model.{name} was {before[name]}, now {value}"
        for name, value in now.items()
        if before.get(name, value) != value
    ]
    if changed:
        raise UserError(f"{path} is of another model: {', '.join(changed)}; set what it was")


def _refuse_other_weights(path: Path, before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> None:
    averaged = [any(name.startswith("ema.") for name in weights) for weights in (before, now)]
    if averaged == [False, True]:
        raise UserError(f"{path} has no average of the weights: go on with ema.decay=null, as it was trained")
    if averaged == [True, False]:
        raise UserError(f"{path} has an average of the weights: go on with ema.decay as it was, which is now null")
    for name in sorted(before.keys() | now.keys()):
        shapes = [list(weights[name].shape) if name in weights else "missing" for weights in (before, now)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{path} is of another model: its {name} is {shapes[0]}, now {shapes[1]}")
