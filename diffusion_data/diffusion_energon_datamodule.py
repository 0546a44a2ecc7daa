"""Dataset folder -> batches (see diffusion_taskencoder) for training and validation, under Lightning or outside.

    dm = DiffusionDataModule(path)
    for batch in dm.train_dataloader(): ...

A checkpoint that holds `state_dict()` resumes at the very next batch, on any number of ranks and workers
as long as they are those it was saved with.
"""

from __future__ import annotations

import logging
import math
import os
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from megatron.energon import (
    SavableDataLoader,
    WorkerConfig,
    get_train_dataset,
    get_val_dataset,
)
from megatron.energon.savable_loader import BasicDataLoader

from diffusion_data.dataset_folder import DatasetFolder, check_dataset, read_stats
from diffusion_data.diffusion_taskencoder import BasicDiffusionTaskEncoder
from diffusion_data.energon_loaders import (
    TrainLoader,
    ValLoader,
    batches_of_longest_rank,
    iterate_directly,
    loader_options,
    log_sample_error,
    pass_batches_on,
    usable_workers,
    use_pinned_memory,
)
from diffusion_data.errors import UserError
from diffusion_data.late_reading import set_read_ahead
from diffusion_data.loader_state import from_plain, refuse_changes, to_plain
from diffusion_data.parallel_ranks import DataParallel, data_parallel, gradient_accumulation_steps

logger = logging.getLogger(__name__)


