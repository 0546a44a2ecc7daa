"""What a run leaves behind and shows: metrics.csv and TensorBoard events, progress, checkpoints.

<output_dir>/metrics.csv            one row an optimizer step: COLUMNS
<output_dir>/validation.csv         step,val_loss: one row a validation
<output_dir>/tensorboard/           the same
<output_dir>/config.yaml            every option, resolved
<output_dir>/checkpoints/           step_000500.ckpt, ..., and last.ckpt, the newest of them
"""

from __future__ import annotations

import csv
import os
import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from diffusion_data.errors import UserError
from diffusion_data.scripts import throughput
from diffusion_data.scripts.throughput import Throughput

COLUMNS = ("step", "train_loss", "learning_rate", "seconds", *throughput.COLUMNS)
VALIDATION_COLUMNS = ("step", "val_loss")
LAST_CHECKPOINT = Path("checkpoints", "last.ckpt")
METRICS_FILE = "metrics.csv"
VALIDATION_FILE = "validation.csv"

_SECONDS_BETWEEN_LINES = 10.0  # of progress in a log file


class Metrics(Callback):
    """Writes a row for every optimizer step, and shows progress. Runs on all ranks; rank 0 writes.

    Losses stay on the device until `every_n_steps` of them are fetched, and averaged over ranks, at once. The rates
    of such steps are the same, those of all of them together: in between nobody knows how far the device has come.
    resolved_config: kept as config.yaml.
    """

    def __init__(
        self,
        output_dir: Path,
        resolved_config: str,
        every_n_steps: int,
        throughput: Throughput,
    ) -> None:
        self._output_dir = output_dir
        self._throughput = throughput
        self._resolved_config = resolved_config
        self._every_n_steps = every_n_steps
        self._rows: list[dict[str, Any]] = []
        self._losses_on_device: list[torch.Tensor] = []
        self._started = 0.0
        self._seconds_before = 0.0  # of this run's earlier starts
        self._last_step = 0
        self._learning_rate = 0.0
        self._progress: _Progress | None = None
        self._tensorboard: SummaryWriter | None = None
        self.first_step = 0
        self.train_losses: list[float] = []  # of this run's steps, in order

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.monotonic()
        self._last_step = self.first_step = trainer.global_step
        if trainer.is_global_zero:
            self._output_dir.mkdir(parents=True, exist_ok=True)  # not before: a run that can't start leaves nothing
            (self._output_dir / "config.yaml").write_text(self._resolved_config)
            kept = _keep_rows(self._output_dir / METRICS_FILE, COLUMNS, until_step=trainer.global_step)
            self._seconds_before = float(kept[-1]["seconds"]) if kept else 0.0
            if trainer.limit_val_batches:
                _keep_rows(self._output_dir / VALIDATION_FILE, VALIDATION_COLUMNS, until_step=trainer.global_step)
            self._tensorboard = SummaryWriter(str(self._output_dir / "tensorboard"), purge_step=trainer.global_step + 1)
            self._progress = _Progress(trainer.global_step, trainer.max_steps, sys.stderr)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._learning_rate = optimizer.param_groups[0]["lr"]  # of this step; the schedule moves on right after it

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._throughput.count(batch)
        if trainer.global_step != self._last_step:  # else gradients are still accumulating
            self._last_step = trainer.global_step
            self._step_done(trainer, pl_module)
        self._throughput.pause()

    def _step_done(self, trainer: Trainer, pl_module: LightningModule) -> None:
        losses: list[torch.Tensor] = pl_module.step_losses  # type: ignore[assignment]
        self._losses_on_device.append(torch.stack(losses).mean())
        losses.clear()
        self._rows.append(
            {
                "step": trainer.global_step,
                "learning_rate": self._learning_rate,
                "seconds": round(self._seconds_before + time.monotonic() - self._started, 3),
            }
        )
        if len(self._rows) >= self._every_n_steps or trainer.global_step == trainer.max_steps:
            self.write(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready == 0:
            raise UserError("the training data ended at once: a loader without batches would be asked forever")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._tensorboard is None:  # not rank 0
            return
        val_loss = trainer.callback_metrics["val_loss"]
        self._tensorboard.add_scalar("val_loss", val_loss, trainer.global_step)
        with (self._output_dir / VALIDATION_FILE).open("a", newline="") as file:
            csv.writer(file).writerow([trainer.global_step, float(val_loss)])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.write(trainer)
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()  # else TensorBoard's thread would go on writing after the run

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def write(self, trainer: Trainer) -> None:
        """Fetch the losses that are still on the device and write their rows. Every rank calls it."""
        if not self._rows:
            return
        means = trainer.strategy.reduce(torch.stack(self._losses_on_device), reduce_op="mean").tolist()
        self._throughput.pause()  # now that the device has done all that was asked of it
        totals = self._throughput.totals.as_tensor(trainer.strategy.root_device)
        rates = throughput.rates(trainer.strategy.reduce(totals, reduce_op="sum"), trainer.world_size)
        self._throughput.reset()
        for row, loss in zip(self._rows, means, strict=True):
            row.update(train_loss=loss, **rates)
            self.train_losses.append(loss)
        if trainer.is_global_zero:
            self._write_rows()
        self._rows.clear()
        self._losses_on_device.clear()

    def _write_rows(self) -> None:
        assert self._tensorboard is not None
        assert self._progress is not None
        with (self._output_dir / METRICS_FILE).open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerows(self._rows)
        for row in self._rows:
            for name in set(COLUMNS) - {"step", "seconds"}:
                self._tensorboard.add_scalar(name, row[name], row["step"])
        self._progress.show(self._rows[-1])


class Checkpoints(Callback):
    """Saves every n optimizer steps and at the last one; keeps the newest few. Comes after Metrics.

    Checkpoints beyond the step that a run goes on from, like rows of its metrics, are of a run that is no more.
    """

    def __init__(self, output_dir: Path, metrics: Metrics, every_n_steps: int, keep: int) -> None:
        self._last = output_dir / LAST_CHECKPOINT
        self._metrics = metrics
        self._every_n_steps = every_n_steps
        self._keep = keep
        self._saved_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step
        continued = self._path(trainer.global_step)
        if trainer.is_global_zero and continued.exists():  # else they go when there is one that `last` can be
            self._point_last_at(continued)
            self._delete(step for step in self._steps() if step > trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step % self._every_n_steps == 0 or step == trainer.max_steps
        if not due or step == self._saved_step:
            return
        self._saved_step = step
        self._metrics.write(trainer)  # so that metrics.csv reaches as far as the checkpoint
        trainer.save_checkpoint(self._path(step))
        if trainer.is_global_zero:
            self._point_last_at(self._path(step))
            kept = [saved for saved in self._steps() if saved <= step][-self._keep :]
            self._delete(saved for saved in self._steps() if saved not in kept)

    def _path(self, step: int) -> Path:
        return self._last.with_name(f"step_{step:06d}.ckpt")

    def _steps(self) -> list[int]:
        """Of the checkpoints there are, in order: as numbers, for names sort otherwise from 1000000 on."""
        names = (path.stem.removeprefix("step_") for path in self._last.parent.glob("step_*.ckpt"))
        steps = sorted(int(name) for name in names if name.isdecimal())
        return [step for step in steps if self._path(step).exists()]

    def _delete(self, steps: Iterable[int]) -> None:
        for step in steps:
            self._path(step).unlink()

    def _point_last_at(self, path: Path) -> None:
        temporary = self._last.with_suffix(".new")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(path.name)
        os.replace(temporary, self._last)


class _Progress:
    """A bar in a terminal, a line now and then in a log file."""

    def __init__(self, first_step: int, max_steps: int, stream: TextIO) -> None:
        self._first_step, self._max_steps, self._stream = first_step, max_steps, stream
        self._started = self._told = time.monotonic()
        self._bar = tqdm(total=max_steps, initial=first_step, unit="step", file=stream) if stream.isatty() else None

    def show(self, row: dict[str, Any]) -> None:
        step, train_loss = row["step"], row["train_loss"]
        if self._bar is not None:
            self._bar.set_postfix(train_loss=f"{train_loss:.4f}", refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if now - self._told < _SECONDS_BETWEEN_LINES and step < self._max_steps:
            return
        self._told = now
        steps_per_second = (step - self._first_step) / (now - self._started)
        left = timedelta(seconds=round((self._max_steps - step) / steps_per_second))
        print(
            f"step {step}/{self._max_steps}  train_loss {train_loss:.4f}  {steps_per_second:.2f} steps/s  "
            f"{row['samples_per_second']:.1f} samples/s  {left} left",
            file=self._stream,
            flush=True,
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _keep_rows(path: Path, columns: tuple[str, ...], until_step: int) -> list[dict[str, str]]:
    """Start a csv file, or, when a run goes on from a checkpoint, drop the rows that come after it.

    Returns the rows that are left.
    """
    kept: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if int(row["step"]) <= until_step]
    temporary = path.with_suffix(".new")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(kept)
    os.replace(temporary, path)
    return kept
