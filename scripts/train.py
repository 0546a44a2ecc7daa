"""Trains a diffusion transformer on a prepared dataset.

    python scripts/train.py data.path=DATASET trainer.max_steps=200
    python scripts/train.py data=fake
    torchrun --nproc_per_node=8 scripts/train.py data.path=DATASET data.global_batch_size=256 model=dit_xl

All options: configs/train.yaml with data/ and model/, or --help. Output: see train_callbacks.py.
"""

from __future__ import annotations

import gc
import logging
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from omegaconf import DictConfig, OmegaConf

from diffusion_data.command_line import build_target, options_to_dataclass, run
from diffusion_data.errors import UserError
from diffusion_data.scripts.checkpoint_file import refuse_unfit_checkpoint
from diffusion_data.scripts.diffusion_lightning_module import (
    DiffusionLightningModule,
    LossOptions,
    OptimizerOptions,
)
from diffusion_data.scripts.ema import EmaOptions
from diffusion_data.scripts.provenance import provenance_of
from diffusion_data.scripts.throughput import Throughput
from diffusion_data.scripts.train_callbacks import (
    LAST_CHECKPOINT,
    METRICS_FILE,
    Checkpoints,
    Metrics,
)


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    max_steps: int
    accelerator: str
    strategy: str
    precision: str
    gradient_clip_norm: float | None
    log_every_n_steps: int
    checkpoint_every_n_steps: int
    keep_checkpoints: int
    val_every_n_steps: int | None
    val_batches: int

    def __post_init__(self) -> None:
        counts = "max_steps", "log_every_n_steps", "checkpoint_every_n_steps", "keep_checkpoints", "val_batches"
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.accelerator not in ("auto", "cpu", "cuda"):
            raise ValueError(f"accelerator must be auto, cpu or cuda, got {self.accelerator!r}")
        if self.strategy not in ("auto", "ddp", "fsdp"):
            raise ValueError(f"strategy must be auto, ddp or fsdp, got {self.strategy!r}")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    data: dict[str, Any]  # _target_: a LightningDataModule with gradient_accumulation_steps
    model: dict[str, Any]  # _target_: a module called as DiT is
    trainer: TrainerOptions
    optimizer: OptimizerOptions
    loss: LossOptions
    ema: EmaOptions
    seed: int
    output_dir: str
    ckpt_path: str | None


def train(config: DictConfig) -> None:
    """The whole job: config -> checkpoints, metrics and TensorBoard events in output_dir."""
    _fit(config)
    _end_process_group()


def _fit(config: DictConfig) -> None:
    import torch
    from lightning.pytorch import seed_everything

    _quieten_lightning()
    options = options_to_dataclass(TrainOptions, config, "")
    output_dir = Path(options.output_dir)
    ckpt_path = _checkpoint_to_continue(options.ckpt_path, output_dir)

    seed_everything(options.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision("high")
    datamodule = build_target(options.data, "data")
    datamodule.setup("fit")  # what is wrong with the data is told before anything else is done
    if options.trainer.val_every_n_steps:
        _require_val_split(datamodule)
    model = build_target(options.model, "model")
    provenance = provenance_of(options.model, datamodule, options.loss.sigma_data)
    module = DiffusionLightningModule(model, options.loss, options.optimizer, options.ema, options.seed, provenance)
    if ckpt_path is not None:
        refuse_unfit_checkpoint(
            ckpt_path,
            model_options=options.model,
            weights=module.state_dict(),
            datamodule=type(datamodule).__qualname__,
        )
    throughput = Throughput()
    metrics = Metrics(output_dir, OmegaConf.to_yaml(config), options.trainer.log_every_n_steps, throughput)
    checkpoints = Checkpoints(
        output_dir, metrics, options.trainer.checkpoint_every_n_steps, options.trainer.keep_checkpoints
    )
    trainer = _make_trainer(options.trainer, datamodule.gradient_accumulation_steps, [metrics, checkpoints], throughput)

    if trainer.is_global_zero:
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        where = f", from {ckpt_path}" if ckpt_path else ""
        print(
            f"training {millions:.1f} M parameters on {trainer.world_size} x {trainer.strategy.root_device.type}, "
            f"precision {trainer.precision}, into {output_dir}{where}"
        )
    started = time.monotonic()
    trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path)
    if trainer.is_global_zero:
        print(_summary(metrics, trainer.global_step, time.monotonic() - started, output_dir))


