"""Datamodules for tests, whose workers conftest.py ends with the test: left to the garbage collector they take 5 s."""

from __future__ import annotations

import io
from typing import Any

import torch

from diffusion_data.diffusion_energon_datamodule import DiffusionDataModule

opened: list[DiffusionDataModule] = []


def module(path: Any, **options: Any) -> DiffusionDataModule:
    opened.append(DiffusionDataModule(path, **{"global_batch_size": 1, "num_workers": 0, **options}))
    return opened[-1]


def rows(loader: Any) -> list[list[int]]:
    return [[int(key[-9:]) for key in batch["__key__"]] for batch in loader]


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


def as_rank(monkeypatch: Any, rank: int, size: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(size))


def through_a_checkpoint(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
