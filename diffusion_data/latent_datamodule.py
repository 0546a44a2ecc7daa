"""What DiffusionDataModule and the fake one, which takes its place in tests, have in common: options and ranks."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningDataModule

from diffusion_data.diffusion_taskencoder import BasicDiffusionTaskEncoder
from diffusion_data.errors import UserError
from diffusion_data.packing import agreed, refuse_unfit_packing
from diffusion_data.parallel_ranks import DataParallel, data_parallel, gradient_accumulation_steps


class LatentDataModule(LightningDataModule):
    """Options of a stream of batches.

    micro_batch_size: samples of one batch on one rank; packed sequences where samples are packed
    global_batch_size: samples (or packed sequences) of one step of the optimizer, all ranks together
    num_workers: loader processes a rank; 0 loads in the main process
    pin_memory: page-locked batches, for faster copies to a GPU; without CUDA it makes no difference
    task_encoder: None for a BasicDiffusionTaskEncoder
    use_train_split_for_val: validate on the train split: one pass, in order
    virtual_epoch_length: batches a rank and epoch; None for one pass over the train split, rounded up so
        that each worker gives equally many and the last step of the optimizer is a full one
    packing_buffer_size: samples a worker chooses from to fill sequences; larger leaves less padding and needs more
        memory, and time to fill after a resume
    max_samples_per_sequence: samples of a shard that are read in a row, about: a longer shard counts as several, whose
        order is random. Fewer mix better, but are read from more places. None for whole shards
    max_seq_length: patches of a packed sequence; together with packing_buffer_size it turns packing on
    bucket_by_shape: batches of equal latent shape, without padding
    shuffle_buffer_size: samples a worker draws from at random; larger mixes better. Of local datasets only numbers
        are kept, so that it may be many thousands; of a metadataset's blend_epochized, whole samples
    read_ahead: samples read before they are wanted, by as many threads a worker; 0 reads them when they are. More of
        them help a disk or network that is slow to answer. Has no effect on the order
    repeat: False makes each epoch exactly one pass, in which every sample comes once on some rank; ranks that have
        fewer batches than others end it with batches without samples (loss_mask all 0, no keys)
    seed: of the order of samples, and of text dropout
    parallel: which data-parallel rank reads; None finds out, see `parallel_ranks`
    device_mesh: torch's DeviceMesh, to find that out from
    """

    def __init__(
        self,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        num_workers: int,
        pin_memory: bool,
        task_encoder: BasicDiffusionTaskEncoder | None,
        use_train_split_for_val: bool,
        virtual_epoch_length: int | None,
        packing_buffer_size: int | None,
        max_samples_per_sequence: int | None,
        max_seq_length: int | None,
        bucket_by_shape: bool,
        shuffle_buffer_size: int,
        read_ahead: int,
        repeat: bool,
        seed: int,
        parallel: DataParallel | None,
        device_mesh: Any,
    ) -> None:
        super().__init__()
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.task_encoder = task_encoder or BasicDiffusionTaskEncoder()
        self.use_train_split_for_val = use_train_split_for_val
        self.virtual_epoch_length = virtual_epoch_length
        self.packing_buffer_size = packing_buffer_size
        self.max_samples_per_sequence = max_samples_per_sequence
        self.max_seq_length = agreed("max_seq_length", max_seq_length, self.task_encoder.max_seq_length)
        self.bucket_by_shape = bucket_by_shape or self.task_encoder.bucket_by_shape
        self.shuffle_buffer_size = shuffle_buffer_size
        self.read_ahead = read_ahead
        self.repeat = repeat
        self.seed = seed
        self.parallel = parallel
        self.device_mesh = device_mesh
        self._own_multiple = self.task_encoder.length_multiple
        self._refuse_unfit_options()

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro batches that make one step of the optimizer; depends on the number of ranks."""
        return gradient_accumulation_steps(self.global_batch_size, self.micro_batch_size, self._parallel().size)

    def _refuse_unfit_options(self) -> None:
        gradient_accumulation_steps(self.global_batch_size, self.micro_batch_size, 1)  # ranks may not be known yet
        refuse_unfit_packing(self.max_seq_length, self.packing_buffer_size, self.bucket_by_shape)
        for name in ("virtual_epoch_length", "max_samples_per_sequence", "shuffle_buffer_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if self.read_ahead < 0:
            raise UserError(f"read_ahead must not be negative, got {self.read_ahead}")
        if not self.repeat and (self.max_seq_length or self.bucket_by_shape or self.virtual_epoch_length):
            raise UserError(
                "repeat=False makes epochs of one pass, whose batches have to be counted beforehand: it goes neither "
                "with virtual_epoch_length nor with max_seq_length or bucket_by_shape; with these, leave it out"
            )

    def _parallel(self) -> DataParallel:
        return self.parallel or data_parallel(self.trainer, self.device_mesh)

    def _length_multiple(self) -> int:
        return math.lcm(self._own_multiple, self._parallel().length_multiple)
