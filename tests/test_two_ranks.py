"""Two processes on the CPU: what each rank sees, and that a run killed at any step goes on as if it had not been.

DIFFUSION_DATA_TEST_ALL=1 kills the packed run as often as the padded one. DIFFUSION_DATA_TEST_SEED=N repeats the kills
of the run that said so.
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
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from diffusion_data.diffusion_energon_datamodule import DiffusionDataModule
from diffusion_data.diffusion_taskencoder import BasicDiffusionTaskEncoder
from tests.rank_processes import run_ranks
from tests.tiny_dataset import tiny_samples, write_dataset

STEPS = 12
KILLS = 10
KILLS_WITH_WORKERS = KILLS if os.environ.get("DIFFUSION_DATA_TEST_ALL") == "1" else 2  # whose starts take longer


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
        torch.nn.init.ones_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)
        self.log_path = log
        self.kill_at = kill_at

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])

    def note(self, kind: str, number: Any, *what: Any) -> None:
        with self.log_path.open("a") as log:
            log.write(json.dumps([kind, number, *what]) + "\n")

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        return self.layer(batch["video"].float().mean().view(1, 1)).sum()

    def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
        number = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1
        if number == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.note("train", number, batch["__key__"], batch["seq_len_kv"].tolist())
        return self.loss(batch)

    def validation_step(self, batch: dict[str, Any], number: int) -> None:
        self.note("val", [self.validation, number], batch["__key__"], batch["seq_len_kv"].tolist())
        self.log("val_loss", self.loss(batch), batch_size=1, sync_dist=True)  # all ranks wait for each other here

    def on_validation_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.note("val_loss", [self.validation, "all"], float(self.trainer.callback_metrics["val_loss"]))

    @property
    def validation(self) -> int | str:
        return "sanity check" if self.trainer.sanity_checking else self.trainer.global_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


class SaveEveryStep(pl.Callback):
    """Lightning's ModelCheckpoint would save once more within the first step after a resume, without its gradients."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved_step = 0

    def on_train_start(self, trainer: pl.Trainer, _: pl.LightningModule) -> None:
        self.saved_step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step > self.saved_step:
            self.saved_step = trainer.global_step
            trainer.save_checkpoint(self.folder / f"step={self.saved_step}.ckpt")

    def newest(self) -> Path | None:
        steps = [int(path.stem.removeprefix("step=")) for path in self.folder.glob("*.ckpt")]
        return self.folder / f"step={max(steps)}.ckpt" if steps else None


def fit(
    dataset: Path,
    folder: Path,
    options: dict[str, Any],
    kill: tuple[int, int] | None,
    max_steps: int = STEPS,
    sharded: bool = False,
) -> None:
    """A rank of a training run that goes on from its newest checkpoint. kill: (rank, micro batch)."""
    data = make_data(dataset, **options)
    rank = int(os.environ["RANK"])
    module = Recorder(folder / f"rank{rank}.jsonl", kill[1] if kill and kill[0] == rank else None)
    checkpoints = SaveEveryStep(folder)
    trainer = pl.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=ModelParallelStrategy(2, 1, save_distributed_checkpoint=False) if sharded else "ddp",
        plugins=[TorchElasticEnvironment()],
        logger=False,
        use_distributed_sampler=False,
        accumulate_grad_batches=data.gradient_accumulation_steps,
        val_check_interval=4 * data.gradient_accumulation_steps,
        check_val_every_n_epoch=None,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[checkpoints],
        enable_checkpointing=False,
    )
    trainer.fit(module, data, ckpt_path=checkpoints.newest())


def seen(folder: Path, rank: int) -> Iterator[tuple[Any, ...]]:
    for line in (folder / f"rank{rank}.jsonl").read_text().splitlines():
        yield tuple(json.loads(line))


def trained(folder: Path, rank: int) -> dict[int, Any]:
    """Micro batch -> keys and text lengths; a batch that was seen again after a resume must be the same one."""
    batches: dict[int, Any] = {}
    for kind, number, *what in seen(folder, rank):
        if kind == "train":
            assert batches.setdefault(number, what) == what
    return batches


def validated(folder: Path, rank: int) -> dict[tuple[int | str, int | str], Any]:
    """(Step, batch) -> keys and text lengths, (step, "all") -> val_loss; the same each time it was done."""
    validations: dict[tuple[int | str, int | str], Any] = {}
    for kind, number, *what in seen(folder, rank):
        if kind != "train":
            assert validations.setdefault(tuple(number), what) == what
    return validations


