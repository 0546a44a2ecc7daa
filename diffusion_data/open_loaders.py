"""A checked dataset and the options of a datamodule -> energon's loaders of a rank."""

from __future__ import annotations

from typing import Any

import torch
from megatron.energon import SavableDataLoader, WorkerConfig, get_train_dataset, get_val_dataset
from megatron.energon.savable_loader import BasicDataLoader

from diffusion_data.dataset_source import DatasetSource
from diffusion_data.diffusion_taskencoder import BasicDiffusionTaskEncoder
from diffusion_data.energon_loaders import (
    Batch,
    iterate_directly,
    loader_options,
    log_sample_error,
    pass_batches_on,
    use_pinned_memory,
)
from diffusion_data.late_reading import set_read_ahead
from diffusion_data.latent_datamodule import LatentDataModule
from diffusion_data.skip_counts import all_skipped
from diffusion_data.training_stream import WholePasses


def open_training(
    source: DatasetSource, options: LatentDataModule, config: WorkerConfig, epoch_length: int
) -> SavableDataLoader:
    """The endless stream of the train split.

    epoch_length: batches a rank, into which repeat=False fits each pass
    """
    dataset = get_train_dataset(
        source.spec,
        split_part="train",
        worker_config=config,
        batch_size=options.micro_batch_size,
        packing_buffer_size=options.packing_buffer_size,
        shuffle_buffer_size=options.shuffle_buffer_size,
        max_samples_per_sequence=options.max_samples_per_sequence,
        task_encoder=options.task_encoder,
        repeat=options.repeat,
    )
    set_read_ahead(dataset, options.read_ahead)
    if not options.repeat:
        dataset = WholePasses(dataset, epoch_length // max(1, config.num_workers), worker_config=config)
    loader = SavableDataLoader(dataset, **loader_options(config))
    _set_up(loader, options)
    return loader


def open_finite(source: DatasetSource, options: LatentDataModule, split: str, config: WorkerConfig) -> BasicDataLoader:
    """One pass over a split, in order."""
    dataset = get_val_dataset(
        source.spec,
        split_part=split,
        worker_config=config,
        batch_size=options.micro_batch_size,
        packing_buffer_size=options.packing_buffer_size,
        task_encoder=options.task_encoder,
    )
    set_read_ahead(dataset, options.read_ahead)
    loader = BasicDataLoader(dataset, **loader_options(config))
    _set_up(loader, options)
    return loader


def any_batch(source: DatasetSource, options: LatentDataModule, split: str) -> Batch:
    """A batch of the split, outside of its loader.

    Raises:
        UserError: no sample of the split can be used.
    """
    config = WorkerConfig(rank=0, world_size=1, num_workers=0, global_error_handler=log_sample_error)
    skips = options.task_encoder.skips
    with skips.counting_nothing():
        batch = next(iter(open_finite(source, options, split, config)), None)
    if batch is None:
        raise all_skipped(skips)
    return batch


def _set_up(loader: torch.utils.data.DataLoader[Any], options: LatentDataModule) -> None:
    use_pinned_memory(loader, options.pin_memory)
    if type(options.task_encoder).batch is BasicDiffusionTaskEncoder.batch:  # one of the user's may hold arrays
        pass_batches_on(loader)
    iterate_directly(loader)
