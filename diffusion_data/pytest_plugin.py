"""pytest fixtures that make a tiny real dataset. In a conftest.py:

pytest_plugins = ["diffusion_data.pytest_plugin"]
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from diffusion_data.testing import tiny_samples, write_dataset

MakeDataset = Callable[..., Path]


@pytest.fixture
def make_tiny_dataset(tmp_path: Path) -> MakeDataset:
    """make(num_samples=8, latent_shapes=..., **options of `testing.write_dataset`) -> a new dataset folder."""
    numbers = count()

    def make(num_samples: int = 8, latent_shapes: Any = None, **options: Any) -> Path:
        samples = tiny_samples(num_samples, latent_shapes) if latent_shapes else tiny_samples(num_samples)
        return write_dataset(tmp_path / f"tiny_dataset_{next(numbers)}", samples, **options)

    return make


@pytest.fixture
def tiny_dataset(make_tiny_dataset: MakeDataset) -> Path:
    """10 samples, pictures and clips of latent shapes (4, 1, 4, 4), (4, 1, 4, 8) and (4, 3, 4, 4), texts 8 wide: 6 to
    train on, 2 to validate and 2 to test."""
    return make_tiny_dataset(10, per_shard=2, split={"train": 3, "val": 1, "test": 1})
