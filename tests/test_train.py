"""scripts/train.py as a user runs it: from another folder, on the CPU, with a tiny model and fake data."""

from __future__ import annotations

import csv
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusion_data.diffusion_fake_datamodule import FakeLoader
from diffusion_data.scripts.diffusion_lightning_module import DiffusionLightningModule
from diffusion_data.scripts.train import main
from diffusion_data.scripts.train_callbacks import Checkpoints

SCRIPT = Path(__file__).parents[1] / "scripts" / "train.py"
SMALL = [
    "data.num_workers=0",
    "model.hidden_size=24",
    "model.depth=1",
    "model.num_heads=2",
    "optimizer.learning_rate=0.003",
    "output_dir=run",
]
TINY = [
    *SMALL,
    "data=fake",
    "data.latent_shapes=[[2,1,4,4],[2,2,4,4]]",
    "data.seq_length=8",
    "data.text_embedding_dim=16",
    "model.patch_channels=8",
    "model.text_embedding_dim=16",
]
DATASET = [*SMALL, "model.patch_channels=16", "model.text_embedding_dim=8"]  # as tiny_dataset's samples are
OFTEN = [
    "data.micro_batch_size=2",
    "trainer.checkpoint_every_n_steps=2",
    "trainer.val_every_n_steps=2",
    "trainer.val_batches=2",
    "optimizer.schedule=cosine",
    "optimizer.warmup_steps=2",
    "optimizer.decay_steps=6",
    "ema.decay=0.9",
]


