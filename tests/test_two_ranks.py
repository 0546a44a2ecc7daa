"""Two processes on the CPU: what each rank sees, and that a run killed at any step goes on as if it had not been.

DIFFUSION_DATA_KILLS=10 kills that often instead of twice.
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.environments import TorchElasticEnvironment

from diffusion_data.diffusion_energon_datamodule import DiffusionDataModule
from diffusion_data.diffusion_taskencoder import BasicDiffusionTaskEncoder
from tests.rank_processes import run_ranks
from tests.tiny_dataset import tiny_samples, write_dataset

KILLS = int(os.environ.get("DIFFUSION_DATA_KILLS", 2))
STEPS = 12


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """28 samples to train on, 5 to validate on, which two ranks can't share evenly."""
    folder = tmp_path_factory.mktemp("two_ranks") / "ds"
    return write_dataset(folder, tiny_samples(33), per_shard=1, split={"train": 28, "val": 5})


def make_data(dataset: Path, **options: Any) -> DiffusionDataModule:
    encoder = BasicDiffusionTaskEncoder(text_embedding_padding_size=8, text_dropout=0.3)
    return DiffusionDataModule(dataset, **{"global_batch_size": 4, "task_encoder": encoder, **options})


class Recorder(pl.LightningModule):
    """Writes down what it sees, a line a batch, and dies in the step it is told to."""

    def __init__(self, log: Path, kill_at: int | None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.log_path = log
        self.kill_at = kill_at

    def note(self, kind: str, number: int, batch: dict[str, Any]) -> None:
        with self.log_path.open("a") as log:
            log.write(json.dumps([kind, number, batch["__key__"], batch["seq_len_kv"].tolist()]) + "\n")

    def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
        number = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1
        if number == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.note("train", number, batch)
        return self.layer(batch["video"].float().mean().view(1, 1)).sum()

    def validation_step(self, batch: dict[str, Any], number: int) -> None:
        self.note("val", number, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(dataset: Path, folder: Path, options: dict[str, Any], kill: tuple[int, int] | None) -> None:
    """A rank of a training run that goes on from its newest checkpoint. kill: (rank, micro batch)."""
    data = make_data(dataset, **options)
    rank = int(os.environ["RANK"])
    module = Recorder(folder / f"rank{rank}.jsonl", kill[1] if kill and kill[0] == rank else None)
    checkpoints = pl.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        plugins=[TorchElasticEnvironment()],
        logger=False,
        use_distributed_sampler=False,
        accumulate_grad_batches=data.gradient_accumulation_steps,
        val_check_interval=4 * data.gradient_accumulation_steps,
        check_val_every_n_epoch=None,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[checkpoints],
    )
    done = sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    trainer.fit(module, data, ckpt_path=done[-1] if done else None)


def seen(folder: Path, rank: int) -> Iterator[tuple[str, int, list[str], list[int]]]:
    for line in (folder / f"rank{rank}.jsonl").read_text().splitlines():
        yield tuple(json.loads(line))


def trained(folder: Path, rank: int) -> dict[int, Any]:
    """Micro batch -> keys and text lengths; a batch that was seen again after a resume must be the same one."""
    batches: dict[int, Any] = {}
    for kind, number, *what in seen(folder, rank):
        if kind == "train":
            assert batches.setdefault(number, what) == what
    return batches


CASES = {
    "padded": {"num_workers": 0, "micro_batch_size": 1},
    "packed, 2 workers": {
        "num_workers": 2,
        "max_seq_length": 24,
        "packing_buffer_size": 6,
        "virtual_epoch_length": 6,
        "micro_batch_size": 1,
    },
}


@pytest.mark.parametrize("case", list(CASES))
def test_a_run_killed_at_random_steps_sees_what_an_uninterrupted_one_sees(
    dataset: Path, tmp_path: Path, case: str
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    assert run_ranks(2, fit, dataset, whole, CASES[case], None) == [0, 0]
    rng = random.Random(case)
    for place in sorted(rng.sample(range(2, 2 * STEPS), KILLS)):
        kill = (rng.randrange(2), place)
        assert -signal.SIGKILL in run_ranks(2, fit, dataset, killed, CASES[case], kill)
    assert run_ranks(2, fit, dataset, killed, CASES[case], None) == [0, 0]
    for rank in range(2):
        assert list(trained(whole, rank)) == list(range(2 * STEPS))
        assert trained(killed, rank) == trained(whole, rank)
    keys = [{key for keys, _ in trained(whole, rank).values() for key in keys} for rank in range(2)]
    assert not keys[0] & keys[1]
    texts = [length for lengths in trained(whole, 0).values() for length in lengths[1]]
    assert 1 in texts  # a dropped caption has one token
    last_validation = [[entry for entry in seen(whole, rank) if entry[0] == "val"] for rank in range(2)]
    if case == "padded":
        validated = [key for entries in last_validation for entry in entries[-3:] for key in entry[2]]
        assert sorted(int(key[-9:]) for key in validated) == [28, 29, 30, 31, 32]
