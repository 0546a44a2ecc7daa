"""Dataset folder, or a blend of several -> batches (see diffusion_taskencoder) for training, validation and tests,
under Lightning or outside.

    dm = DiffusionDataModule(path)
    for batch in dm.train_dataloader(): ...

A checkpoint that holds `state_dict()` resumes at the very next batch. Ranks and workers have to be those it was saved
with, or as many workers in total on another number of ranks; see docs/training_data.rst.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from megatron.energon import WorkerConfig

from diffusion_data.dataset_folder import read_stats
from diffusion_data.dataset_source import DataPath, DatasetSource, open_source
from diffusion_data.diffusion_stages import STAGES_VERSION
from diffusion_data.diffusion_taskencoder import BasicDiffusionTaskEncoder
from diffusion_data.energon_loaders import TrainLoader, ValLoader, log_sample_error, restore, usable_workers
from diffusion_data.epoch_length import (
    batches_of_longest_rank,
    batches_of_one_epoch,
    batches_of_whole_pass,
    longest_of_dataset,
    mean_share_of_sequence,
)
from diffusion_data.errors import UserError
from diffusion_data.latent_datamodule import LatentDataModule
from diffusion_data.latent_scaling import PER_CHANNEL, LatentScaling
from diffusion_data.loader_state import DATASET_NAME, refuse_foreign, to_plain
from diffusion_data.open_loaders import any_batch, open_finite, open_training
from diffusion_data.packing import agreed
from diffusion_data.parallel_ranks import DataParallel, can_gather, gather_from_ranks
from diffusion_data.redistribution import fitted_state, rescale_batches
from diffusion_data.text_dropout import read_empty_caption

logger = logging.getLogger(__name__)


class DiffusionDataModule(LatentDataModule):
    """Energon datasets of latents and text embeddings. Positional arguments are NeMo's, in their order.

    path: a dataset folder, a metadataset yaml, or a list of {path, weight}, see `dataset_source`; nothing is read
        before `setup` or the first loader
    seq_length: patches each sample is padded to, and the most it may have; None takes the longest of the dataset, or
        no limit where samples are packed or bucketed
    The others are those of `LatentDataModule`.
    """

    def __init__(
        self,
        path: DataPath,
        seq_length: int | None = None,
        micro_batch_size: int = 1,
        global_batch_size: int = 8,
        num_workers: int = 1,
        pin_memory: bool = True,
        task_encoder: BasicDiffusionTaskEncoder | None = None,
        use_train_split_for_val: bool = False,
        virtual_epoch_length: int | None = None,
        packing_buffer_size: int | None = None,
        max_samples_per_sequence: int | None = None,
        *,
        max_seq_length: int | None = None,
        bucket_by_shape: bool = False,
        shuffle_buffer_size: int = 100,
        read_ahead: int = 4,
        repeat: bool = True,
        seed: int = 0,
        parallel: DataParallel | None = None,
        device_mesh: Any = None,
    ) -> None:
        super().__init__(
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
            task_encoder=task_encoder,
            use_train_split_for_val=use_train_split_for_val,
            virtual_epoch_length=virtual_epoch_length,
            packing_buffer_size=packing_buffer_size,
            max_samples_per_sequence=max_samples_per_sequence,
            max_seq_length=max_seq_length,
            bucket_by_shape=bucket_by_shape,
            shuffle_buffer_size=shuffle_buffer_size,
            read_ahead=read_ahead,
            repeat=repeat,
            seed=seed,
            parallel=parallel,
            device_mesh=device_mesh,
        )
        self.path = path
        self.seq_length = seq_length
        self._is_set_up = False
        self._source: DatasetSource | None = None
        self._train: TrainLoader | None = None
        self._finite: dict[str, ValLoader] = {}
        self._train_config: WorkerConfig | None = None
        self._saved: dict[str, Any] | None = None

    @property
    def source(self) -> DatasetSource:
        """The dataset or datasets, checked."""
        if self._source is None:
            self._source = open_source(self.path)
        return self._source

    @property
    def latent_scaling(self) -> LatentScaling | None:
        """What was done to the latents, with its inverse for decoding; None if they are raw."""
        self._ensure_set_up()
        return self.task_encoder.scaling

    def setup(self, stage: str | None = None) -> None:
        """Check the dataset and settle what the task encoder has to know of it and of the ranks."""
        encoder = self.task_encoder
        length = agreed("seq_length", self.seq_length, encoder.seq_length)
        encoder.max_seq_length, encoder.bucket_by_shape = self.max_seq_length, self.bucket_by_shape
        encoder.length_multiple = self._length_multiple()
        if length is None and self.max_seq_length is None and not self.bucket_by_shape:
            length = longest_of_dataset(self.source, encoder)
        self.seq_length = encoder.seq_length = length
        if encoder.text_dropout > 0 and encoder.empty_text is None:
            encoder.empty_text = read_empty_caption(self.source.folders)
        if encoder.latent_scaling == PER_CHANNEL and encoder.scaling is None:
            encoder.scaling = LatentScaling.of_stats([read_stats(folder) or {} for folder in self.source.train_folders])
        self._is_set_up = True
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
        return self._finite_loader("train" if self.use_train_split_for_val else "val")

    def test_dataloader(self) -> ValLoader | list[Any]:
        """One pass over the test split; an empty list if the dataset has none."""
        return self._finite_loader("test")

    def teardown(self, stage: str | None = None) -> None:
        """End the workers. The place in the training stream is kept for the next loader or checkpoint, unless it is
        that of several ranks without a process group."""
        for loader in self._finite.values():
            loader.close()
        self._finite.clear()
        if self._train is not None:
            self._saved = self.state_dict() if can_gather(self._parallel()) else None
            self._train.close()
            self._train = self._train_config = None

    def state_dict(self) -> dict[str, Any]:
        """The place in the training stream, of all ranks. To be called on all of them, as Lightning does."""
        if self._train is None or self._train_config is None or self._train.loader is None:
            return self._saved or {}
        states = gather_from_ranks(self._parallel(), to_plain(self._train.loader.save_state_rank()))
        done = self._train.batches_done
        return {"ranks": states, "batches_done": done, "settings": self._stream_settings(self._train_config)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the place for `train_dataloader`, which goes there.

        Raises:
            UserError: it is no such place, as one of NeMo's DiffusionDataModule.
        """
        if state_dict:
            refuse_foreign(state_dict, {"ranks", "batches_done", "settings"}, type(self).__name__)
        self._saved = state_dict or None
        self._train = self._train_config = None

    def _open_train(self, config: WorkerConfig) -> TrainLoader:
        settings = self._stream_settings(config)
        saved = None
        if self._saved is not None:
            saved = fitted_state(self._saved, settings)
            rescale_batches(self.trainer, self._saved["settings"], settings)
        length = settings["virtual_epoch_length"]
        loader = open_training(self.source, self, config, length)
        self._saved = None
        if saved is not None:
            restore(loader, saved["ranks"][config.rank])
        done = 0 if saved is None else saved["batches_done"]
        some_batch = partial(any_batch, self.source, self, "train")
        return TrainLoader(loader, length, self.task_encoder.skips, done, any_batch=some_batch)

    def _finite_loader(self, split: str) -> ValLoader | list[Any]:
        self._ensure_set_up()
        parts = self.source.parts(split)
        if not parts:
            return []
        config = self._worker_config(split)
        length = None
        if self.max_seq_length is None and not self.bucket_by_shape:
            length = batches_of_longest_rank(parts, self.micro_batch_size, config.num_workers, config.world_size)
        if split in self._finite:
            self._finite[split].close()
        self._finite[split] = ValLoader(
            partial(open_finite, self.source, self, split, config),
            length,
            self.task_encoder.skips,
            parallel=self._parallel(),
            any_batch=partial(any_batch, self.source, self, split),
        )
        return self._finite[split]

    def _ensure_set_up(self) -> None:
        encoder = self.task_encoder  # which another datamodule may have set up for itself, or ranks weren't known
        told = (encoder.seq_length, encoder.max_seq_length, encoder.bucket_by_shape, encoder.length_multiple)
        if told != (self.seq_length, self.max_seq_length, self.bucket_by_shape, self._length_multiple()):
            self._is_set_up = False
        if not self._is_set_up:
            self.setup()

    def _worker_config(self, split: str) -> WorkerConfig:
        parallel = self._parallel()
        num_samples = self.source.samples(split)
        if num_samples == 0:
            splits = sorted({name for folder in self.source.folders for name in folder.samples})
            held = ", ".join(f"{name} {self.source.samples(name)}" for name in splits)
            raise UserError(f"{self.source.name} has no samples in the split {split!r} (samples: {held})")
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
            "stages_version": STAGES_VERSION,
            "dataset": self.source.identity,
            DATASET_NAME: self.source.name,
            "data_parallel_size": config.world_size,
            "num_workers": config.num_workers,
            "micro_batch_size": self.micro_batch_size,
            "shuffle_buffer_size": self.shuffle_buffer_size,
            "packing_buffer_size": self.packing_buffer_size,
            "max_samples_per_sequence": self.max_samples_per_sequence,
            "repeat": self.repeat,
            "virtual_epoch_length": self.virtual_epoch_length or self._batches_of_a_pass(config),
            "seed": self.seed,
            **self.task_encoder.settings(),
        }

    def _batches_of_a_pass(self, config: WorkerConfig) -> int:
        """Of a rank; about one pass, but for repeat=False."""
        if not self.repeat:
            return batches_of_whole_pass(
                self.source.parts("train"), self.micro_batch_size, config.num_workers, config.world_size
            )
        sequences: float = self.source.samples("train")
        if self.max_seq_length is not None:
            sequences *= mean_share_of_sequence(self.source, self.task_encoder, self.max_seq_length)
        return batches_of_one_epoch(
            sequences,
            self.micro_batch_size * config.world_size,
            max(1, config.num_workers),
            self.gradient_accumulation_steps,
        )
