"""Budgets: given, or the first run's, or what the device's free memory suggests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffusion_data import batching, prepare_job
from diffusion_data.batching import BatchingConfig, Budgets, fingerprint_fields, free_bytes
from diffusion_data.errors import UserError
from diffusion_data.prepare_energon_dataset import prepare
from tests.small_source import prepare_config, source_rows, write_source

GIB = 1 << 30
PICTURE = 512 * 512


def test_budgets_below_one_are_refused() -> None:
    for name in ("pixels_per_batch", "tokens_per_batch"):
        with pytest.raises(UserError, match="pixels_per_batch and tokens_per_batch are at least 1"):
            BatchingConfig(**{name: 0})


@pytest.mark.parametrize(
    ("free", "pictures", "tokens"),
    [
        (None, 2, 4096),  # a CPU
        (70 * GIB, 16, 4096),
        (24 * GIB, 16, 4096),
        (24 * GIB - 1, 8, 2048),
        (12 * GIB, 8, 2048),
        (11 * GIB, 4, 1024),
        (5 * GIB, 2, 512),
        (0, 2, 512),
    ],
)
def test_the_defaults_follow_from_the_free_memory(free: int | None, pictures: int, tokens: int) -> None:
    assert BatchingConfig().budgets(free) == Budgets(pixels=pictures * PICTURE, tokens=tokens)


def test_what_was_given_counts_then_what_the_first_run_used() -> None:
    before = fingerprint_fields(Budgets(pixels=700, tokens=70))
    assert BatchingConfig().budgets(80 * GIB, before) == Budgets(pixels=700, tokens=70)
    assert BatchingConfig(pixels_per_batch=9).budgets(None, before) == Budgets(pixels=9, tokens=70)
    assert BatchingConfig(tokens_per_batch=9).budgets(None, before) == Budgets(pixels=700, tokens=9)


@pytest.mark.parametrize("damaged", [None, [], {}, {"pixels_per_batch": "many", "tokens_per_batch": -1}])
def test_a_first_run_that_cannot_be_read_leaves_the_defaults(damaged: object) -> None:
    assert BatchingConfig().budgets(None, damaged) == BatchingConfig().budgets(None)


def test_a_cpu_has_no_free_memory_to_go_by() -> None:
    assert free_bytes(torch.device("cpu")) is None


def test_a_run_goes_on_with_the_budgets_it_began_with_and_refuses_others_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another card, whose free memory suggests other ones."""
    source, output = write_source(tmp_path / "source.parquet", source_rows(6)), tmp_path / "out"
    config = prepare_config(source, output)
    monkeypatch.setattr(prepare_job, "free_bytes", lambda device: 10 * GIB)
    prepare(config)
    written = json.loads((output / "run/fingerprint.json").read_text())["batching"]
    assert written == {"pixels_per_batch": 4 * PICTURE, "tokens_per_batch": 1024}
    monkeypatch.setattr(prepare_job, "free_bytes", lambda device: 80 * GIB)
    prepare(config)
    with pytest.raises(UserError, match=r"batching\.tokens_per_batch: 1024 -> 4096"):
        prepare(prepare_config(source, output, batching=batching.BatchingConfig(tokens_per_batch=4096)))