def _make_trainer(options: TrainerOptions, accumulated_batches: int, callbacks: list[Any], profiler: Throughput) -> Any:
    """One process without torchrun; under torchrun, one for each that it started."""
    import torch
    from lightning.pytorch import Trainer
    from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment

    cuda = options.accelerator == "cuda" or (options.accelerator == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise UserError("trainer.accelerator=cuda, but torch sees no CUDA device; use trainer.accelerator=cpu")
    under_torchrun = TorchElasticEnvironment.detect()
    precision = ("bf16-mixed" if cuda else "32-true") if options.precision == "auto" else options.precision
    return Trainer(
        max_steps=options.max_steps,
        max_epochs=-1,
        accelerator="cuda" if cuda else "cpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]) if under_torchrun else 1,
        num_nodes=int(os.environ["GROUP_WORLD_SIZE"]) if under_torchrun else 1,
        strategy=_strategy(options.strategy, under_torchrun),
        plugins=[TorchElasticEnvironment() if under_torchrun else LightningEnvironment()],
        precision=precision,  # type: ignore[arg-type]
        gradient_clip_val=options.gradient_clip_norm,
        accumulate_grad_batches=accumulated_batches,
        callbacks=callbacks,
        profiler=profiler,
        val_check_interval=(options.val_every_n_steps or 1) * accumulated_batches,  # counts micro batches
        check_val_every_n_epoch=None,
        limit_val_batches=options.val_batches if options.val_every_n_steps else 0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the datamodules share samples out themselves
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _strategy(name: str, under_torchrun: bool) -> Any:
    """fsdp: weights, gradients and optimizer state are shared out over all ranks; checkpoints are as ddp's are."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    if not under_torchrun:
        if name != "auto":
            raise UserError(f"trainer.strategy={name} is for several processes: start with torchrun --nproc_per_node=N")
        return "auto"
    if name == "fsdp":
        return ModelParallelStrategy(
            data_parallel_size=int(os.environ["WORLD_SIZE"]), tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    return "ddp"


def _end_process_group() -> None:
    """Joins gloo's threads: one that lets go of a tensor while the interpreter ends aborts its rank.

    They end with the last reference to their group, and a sharded module holds some in cycles. Lightning leaves them.
    """
    import torch

    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _checkpoint_to_continue(ckpt_path: str | None, output_dir: Path) -> Path | None:
    last = output_dir / LAST_CHECKPOINT
    if ckpt_path == "auto":
        return last if last.exists() else None
    if ckpt_path == "last":
        if not last.exists():
            raise UserError(f"ckpt_path=last: {last} does not exist; set output_dir= to the run to continue")
        return last
    if ckpt_path is not None:
        if not Path(ckpt_path).is_file():
            raise UserError(f"ckpt_path={ckpt_path}: no such file (or last, or auto)")
        return Path(ckpt_path)
    if (output_dir / METRICS_FILE).exists() and int(os.environ.get("RANK", 0)) == 0:
        raise UserError(f"output_dir={output_dir} holds a run; continue it with ckpt_path=last or choose another")
    return None


def _require_val_split(datamodule: LightningDataModule) -> None:
    if datamodule.val_dataloader() == []:
        raise UserError(
            "trainer.val_every_n_steps: there is no val split to validate on; prepare one (split_ratio), set "
            "data.use_train_split_for_val=true, or leave val_every_n_steps out"
        )


def _summary(metrics: Metrics, step: int, seconds: float, output_dir: Path) -> str:
    losses = metrics.train_losses
    if not losses:
        return f"nothing to do: the checkpoint is at step {step}; raise trainer.max_steps"
    n = max(1, min(20, len(losses) // 2))
    first, last = sum(losses[:n]) / n, sum(losses[-n:]) / n
    return (
        f"{len(losses)} steps (up to step {step}) in {seconds:.0f} s: mean train_loss {first:.4f} in the first {n}, "
        f"{last:.4f} in the last {n}\n"
        f"checkpoint {output_dir / LAST_CHECKPOINT}, losses {output_dir / METRICS_FILE}, "
        f"curves: tensorboard --logdir {output_dir / 'tensorboard'}\n"
        f"to continue: output_dir={output_dir} ckpt_path=last trainer.max_steps={2 * step}"
    )


def _quieten_lightning() -> None:
    """Without what a user of this script can't act on: device inventories, tips, advice to its programmers."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing here writes to it


def main() -> None:
    run(
        train,
        "train",
        hints={"data.path": "the folder that prepare_energon_dataset.py made; data=fake needs none"},
        open_options=["data.task_encoder.filters"],
    )


if __name__ == "__main__":
    main()