def validated_rows(folder: Path, step: int) -> list[int]:
    """Of both ranks, which have unequally many."""
    entries = [what for rank in range(2) for number, what in validated(folder, rank).items() if number[0] == step]
    return sorted(int(key[-9:]) for keys, *_ in entries if isinstance(keys, list) for key in keys)


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
    seed = int(os.environ.get("DIFFUSION_DATA_TEST_SEED", random.randrange(10**6)))
    print(f"DIFFUSION_DATA_TEST_SEED={seed}")
    rng = random.Random(seed)
    kills = KILLS_WITH_WORKERS if CASES[case]["num_workers"] else KILLS
    for place in sorted(rng.sample(range(2, 2 * STEPS), kills)):
        kill = (rng.randrange(2), place)
        assert -signal.SIGKILL in run_ranks(2, fit, dataset, killed, CASES[case], kill)
    assert run_ranks(2, fit, dataset, killed, CASES[case], None) == [0, 0]
    for rank in range(2):
        assert list(trained(whole, rank)) == list(range(2 * STEPS))
        assert trained(killed, rank) == trained(whole, rank)
        assert validated(killed, rank) == validated(whole, rank)
    keys = [{key for keys, _ in trained(whole, rank).values() for key in keys} for rank in range(2)]
    assert not keys[0] & keys[1]
    texts = [length for lengths in trained(whole, 0).values() for length in lengths[1]]
    assert 1 in texts  # a dropped caption has one token
    assert [validated_rows(whole, step) for step in (4, 8, 12)] == [[28, 29, 30, 31, 32]] * 3


def test_a_run_with_sharded_weights_under_lightning_goes_on_as_if_uninterrupted(dataset: Path, tmp_path: Path) -> None:
    folders = whole, resumed, alike = [tmp_path / name for name in ("whole", "resumed", "alike")]
    for folder in folders:
        folder.mkdir()
    options = {"num_workers": 0}
    for folder, steps, sharded in ((whole, 8, True), (resumed, 5, True), (resumed, 8, True), (alike, 8, False)):
        assert run_ranks(2, fit, dataset, folder, options, None, steps, sharded) == [0, 0]
    for rank in range(2):
        assert list(trained(whole, rank)) == list(range(2 * 8))
        assert trained(resumed, rank) == trained(whole, rank) == trained(alike, rank)
        assert validated(resumed, rank) == validated(whole, rank) == validated(alike, rank)
    assert [validated_rows(whole, step) for step in (4, 8)] == [[28, 29, 30, 31, 32]] * 2
    weights, expected = (torch.load(folder / "step=8.ckpt", weights_only=True)["state_dict"] for folder in folders[1:])
    torch.testing.assert_close(weights, expected)


def plain_loop(dataset: Path, folder: Path, options: dict[str, Any], num_batches: int) -> None:
    """A rank without Lightning, which goes on from the state in `folder` and leaves its own there."""
    torch.distributed.init_process_group("gloo")
    data = make_data(dataset, **options)
    state = folder / "state.pt"
    if state.exists():
        data.load_state_dict(torch.load(state, weights_only=True))
    batches = iter(data.train_dataloader())
    rank = torch.distributed.get_rank()
    with (folder / f"rank{rank}.jsonl").open("w") as log:
        for number in range(num_batches):
            batch = next(batches)
            log.write(json.dumps(["train", number, batch["__key__"], batch["seq_len_kv"].tolist()]) + "\n")
    saved = data.state_dict()
    if rank == 0:
        torch.save(saved, state)
    data.teardown()
    torch.distributed.destroy_process_group()


def test_as_many_workers_on_another_number_of_ranks_go_on_where_they_were(dataset: Path, tmp_path: Path) -> None:
    options = {"max_seq_length": 24, "packing_buffer_size": 6, "virtual_epoch_length": 40}

    def run(ranks: int, num_workers: int, num_batches: int) -> list[list[Any]]:
        here = {**options, "num_workers": num_workers}
        assert run_ranks(ranks, plain_loop, dataset, tmp_path, here, num_batches) == [0] * ranks
        return [list(trained(tmp_path, rank).values()) for rank in range(ranks)]

    begun = run(2, 1, 3)
    (tmp_path / "state.pt").rename(tmp_path / "begun.pt")
    begun_and_more = run(2, 1, 7)
    assert [batches[:3] for batches in begun_and_more] == begun
    (tmp_path / "begun.pt").rename(tmp_path / "state.pt")
    (one_rank,) = run(1, 2, 4)
    assert one_rank == [
        batch for pair in zip(*(batches[3:5] for batches in begun_and_more), strict=True) for batch in pair
    ]
    assert torch.load(tmp_path / "state.pt", weights_only=True)["batches_done"] == 10
    assert run(2, 1, 2) == [batches[5:7] for batches in begun_and_more]


