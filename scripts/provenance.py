"""What made a dataset, and what a checkpoint has to carry for its weights to be used: plain values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningDataModule

from diffusion_data.dataset_folder import DatasetFolder, read_stats
from diffusion_data.made_with import made_with


def provenance_of(model: Mapping[str, Any], datamodule: LightningDataModule, sigma_data: float) -> dict[str, Any]:
    """model: the options that built it.  datamodule: set up; what trains on no dataset folder has no `source`.

    tokenizer, text_encoder: as in the dataset's run/config.yaml; None where nobody knows, or datasets differ
    latent_scaling: shift and scale that the datamodule applied to latents; None if they are raw
    usual_size: (height, width) in pixels of most samples, or None
    """
    encoder: Any = datamodule.task_encoder  # type: ignore[attr-defined]
    folders: Sequence[DatasetFolder] = datamodule.source.folders if hasattr(datamodule, "source") else ()
    configs = [made_with(folder.path) for folder in folders]
    scaling = encoder.scaling
    return {
        "model": dict(model),
        "datasets": [str(folder.path) for folder in folders],
        "patch_spatial": encoder.patch_spatial,
        "patch_temporal": encoder.patch_temporal,
        "latent_scaling": scaling and {"shift": scaling.shift.clone(), "scale": scaling.scale.clone()},
        "sigma_data": sigma_data,
        "usual_size": _usual_size(folders),
        "tokenizer": _common([config.get("tokenizer") for config in configs]),
        "text_encoder": _common([config.get("text_encoder") for config in configs]),
    }


def _common(values: Sequence[Any]) -> Any:
    return values[0] if values and all(value == values[0] for value in values) else None


def _usual_size(folders: Sequence[DatasetFolder]) -> list[int] | None:
    counts: Counter[str] = Counter()
    for folder in folders:
        counts.update((read_stats(folder) or {}).get("resolutions", {}))
    if not counts:
        return None
    width, height = counts.most_common(1)[0][0].split("x")
    return [int(height), int(width)]
