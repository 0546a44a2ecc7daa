"""Rows of (image or video, caption) in; a diffusion dataset that trains out.

    parquet rows ─ process_func ─▶ MediaSample ─ encode ─▶ LatentSample ─ write ─▶ tar shards
    (sources)      (CPU workers)                (device)                (atomic)   │
                                                                     finalise ◀────┘
    train.py ◀─ batches ◀─ DataModule ◀─ task encoder ◀─ energon ◀─ .nv-meta + shards

Importing this package is free: the names below load their module on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_data.diffusion_energon_datamodule import DiffusionDataModule
    from diffusion_data.diffusion_fake_datamodule import VideoLatentFakeDataModule
    from diffusion_data.diffusion_sample import DiffusionSample
    from diffusion_data.diffusion_taskencoder import BasicDiffusionTaskEncoder
    from diffusion_data.errors import Reason, RowRejected, UserError
    from diffusion_data.latent_sample import LatentSample
    from diffusion_data.media import Frames, MediaLoader
    from diffusion_data.process_funcs import MediaSample

__version__ = "0.1.0"

_HOME_OF = {
    "BasicDiffusionTaskEncoder": "diffusion_taskencoder",
    "DiffusionDataModule": "diffusion_energon_datamodule",
    "DiffusionSample": "diffusion_sample",
    "Frames": "media",
    "LatentSample": "latent_sample",
    "MediaLoader": "media",
    "MediaSample": "process_funcs",
    "Reason": "errors",
    "RowRejected": "errors",
    "UserError": "errors",
    "VideoLatentFakeDataModule": "diffusion_fake_datamodule",
}

__all__ = [
    "BasicDiffusionTaskEncoder",
    "DiffusionDataModule",
    "DiffusionSample",
    "Frames",
    "LatentSample",
    "MediaLoader",
    "MediaSample",
    "Reason",
    "RowRejected",
    "UserError",
    "VideoLatentFakeDataModule",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