def test_lightning_goes_on_with_the_same_steps_on_another_number_of_ranks(dataset: Path, tmp_path: Path) -> None:
    """Steps 3 to 6 of one rank with two workers have the samples that two ranks with one each would have."""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    for folder in (whole, moved):
        folder.mkdir()
    assert run_ranks(2, fit, dataset, whole, {"num_workers": 1}, None, 6) == [0, 0]
    assert run_ranks(2, fit, dataset, moved, {"num_workers": 1}, None, 3) == [0, 0]
    (moved / "rank0.jsonl").unlink()
    assert run_ranks(1, fit, dataset, moved, {"num_workers": 2}, None, 6) == [0]
    keys = [[what for kind, _, *what in seen(whole, rank) if kind == "train"] for rank in range(2)]
    alone = [what for kind, _, *what in seen(moved, 0) if kind == "train"]
    assert len(alone) == 3 * 4
    assert alone == [batch for pair in zip(keys[0][6:], keys[1][6:], strict=True) for batch in pair]


def train_sharded(dataset: Path, folder: Path) -> None:
    """A rank of a plain loop with fully sharded weights, which waits for the others in every step."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    data = make_data(dataset, num_workers=0, device_mesh=mesh)
    model = torch.nn.Linear(16, 4)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with (folder / f"rank{torch.distributed.get_rank()}.jsonl").open("w") as log:
        for number, batch in enumerate(data.train_dataloader()):
            model(batch["video"].float()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            log.write(json.dumps(["train", number, batch["__key__"], []]) + "\n")
        for number, batch in enumerate(data.val_dataloader()):
            model(batch["video"].float())
            log.write(json.dumps(["val", number, batch["__key__"], []]) + "\n")
    torch.distributed.destroy_process_group()


def test_sharded_weights_and_uneven_validation_in_a_plain_loop(dataset: Path, tmp_path: Path) -> None:
    assert run_ranks(2, train_sharded, dataset, tmp_path) == [0, 0]
    entries = [list(seen(tmp_path, rank)) for rank in range(2)]
    for kind, expected in (("train", range(28)), ("val", range(28, 33))):
        shares = [[int(key[-9:]) for entry in each if entry[0] == kind for key in entry[2]] for each in entries]
        assert sorted(shares[0] + shares[1]) == list(expected)
    assert [len(each) for each in entries] == [14 + 3, 14 + 3]


def validate_packed(dataset: Path, folder: Path, options: dict[str, Any]) -> None:
    torch.distributed.init_process_group("gloo")
    data = make_data(dataset, num_workers=0, **options)
    loader = data.val_dataloader()
    with (folder / f"rank{torch.distributed.get_rank()}.jsonl").open("w") as log:
        for repetition in range(2):
            for batch in loader:
                torch.distributed.barrier()
                log.write(json.dumps([repetition, 0, batch["__key__"], int(batch["loss_mask"].sum())]) + "\n")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("options", [{"max_seq_length": 12, "packing_buffer_size": 2}, {"bucket_by_shape": True}])
def test_ranks_agree_when_packed_or_bucketed_validation_ends(
    dataset: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    assert run_ranks(2, validate_packed, dataset, tmp_path, options) == [0, 0]
    entries = [list(seen(tmp_path, rank)) for rank in range(2)]
    assert len(entries[0]) == len(entries[1])
    for each in entries:
        assert [entry[2] for entry in each if entry[0] == 0] == [entry[2] for entry in each if entry[0] == 1]
        assert all((positions == 0) == (not keys) for _, _, keys, positions in each)
    first_pass = [key for each in entries for entry in each if entry[0] == 0 for key in entry[2]]
    assert sorted(int(key[-9:]) for key in first_pass) == [28, 29, 30, 31, 32]
