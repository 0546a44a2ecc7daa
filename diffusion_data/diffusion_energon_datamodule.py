"""Dataset folder, or a blend of several -> batches (see diffusion_taskencoder) for training, validation and tests,
under Lightning or outside.

    dm = DiffusionDataModule(path)
    for batch in dm.train_dataloader(): ...

A checkpoint that holds `state_dict()` resumes at the very next batch. Ranks and workers have to be those it was saved
with, or as many workers in total on another number of ranks; see docs/training_data.rst.
"""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from megatron.energon import SavableDataLoader, WorkerConfig, get_train_dataset, get_val_dataset
from megatron.energon.savable_loader import BasicDataLoader

from diffusion_data.dataset_folder import read_stats
from diffusion_data.dataset_source import DataPath, DatasetSource, open_source
from diffusion_data.diffusion_stages import STAGES_VERSION
from diffusion_data.diffusion_taskencoder import BasicDiffusionTaskEncoder
from diffusion_data.energon_loaders import (
    TrainLoader,
    ValLoader,
    iterate_directly,
    loader_options,
    log_sample_error,
    pass_batches_on,
    restore,
    usable_workers,
    use_pinned_memory,
)
from diffusion_data.epoch_length import (
    batches_of_longest_rank,
    batches_of_longest_worker,
    batches_of_one_epoch,
    longest_of_dataset,
    mean_share_of_sequence,
)
from diffusion_data.errors import UserError
from diffusion_data.late_reading import set_read_ahead
from diffusion_data.latent_scaling import PER_CHANNEL, LatentScaling
from diffusion_data.loader_state import DATASET_NAME, to_plain
from diffusion_data.packing import agreed, refuse_unfit_packing
from diffusion_data.parallel_ranks import (
    DataParallel,
    can_gather,
    data_parallel,
    gather_from_ranks,
    gradient_accumulation_steps,
)
from diffusion_data.redistribution import fitted_state, rescale_batches
from diffusion_data.skip_counts import all_skipped
from diffusion_data.text_dropout import read_empty_caption
from diffusion_data.training_stream import WholePasses

logger = logging.getLogger(__name__)