class DiffusionDataModule(LightningDataModule):
    """Energon dataset of latents and text embeddings.

    path: the dataset folder; nothing is read before `setup` or the first loader
    seq_length: patches each sample is padded to; None takes the longest of the dataset
    micro_batch_size: samples of one batch on one rank
    global_batch_size: samples of one step of the optimizer, all ranks together
    num_workers: loader processes a rank; 0 loads in the main process
    pin_memory: page-locked batches, for faster copies to a GPU; without CUDA it makes no difference
    task_encoder: None for a BasicDiffusionTaskEncoder
    use_train_split_for_val: validate on the train split: one pass, in order
    shuffle_buffer_size: samples a worker draws from at random; larger mixes better. Of local datasets only numbers
        are kept, so that it may be many thousands
    read_ahead: samples read before they are wanted, by as many threads a worker; 0 reads them when they are. More of
        them help a disk or network that is slow to answer. Has no effect on the order
    virtual_epoch_length: batches a rank and epoch; None for one pass over the train split, rounded up so
        that each worker gives equally many and the last step of the optimizer is a full one
    seed: of the order of samples
    parallel: which data-parallel rank reads; None finds out, see `parallel_ranks`
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        seq_length: int | None = None,
        micro_batch_size: int = 1,
        global_batch_size: int = 8,
        num_workers: int = 1,
        pin_memory: bool = True,
        task_encoder: BasicDiffusionTaskEncoder | None = None,
        use_train_split_for_val: bool = False,
        shuffle_buffer_size: int = 100,
        read_ahead: int = 4,
        virtual_epoch_length: int | None = None,
        seed: int = 0,
        parallel: DataParallel | None = None,
    ) -> None:
        super().__init__()
        if shuffle_buffer_size < 1 or (virtual_epoch_length is not None and virtual_epoch_length < 1):
            raise UserError("shuffle_buffer_size and virtual_epoch_length must be at least 1")
        if read_ahead < 0:
            raise UserError(f"read_ahead must not be negative, got {read_ahead}")
        gradient_accumulation_steps(global_batch_size, micro_batch_size, 1)  # ranks may not be known yet
        self.path = path
        self.seq_length = seq_length
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.task_encoder = task_encoder or BasicDiffusionTaskEncoder()
        self.use_train_split_for_val = use_train_split_for_val
        self.shuffle_buffer_size = shuffle_buffer_size
        self.read_ahead = read_ahead
        self.virtual_epoch_length = virtual_epoch_length
        self.seed = seed
        self.parallel = parallel
        self._folder: DatasetFolder | None = None
        self._train: TrainLoader | None = None
        self._val: ValLoader | None = None
        self._train_config: WorkerConfig | None = None
        self._saved: dict[str, Any] | None = None

    @property
    def folder(self) -> DatasetFolder:
        """The dataset, checked."""
        if self._folder is None:
            self._folder = check_dataset(self.path)
        return self._folder

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro batches that make one step of the optimizer; depends on the number of ranks."""
        return gradient_accumulation_steps(self.global_batch_size, self.micro_batch_size, self._parallel().size)

    def setup(self, stage: str | None = None) -> None:
        """Check the dataset and settle seq_length."""
        asked, encoder = self.seq_length, self.task_encoder
        if asked is not None and encoder.seq_length not in (None, asked):
            raise UserError(f"seq_length={asked}, but the task encoder was made with {encoder.seq_length}")
        if asked is None:
            asked = encoder.seq_length or self._longest_of_dataset()
        self.seq_length = encoder.seq_length = asked
        accumulated = getattr(self.trainer, "accumulate_grad_batches", None)
        if accumulated is not None and accumulated != self.gradient_accumulation_steps:
            logger.warning(
                "global_batch_size=%d needs Trainer(accumulate_grad_batches=%d), which is %d",
                self.global_batch_size,
                self.gradient_accumulation_steps,
                accumulated,
            )

    def train_dataloader(self) -> TrainLoader:
        """The training stream; each call goes on with the same one."""
        self._ensure_set_up()
        config = self._worker_config("train")
        if self._train is None or self._train_config != config:
            self._train, self._train_config = self._open_train(config), config
        return self._train

    def val_dataloader(self) -> ValLoader | list[Any]:
        """One pass over the val split; an empty list if the dataset has none."""
        self._ensure_set_up()
        split = "train" if self.use_train_split_for_val else "val"
        num_samples = self.folder.samples.get(split, 0)
        if num_samples == 0:
            return []
        config = self._worker_config(split)
        self._val = ValLoader(
            partial(self._open_val, split, config),
            batches_of_longest_rank(num_samples, self.micro_batch_size, config.num_workers, config.world_size),
            self.task_encoder.skips,
            in_step=config.world_size > 1,
        )
        return self._val

    def teardown(self, stage: str | None = None) -> None:
        """End the workers. The place in the training stream is kept for the next loader or checkpoint."""
        if self._val is not None:
            self._val.close()
        if self._train is not None:
            self._saved = self.state_dict()
            self._train.close()
            self._train = self._train_config = None

    def state_dict(self) -> dict[str, Any]:
        """The place in the training stream, of all ranks. To be called on all of them, as Lightning does."""
        if self._train is None or self._train_config is None or self._train.loader is None:
            return self._saved or {}
        state = to_plain(self._train.loader.save_state_rank())
        parallel = self._parallel()
        states = [state]
        if parallel.size > 1:
            states = [None] * parallel.size
            torch.distributed.all_gather_object(states, state, group=parallel.group)
        done = self._train.batches_done
        return {"ranks": states, "batches_done": done, "settings": self._stream_settings(self._train_config)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the place for `train_dataloader`, which goes there."""
        self._saved = state_dict or None
        self._train = self._train_config = None

    def _open_train(self, config: WorkerConfig) -> TrainLoader:
        settings = self._stream_settings(config)
        if self._saved is not None:
            refuse_changes(self._saved["settings"], settings)
        dataset = get_train_dataset(
            self.folder.path,
            split_part="train",
            worker_config=config,
            batch_size=self.micro_batch_size,
            shuffle_buffer_size=self.shuffle_buffer_size,
            max_samples_per_sequence=None,
            task_encoder=self.task_encoder,
        )
        set_read_ahead(dataset, self.read_ahead)
        loader = SavableDataLoader(dataset, **loader_options(config))
        self._set_up_loader(loader)
        saved, self._saved = self._saved, None
        if saved is not None:
            loader.restore_state_rank(from_plain(saved["ranks"][config.rank]))
        done = 0 if saved is None else saved["batches_done"]
        return TrainLoader(loader, settings["virtual_epoch_length"], self.task_encoder.skips, done)

    def _open_val(self, split: str, config: WorkerConfig) -> Any:
        dataset = get_val_dataset(
            self.folder.path,
            split_part=split,
            worker_config=config,
            batch_size=self.micro_batch_size,
            task_encoder=self.task_encoder,
        )
        set_read_ahead(dataset, self.read_ahead)
        loader = BasicDataLoader(dataset, **loader_options(config))
        self._set_up_loader(loader)
        return loader

    def _set_up_loader(self, loader: torch.utils.data.DataLoader[Any]) -> None:
        use_pinned_memory(loader, self.pin_memory)
        if type(self.task_encoder).batch is BasicDiffusionTaskEncoder.batch:  # one of the user's may hold arrays
            pass_batches_on(loader)
        iterate_directly(loader)

    def _ensure_set_up(self) -> None:
        if self.seq_length is None or self.task_encoder.seq_length != self.seq_length:
            self.setup()

    def _longest_of_dataset(self) -> int:
        stats = read_stats(self.folder)
        shapes = (stats or {}).get("latent_shapes")
        if not shapes:
            raise UserError(
                f"{self.path} has no run/stats.json that tells its latent shapes; "
                "set data.seq_length to the patches of its longest sample"
            )
        lengths = [self.task_encoder.sequence_length_of(shape[:4]) for shape in shapes]
        fitting = [length for length in lengths if length is not None]
        if not fitting:
            raise UserError(f"no latent of {self.path} can be cut into the patches of the task encoder")
        return max(fitting)

    def _parallel(self) -> DataParallel:
        return self.parallel or data_parallel(self.trainer)

    def _worker_config(self, split: str) -> WorkerConfig:
        parallel = self._parallel()
        num_samples = self.folder.samples.get(split, 0)
        if num_samples == 0:
            held = ", ".join(f"{name} {count}" for name, count in sorted(self.folder.samples.items()))
            raise UserError(f"{self.path} has no samples in the split {split!r} (samples: {held})")
        return WorkerConfig(
            rank=parallel.rank,
            world_size=parallel.size,
            num_workers=usable_workers(self.num_workers, num_samples, parallel.size, split),
            data_parallel_group=parallel.group,
            seed_offset=self.seed,
            global_error_handler=log_sample_error,
        )

    def _stream_settings(self, config: WorkerConfig) -> dict[str, Any]:
        """Everything that decides which samples come in which order."""
        return {
            "dataset": self.folder.identity,
            "data_parallel_size": config.world_size,
            "num_workers": config.num_workers,
            "micro_batch_size": self.micro_batch_size,
            "shuffle_buffer_size": self.shuffle_buffer_size,
            "virtual_epoch_length": self._epoch_length(config),
            "seed": self.seed,
        }

    def _epoch_length(self, config: WorkerConfig) -> int:
        if self.virtual_epoch_length is not None:
            return self.virtual_epoch_length
        one_pass = math.ceil(self.folder.samples["train"] / (self.micro_batch_size * config.world_size))
        unit = math.lcm(max(1, config.num_workers), self.gradient_accumulation_steps)
        return math.ceil(one_pass / unit) * unit