@pytest.fixture
def train_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, one_torch_thread: None) -> Callable[..., None]:
    """Calls the entry point in this process, in tmp_path, on the CPU, with one thread as train() has."""
    monkeypatch.chdir(tmp_path)

    def call(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", *options, "trainer.accelerator=cpu"])
        main()

    return call


@pytest.fixture
def refused(
    train_here: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """refused(folder, *options): what is told when the run in `folder` can't go on with these."""

    def call(folder: Path, *options: str) -> str:
        monkeypatch.chdir(folder)
        with pytest.raises(SystemExit) as stopped:
            train_here("ckpt_path=last", *options)
        written = capsys.readouterr().err
        assert stopped.value.code == 2
        assert written.count("\n") == 1, written
        return written

    return call


def train(folder: Path, *options: str, launcher: Sequence[str] = (sys.executable,)) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*launcher, str(SCRIPT), *TINY, *options],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def rows(folder: Path, run: str = "run") -> list[dict[str, str]]:
    with (folder / run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses(folder: Path, run: str = "run") -> list[float]:
    return [float(row["train_loss"]) for row in rows(folder, run)]


def checkpoint(folder: Path, run: str = "run") -> dict:
    return torch.load(folder / run / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of 8 samples in one go, micro batches of 2, with validation and checkpoints every 2 steps."""
    folder = tmp_path_factory.mktemp("whole_run")
    done = train(folder, *OFTEN, "trainer.max_steps=4")
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    return folder


def test_every_step_has_its_row(whole_run: Path) -> None:
    assert [row["step"] for row in rows(whole_run)] == ["1", "2", "3", "4"]
    # Of a network that knows next to nothing yet: the latents' variance, 1, times a weight from 1 to 5.
    assert all(0.9 < loss < 5.5 for loss in losses(whole_run))
    assert [float(row["learning_rate"]) for row in rows(whole_run)] == pytest.approx(
        [0.003 * share for share in (0.5, 1, 1, (1 + math.cos(math.pi / 4)) / 2)]  # 2 steps of warm-up, 4 of cosine
    )


def test_rows_tell_how_fast_and_how_full_steps_are(whole_run: Path) -> None:
    for row in rows(whole_run):
        samples, tokens = float(row["samples_per_second"]), float(row["tokens_per_second"])
        assert 0 < samples < 1e5
        assert 4 < tokens / samples < 8  # patches of the two shapes
        assert float(row["padding_share"]) == pytest.approx(1 - tokens / samples / 8, abs=1e-3)  # padded to 8
        assert 0 < float(row["data_wait_share"]) < 1


def test_tensorboard_shows_what_the_rows_hold(whole_run: Path) -> None:
    events = EventAccumulator(str(whole_run / "run" / "tensorboard"))
    events.Reload()

    for name in rows(whole_run)[0].keys() - {"step", "seconds"}:
        curve = [(str(event.step), event.value) for event in events.Scalars(name)]
        assert curve == [(row["step"], pytest.approx(float(row[name]))) for row in rows(whole_run)]


def test_every_validation_has_its_row(whole_run: Path) -> None:
    with (whole_run / "run" / "validation.csv").open(newline="") as file:
        validations = list(csv.DictReader(file))

    assert [row["step"] for row in validations] == ["2", "4"]
    assert all(0.5 < float(row["val_loss"]) < 3 for row in validations)


def test_run_folder_holds_checkpoints_curves_and_config(whole_run: Path) -> None:
    run = whole_run / "run"
    names = sorted(path.name for path in (run / "checkpoints").iterdir())

    assert names == ["last.ckpt", "step_000002.ckpt", "step_000004.ckpt"]
    assert len(list((run / "tensorboard").glob("events.*"))) == 1
    assert "micro_batch_size: 2" in (run / "config.yaml").read_text()
    assert sorted(path.name for path in whole_run.iterdir()) == ["run", "stderr", "stdout"]


def test_output_is_progress_and_a_summary_without_warnings(whole_run: Path) -> None:
    summary = (whole_run / "stdout").read_text()
    progress = (whole_run / "stderr").read_text().splitlines()

    assert "4 steps (up to step 4)" in summary
    assert "ckpt_path=last" in summary
    assert "samples/s" in progress[-1]
    assert progress[-1].startswith("step 4/4  train_loss ")
    assert all(line.startswith("step ") for line in progress), progress


def test_global_batch_is_accumulated_from_micro_batches(whole_run: Path) -> None:
    assert checkpoint(whole_run)["micro_batches_done"] == 16  # 4 steps x 8 samples / 2


def test_resumed_run_is_the_uninterrupted_one(whole_run: Path, train_here: Callable[..., None], tmp_path: Path) -> None:
    train_here(*TINY, *OFTEN, "trainer.max_steps=2")
    train_here(*TINY, *OFTEN, "trainer.max_steps=4", "ckpt_path=last")

    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3", "4"]
    assert losses(tmp_path) == losses(whole_run)
    for name, weight in checkpoint(whole_run)["state_dict"].items():
        assert torch.equal(weight, checkpoint(tmp_path)["state_dict"][name]), name


def test_seconds_go_on_after_a_resume(whole_run: Path, train_here: Callable[..., None], tmp_path: Path) -> None:
    shutil.copytree(whole_run / "run", tmp_path / "run", symlinks=True)
    table = tmp_path / "run" / "metrics.csv"
    before = rows(tmp_path)
    table.write_text(table.read_text().replace(f",{before[3]['seconds']},", ",1000.5,"))
    train_here(*TINY, *OFTEN, "trainer.max_steps=5", "ckpt_path=last")

    seconds = [float(row["seconds"]) for row in rows(tmp_path)]
    assert seconds[3] == 1000.5
    assert 1000.5 < seconds[4] < 1500


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.hidden_size=32", "model.depth=2"], "model.hidden_size was 24, now 32, model.depth was 1, now 2"),
        (["ema.decay=null"], "run/checkpoints/last.ckpt has an average of the weights: go on with ema.decay as it was"),
    ],
)
def test_another_model_cannot_go_on_from_a_checkpoint(
    whole_run: Path, refused: Callable[..., str], options: list[str], message: str
) -> None:
    assert message in refused(whole_run, *TINY, *OFTEN, *options)


def test_other_data_do_not_begin_anew_from_a_checkpoint(
    whole_run: Path, refused: Callable[..., str], make_tiny_dataset: Callable[..., Path]
) -> None:
    same_model = ["model.patch_channels=8", "model.text_embedding_dim=16", "ema.decay=0.9"]
    told = refused(whole_run, *SMALL, *same_model, f"data.path={make_tiny_dataset(8)}")

    assert "last.ckpt holds no place in the data of DiffusionDataModule" in told
    assert "go on with the data= it was trained with, or start a new run" in told


def test_a_damaged_checkpoint_is_told_as_such(whole_run: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    shutil.copytree(whole_run / "run", tmp_path / "damaged" / "run")
    last = tmp_path / "damaged" / "run" / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])

    assert "last.ckpt is damaged, or no checkpoint" in refused(tmp_path / "damaged", *TINY, *OFTEN)


def test_validation_without_a_val_split_is_refused(
    tmp_path: Path, refused: Callable[..., str], make_tiny_dataset: Callable[..., Path]
) -> None:
    options = [*DATASET, f"data.path={make_tiny_dataset(8)}", "trainer.val_every_n_steps=1", "ckpt_path=null"]

    assert "trainer.val_every_n_steps: there is no val split to validate on" in refused(tmp_path, *options)
    assert "there is no val split" in refused(tmp_path, *TINY, "data.num_val_samples=0", *OFTEN, "ckpt_path=null")


LAYOUTS = {
    "padded": ["data.micro_batch_size=2", "data.global_batch_size=4", "trainer.val_every_n_steps=2"],
    "packed": [
        "data.micro_batch_size=1",
        "data.global_batch_size=2",
        "data.max_seq_length=20",
        "data.packing_buffer_size=6",
        "data.num_workers=1",
    ],
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_run_on_a_dataset_resumes_with_the_same_samples_and_losses(
    layout: str,
    make_tiny_dataset: Callable[..., Path],
    train_here: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Six steps, over the end of an epoch, against three starts of two steps each."""
    dataset = make_tiny_dataset(17, per_shard=1, split={"train": 14, "val": 3})
    options = [*DATASET, *LAYOUTS[layout], f"data.path={dataset}", "data.task_encoder.text_dropout=0.3"]
    options += ["data.shuffle_buffer_size=4", "data.task_encoder.latent_scaling=per_channel"]
    options += ["ema.decay=0.9"]
    keys: list[list[str]] = []
    train_step = DiffusionLightningModule.training_step

    def training_step(module: DiffusionLightningModule, batch: dict[str, Any], number: int) -> torch.Tensor:
        keys.append(batch["__key__"])
        return train_step(module, batch, number)

    monkeypatch.setattr(DiffusionLightningModule, "training_step", training_step)
    train_here(*options, "trainer.max_steps=6", "output_dir=whole")
    expected = keys.copy()
    keys.clear()
    for last in (2, 4, 6):
        train_here(*options, f"trainer.max_steps={last}", "output_dir=resumed", "ckpt_path=auto")

    assert len(expected) == 12  # of two micro batches a step
    assert len({key for batch in expected for key in batch}) == 14
    assert keys == expected
    assert losses(tmp_path, "resumed") == losses(tmp_path, "whole")
    if layout == "padded":
        validations = [(tmp_path / run / "validation.csv").read_text() for run in ("whole", "resumed")]
        assert validations[0].count("\n") == 4
        assert validations[1] == validations[0]


def test_the_average_of_the_weights_is_saved_beside_them(whole_run: Path) -> None:
    state = checkpoint(whole_run)["state_dict"]
    averages = {name: value for name, value in state.items() if name.startswith("ema.model.")}

    assert {name.removeprefix("ema.") for name in averages} == state.keys() - averages.keys()
    assert not torch.equal(averages["ema.model.output.bias"], state["model.output.bias"])


TWO_STEPS = ["trainer.max_steps=2", "data.micro_batch_size=2", "trainer.checkpoint_every_n_steps=1"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of 8 samples, micro batches of 2, a checkpoint at each step."""
    folder = tmp_path_factory.mktemp("two_processes")
    done = train(folder, *TWO_STEPS, launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


def test_two_processes_share_the_global_batch(two_processes: Path) -> None:
    assert len(losses(two_processes)) == 2
    assert checkpoint(two_processes)["micro_batches_done"] == 4  # on each: 2 steps x 8 samples / 2 / 2 processes
    assert (two_processes / "stdout").read_text().count("2 steps (up to step 2)") == 1


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same two steps with sharded weights, resumed after the first."""
    folder = tmp_path_factory.mktemp("sharded")
    options = [*TWO_STEPS, "trainer.strategy=fsdp", "trainer.val_every_n_steps=1"]
    for more in (["trainer.max_steps=1"], ["ckpt_path=last"]):
        done = train(folder, *options, *more, launcher=TORCHRUN)
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
    return folder


def test_sharded_training_is_the_same_and_resumes(two_processes: Path, sharded: Path) -> None:
    assert losses(sharded) == pytest.approx(losses(two_processes), rel=1e-5)
    assert_same_checkpoint(checkpoint(sharded), checkpoint(two_processes))


@pytest.mark.parametrize(("begun_with", "strategy"), [("two_processes", "fsdp"), ("sharded", "ddp")])
def test_a_run_goes_on_with_the_other_strategy(
    begun_with: str, strategy: str, two_processes: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    shutil.copytree(request.getfixturevalue(begun_with) / "run", tmp_path / "run", symlinks=True)
    options = [*TWO_STEPS, f"trainer.strategy={strategy}", "ckpt_path=run/checkpoints/step_000001.ckpt"]
    done = train(tmp_path, *options, launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr

    assert losses(tmp_path) == pytest.approx(losses(two_processes), rel=1e-5)
    assert_same_checkpoint(checkpoint(tmp_path), checkpoint(two_processes))


def assert_same_checkpoint(saved: dict[str, Any], expected: dict[str, Any]) -> None:
    """Weights, their average, and what the optimizer knows of each parameter, which each strategy keeps its own way."""
    assert saved["state_dict"].keys() == expected["state_dict"].keys()
    for name, value in expected["state_dict"].items():
        torch.testing.assert_close(saved["state_dict"][name], value, rtol=1e-3, atol=1e-4, msg=name)
    (optimizer,), (expected_optimizer,) = saved["optimizer_states"], expected["optimizer_states"]
    assert optimizer["state"].keys() == expected_optimizer["state"].keys()
    for name, state in expected_optimizer["state"].items():
        torch.testing.assert_close(optimizer["state"][name]["exp_avg"], state["exp_avg"], rtol=1e-3, atol=1e-5)
        assert optimizer["state"][name]["step"] == state["step"]
    assert [group["params"] for group in optimizer["param_groups"]] == [
        group["params"] for group in expected_optimizer["param_groups"]
    ]
    assert saved["micro_batches_done"] == expected["micro_batches_done"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data=energon"], "missing option data.path (the folder that prepare_energon_dataset.py made"),
        ([*TINY, "trainer.max_step=3"], "unknown option trainer.max_step: did you mean trainer.max_steps?"),
        ([*TINY, "ckpt_path=last"], "run/checkpoints/last.ckpt does not exist; set output_dir="),
        ([*TINY, "trainer.strategy=fsdp"], "trainer.strategy=fsdp is for several processes"),
        ([*TINY, "optimizer.schedule=linear"], "schedule must be constant or cosine, got 'linear'"),
        ([*TINY, "trainer.max_steps=0"], "trainer: max_steps must be at least 1, got 0"),
        ([*TINY, "trainer.val_batches=0"], "trainer: val_batches must be at least 1, got 0"),
        ([*TINY, "data.global_batch_size=3", "data.micro_batch_size=2"], "global_batch_size=3 is not divisible"),
        ([*TINY, "data.task_encoder.filters.num_frames.min=2"], "leave out fake samples (num_frames_out_of_bounds "),
        ([*TINY, "model.patch_channels=64"], "the model expects 64; set model.patch_channels=8"),
    ],
)
def test_mistakes_are_one_line(
    train_here: Callable[..., None], capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        train_here(*options)

    written = capsys.readouterr().err
    assert stopped.value.code == 2
    assert written.count("\n") == 1, written
    assert message in written


def test_a_loader_without_batches_stops_the_run(
    train_here: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeLoader, "__iter__", lambda loader: iter(()))
    with pytest.raises(SystemExit):
        train_here(*TINY)

    assert "the training data ended at once" in capsys.readouterr().err


def test_a_run_that_fails_leaves_no_thread_that_writes(
    train_here: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeLoader, "__iter__", lambda loader: iter(()))
    before = set(threading.enumerate())
    with pytest.raises(SystemExit):
        train_here(*TINY)

    assert Path("run", "tensorboard").is_dir()
    assert set(threading.enumerate()) <= before


class StepsOnly:
    """As much of a Trainer as saving a checkpoint takes."""

    is_global_zero = True

    def __init__(self, global_step: int) -> None:
        self.global_step = global_step
        self.max_steps = 10**9

    def save_checkpoint(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"saved at {self.global_step}")


def kept_checkpoints(folder: Path, first_step: int, *saved_steps: int, keep: int) -> list[int]:
    """Goes on from first_step, saves at saved_steps, and tells of which steps there are checkpoints then."""
    metrics: Any = SimpleNamespace(write=lambda trainer: None)
    callback = Checkpoints(folder, metrics, every_n_steps=100, keep=keep)
    trainer: Any = StepsOnly(first_step)
    module: Any = None
    callback.on_train_start(trainer, module)
    for trainer.global_step in saved_steps:
        callback.on_train_batch_end(trainer, module, None, None, 0)
    last = folder / "checkpoints" / "last.ckpt"
    assert last.read_text() == f"saved at {trainer.global_step}"
    return sorted(int(path.stem.removeprefix("step_")) for path in last.parent.glob("step_*"))


def test_the_newest_checkpoints_by_number_are_kept(tmp_path: Path) -> None:
    assert kept_checkpoints(tmp_path, 0, 999_400, 999_500, 1_000_000, keep=2) == [999_500, 1_000_000]
    assert kept_checkpoints(tmp_path, 1_000_000, 1_000_100, keep=1) == [1_000_100]


def test_going_on_from_an_earlier_step_drops_the_later_checkpoints(tmp_path: Path) -> None:
    assert kept_checkpoints(tmp_path, 0, 500, 1000, keep=2) == [500, 1000]
    shutil.copytree(tmp_path, tmp_path / "copy", symlinks=True)
    assert kept_checkpoints(tmp_path, 500, keep=1) == [500]
    assert kept_checkpoints(tmp_path / "copy", 500, 600, keep=1) == [600]


def test_going_on_from_elsewhere_drops_them_only_when_there_is_a_checkpoint(tmp_path: Path) -> None:
    kept_checkpoints(tmp_path, 0, 1000, keep=1)
    metrics: Any = None
    elsewhere: Any = StepsOnly(500)
    Checkpoints(tmp_path, metrics, every_n_steps=100, keep=3).on_train_start(elsewhere, metrics)
    assert (tmp_path / "checkpoints" / "last.ckpt").read_text() == "saved at 1000"
    assert kept_checkpoints(tmp_path, 500, 600, keep=3) == [600]


def test_a_checkpoint_that_the_user_named_is_left_alone(tmp_path: Path) -> None:
    kept_checkpoints(tmp_path, 0, 100, keep=1)
    best = tmp_path / "checkpoints" / "step_100_best.ckpt"
    best.write_text("a copy")
    callback = Checkpoints(tmp_path, SimpleNamespace(write=lambda trainer: None), every_n_steps=100, keep=1)  # type: ignore[arg-type]
    trainer: Any = StepsOnly(200)
    callback.on_train_batch_end(trainer, trainer, None, None, 0)
    assert sorted(path.name for path in best.parent.iterdir()) == ["last.ckpt", "step_000200.ckpt", best.name]


def test_a_finished_run_is_not_overwritten(
    whole_run: Path,
    train_here: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(whole_run)
    with pytest.raises(SystemExit):
        train_here(*TINY)

    assert "output_dir=run holds a run; continue it with ckpt_path=last" in capsys.readouterr().err
