"""What made a dataset, and what a checkpoint has to carry for its weights to be used: plain values."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import yaml
from megatron.energon.epathlib import EPath

_CONFIG, _STATS = "config.yaml", "stats.json"


def read_config(dataset: str | os.PathLike[str]) -> dict[str, Any] | None:
    """run/config.yaml of a prepared dataset, with `tokenizer` and `text_encoder`; None if its writer left none."""
    text = _read(dataset, _CONFIG)
    return None if text is None else yaml.safe_load(text)


def provenance_of(
    model: Mapping[str, Any], data: Mapping[str, Any], task_encoder: Any, sigma_data: float
) -> dict[str, Any]:
    """model, data: the options that built them.

    `tokenizer`, `text_encoder` and `usual_size`, the (height, width) of most samples, are None where nobody knows.
    """
    dataset = data.get("path")
    made_with = (read_config(dataset) if dataset else None) or {}
    return {
        "model": dict(model),
        "data": dict(data),
        "patch_spatial": task_encoder.patch_spatial,
        "patch_temporal": task_encoder.patch_temporal,
        "sigma_data": sigma_data,
        "usual_size": _usual_size(dataset) if dataset else None,
        "tokenizer": made_with.get("tokenizer"),
        "text_encoder": made_with.get("text_encoder"),
    }


def _usual_size(dataset: str) -> list[int] | None:
    text = _read(dataset, _STATS)
    resolutions = json.loads(text).get("resolutions") if text else None
    if not resolutions:
        return None
    width, height = max(resolutions, key=resolutions.__getitem__).split("x")
    return [int(height), int(width)]


def _read(dataset: str | os.PathLike[str], name: str) -> str | None:
    file = EPath(os.fspath(dataset)) / "run" / name
    return file.read_text() if file.is_file() else None
