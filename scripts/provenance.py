"""What made a dataset, and what a checkpoint has to carry for its weights to be used: plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from megatron.energon.epathlib import EPath


def dataset_config(dataset: str) -> dict[str, Any] | None:
    """run/config.yaml of a prepared dataset, with `tokenizer` and `text_encoder`; None if its writer left none."""
    file = EPath(str(dataset)) / "run" / "config.yaml"
    return yaml.safe_load(file.read_text()) if file.is_file() else None


def provenance_of(
    model: Mapping[str, Any], data: Mapping[str, Any], task_encoder: Any, sigma_data: float
) -> dict[str, Any]:
    """model, data: the options that built them. `tokenizer` and `text_encoder` are None where nobody knows."""
    made_with = (dataset_config(data["path"]) if data.get("path") else None) or {}
    return {
        "model": dict(model),
        "data": dict(data),
        "patch_spatial": task_encoder.patch_spatial,
        "patch_temporal": task_encoder.patch_temporal,
        "sigma_data": sigma_data,
        "tokenizer": made_with.get("tokenizer"),
        "text_encoder": made_with.get("text_encoder"),
    }