class DiffusionDataModule(LightningDataModule):
    """Energon datasets of latents and text embeddings.

    path: a dataset folder, a metadataset yaml, or a list of {path, weight}, see `dataset_source`; nothing is read
        before `setup` or the first loader
    seq_length: patches each sample is padded to, and the most it may have; None takes the longest of the dataset, or
        no limit where samples are packed or bucketed
    micro_batch_size: samples of one batch on one rank; packed sequences where samples are packed
    global_batch_size: samples (or packed sequences) of one step of the optimizer, all ranks together
    num_workers: loader processes a rank; 0 loads in the main process
    pin_memory: page-locked batches, for faster copies to a GPU; without CUDA it makes no difference
    task_encoder: None for a BasicDiffusionTaskEncoder
    use_train_split_for_val: validate on the train split: one pass, in order
    shuffle_buffer_size: samples a worker draws from at random; larger mixes better. Of local datasets only numbers
        are kept, so that it may be many thousands; of a metadataset's blend_epochized, whole samples
    read_ahead: samples read before they are wanted, by as many threads a worker; 0 reads them when they are. More of
        them help a disk or network that is slow to answer. Has no effect on the order
    virtual_epoch_length: batches a rank and epoch; None for one pass over the train split, rounded up so
        that each worker gives equally many and the last step of the optimizer is a full one
    max_seq_length: patches of a packed sequence; together with packing_buffer_size it turns packing on
    packing_buffer_size: samples a worker chooses from to fill sequences; larger leaves less padding and needs more
        memory, and time to fill after a resume
    bucket_by_shape: batches of equal latent shape, without padding
    repeat: False makes each epoch exactly one pass, in which every sample comes once on some rank; ranks that have
        fewer batches than others end it with batches without samples (loss_mask all 0, no keys)
    seed: of the order of samples, and of text dropout
    parallel: which data-parallel rank reads; None finds out, see `parallel_ranks`
    device_mesh: torch's DeviceMesh, to find that out from
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
        shuffle_buffer_size: int = 100,
        read_ahead: int = 4,
        virtual_epoch_length: int | None = None,
        max_seq_length: int | None = None,
        packing_buffer_size: int | None = None,
        bucket_by_shape: bool = False,
        repeat: bool = True,
        seed: int = 0,
        parallel: DataParallel | None = None,
        device_mesh: Any = None,
    ) -> None:
        super().__init__()
        if shuffle_buffer_size < 1 or (virtual_epoch_length is not None and virtual_epoch_length < 1):
            raise UserError("shuffle_buffer_size and virtual_epoch_length must be at least 1")
        task_encoder = task_encoder or BasicDiffusionTaskEncoder()
        max_seq_length = agreed("max_seq_length", max_seq_length, task_encoder.max_seq_length)
        bucket_by_shape = bucket_by_shape or task_encoder.bucket_by_shape
        refuse_unfit_packing(max_seq_length, packing_buffer_size, bucket_by_shape)
        if not repeat and (max_seq_length or bucket_by_shape or virtual_epoch_length):
            raise UserError(
                "repeat=False makes epochs of one pass, whose batches have to be counted beforehand: it goes neither "
                "with virtual_epoch_length nor with max_seq_length or bucket_by_shape; with these, leave it out"
            )
        if read_ahead < 0:
            raise UserError(f"read_ahead must not be negative, got {read_ahead}")
        gradient_accumulation_steps(global_batch_size, micro_batch_size, 1)  # ranks may not be known yet
        self.path = path
        self.seq_length = seq_length
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.task_encoder = task_encoder
        self.use_train_split_for_val = use_train_split_for_val
        self.shuffle_buffer_size = shuffle_buffer_size
        self.read_ahead = read_ahead
        self.virtual_epoch_length = virtual_epoch_length
        self.max_seq_length = max_seq_length
        self.packing_buffer_size = packing_buffer_size
        self.bucket_by_shape = bucket_by_shape
        self.repeat = repeat
        self.seed = seed
        self.parallel = parallel
        self.device_mesh = device_mesh
        self._own_multiple = task_encoder.length_multiple
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
    def gradient_accumulation_steps(self) -> int:
        """Micro batches that make one step of the optimizer; depends on the number of ranks."""
        return gradient_accumulation_steps(self.global_batch_size, self.micro_batch_size, self._parallel().size)

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
        """Keep the place for `train_dataloader`, which goes there."""
        self._saved = state_dict or None
        self._train = self._train_config = None

    def _open_train(self, config: WorkerConfig) -> TrainLoader:
        settings = self._stream_settings(config)
        saved = None
        if self._saved is not None:
            saved = fitted_state(self._saved, settings)
            rescale_batches(self.trainer, self._saved["settings"], settings)
        dataset = get_train_dataset(
            self.source.spec,
            split_part="train",
            worker_config=config,
            batch_size=self.micro_batch_size,
            packing_buffer_size=self.packing_buffer_size,
            shuffle_buffer_size=self.shuffle_buffer_size,
            max_samples_per_sequence=None,
            task_encoder=self.task_encoder,
            repeat=self.repeat,
        )
        set_read_ahead(dataset, self.read_ahead)
        length = settings["virtual_epoch_length"]
        if not self.repeat:
            share = length // max(1, config.num_workers)
            dataset = WholePasses(dataset, share, worker_config=config)
        loader = SavableDataLoader(dataset, **loader_options(config))
        self._set_up_loader(loader)
        self._saved = None
        if saved is not None:
            restore(loader, saved["ranks"][config.rank])
        done = 0 if saved is None else saved["batches_done"]
        return TrainLoader(loader, length, self.task_encoder.skips, done, any_batch=partial(self._any_batch, "train"))

    def _finite_loader(self, split: str) -> ValLoader | list[Any]:
        self._ensure_set_up()
        parts = self.source.parts(split)
        if not parts:
            return []
        config = self._worker_config(split)
        length = None
        if self.max_seq_length is None and not self.bucket_by_shape:
            length = batches_of_longest_rank(parts, self.micro_batch_size, config.num_workers, config.world_size)
        make = partial(self._open_finite, split, config)
        if split in self._finite:
            self._finite[split].close()
        self._finite[split] = ValLoader(
            make,
            length,
            self.task_encoder.skips,
            parallel=self._parallel(),
            any_batch=partial(self._any_batch, split),
        )
        return self._finite[split]

    def _open_finite(self, split: str, config: WorkerConfig) -> Any:
        dataset = get_val_dataset(
            self.source.spec,
            split_part=split,
            worker_config=config,
            batch_size=self.micro_batch_size,
            packing_buffer_size=self.packing_buffer_size,
            task_encoder=self.task_encoder,
        )
        set_read_ahead(dataset, self.read_ahead)
        loader = BasicDataLoader(dataset, **loader_options(config))
        self._set_up_loader(loader)
        return loader

    def _any_batch(self, split: str) -> dict[str, Any]:
        """A batch of the split, outside of its loader.

        Raises:
            UserError: no sample of the split can be used.
        """
        config = WorkerConfig(rank=0, world_size=1, num_workers=0, global_error_handler=log_sample_error)
        with self.task_encoder.skips.counting_nothing():
            batch = next(iter(self._open_finite(split, config)), None)
        if batch is None:
            raise all_skipped(self.task_encoder.skips)
        return batch

    def _set_up_loader(self, loader: torch.utils.data.DataLoader[Any]) -> None:
        use_pinned_memory(loader, self.pin_memory)
        if type(self.task_encoder).batch is BasicDiffusionTaskEncoder.batch:  # one of the user's may hold arrays
            pass_batches_on(loader)
        iterate_directly(loader)

    def _ensure_set_up(self) -> None:
        encoder = self.task_encoder  # which another datamodule may have set up for itself, or ranks weren't known
        told = (encoder.seq_length, encoder.max_seq_length, encoder.bucket_by_shape, encoder.length_multiple)
        if told != (self.seq_length, self.max_seq_length, self.bucket_by_shape, self._length_multiple()):
            self._is_set_up = False
        if not self._is_set_up:
            self.setup()

    def _length_multiple(self) -> int:
        return math.lcm(self._own_multiple, self._parallel().length_multiple)

    def _parallel(self) -> DataParallel:
        return self.parallel or data_parallel(self.trainer, self.device_mesh)

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
            "repeat": self.repeat,
            "virtual_epoch_length": self._epoch_length(config),
            "seed": self.seed,
            **self.task_encoder.settings(),
        }

    def _epoch_length(self, config: WorkerConfig) -> int:
        if self.virtual_epoch_length is not None:
            return self.virtual_epoch_length
        workers = max(1, config.num_workers)
        parts = self.source.parts("train")
        if not self.repeat:
            longest = batches_of_longest_worker(parts, self.micro_batch_size, config.num_workers, config.world_size)
            return longest * workers
        sequences: float = self.source.samples("train")
        if self.max_seq_length is not None:
            sequences *= mean_share_of_sequence(self.source, self.task_encoder, self.max_seq_length)
        return batches_of_one_epoch(
            sequences, self.micro_batch_size * config.world_size, workers, self.gradient_accumulation_steps
        )
