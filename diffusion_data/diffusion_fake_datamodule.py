"""No dataset -> batches like a real dataset's, from random latents and texts.

Random `LatentSample`s go through the real task encoder, so keys, shapes and dtypes are the real ones by
construction. Sample i of a seed is always the same, whatever the ranks, workers and batch sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from diffusion_data.diffusion_taskencoder import BasicDiffusionTaskEncoder
from diffusion_data.errors import UserError
from diffusion_data.fake_latents import FakeLatents
from diffusion_data.fake_loader import BatchPlanner, FakeLoader
from diffusion_data.packing import agreed, refuse_unfit_packing
from diffusion_data.parallel_ranks import DataParallel, data_parallel, gradient_accumulation_steps

_CHANNELS = 16


class VideoLatentFakeDataModule(LightningDataModule):
    """Random latents in place of a dataset, to try, test and time a model.

    seq_length: patches each sample is padded to; None takes the longest of latent_shapes
    micro_batch_size, global_batch_size, num_workers, pin_memory, task_encoder: as in DiffusionDataModule
    max_seq_length, packing_buffer_size, bucket_by_shape, device_mesh: as in DiffusionDataModule
    use_train_split_for_val: validate on the training samples
    latent_shapes: (C, T, H, W) to draw from; T = 1 is a picture. None: a square picture, a wide one and a clip
        that fit seq_length
    text_lengths: fewest and most tokens of a text
    text_embedding_dim: width of the text encoder that is imitated; 1024 is T5-11B's
    """

    def __init__(
        self,
        seq_length: int | None = 2048,
        micro_batch_size: int = 1,
        global_batch_size: int = 8,
        num_workers: int = 1,
        pin_memory: bool = True,
        task_encoder: BasicDiffusionTaskEncoder | None = None,
        use_train_split_for_val: bool = False,
        num_train_samples: int = 10_000,
        num_val_samples: int = 64,
        num_test_samples: int = 64,
        latent_shapes: Sequence[Sequence[int]] | None = None,
        text_lengths: Sequence[int] = (4, 80),
        text_embedding_dim: int = 1024,
        seed: int = 0,
        max_seq_length: int | None = None,
        packing_buffer_size: int | None = None,
        bucket_by_shape: bool = False,
        device_mesh: Any = None,
    ) -> None:
        super().__init__()
        gradient_accumulation_steps(global_batch_size, micro_batch_size, 1)  # ranks may not be known yet
        self.task_encoder = task_encoder or BasicDiffusionTaskEncoder()
        max_seq_length = agreed("max_seq_length", max_seq_length, self.task_encoder.max_seq_length)
        bucket_by_shape = bucket_by_shape or self.task_encoder.bucket_by_shape
        refuse_unfit_packing(max_seq_length, packing_buffer_size, bucket_by_shape)
        self._own_multiple = self.task_encoder.length_multiple
        if latent_shapes is None:
            most_patches = min(seq_length or self.task_encoder.seq_length or 2048, max_seq_length or 2**63)
            latent_shapes = self._shapes_that_fit(most_patches)
        self.task_encoder.max_seq_length = max_seq_length
        self.task_encoder.bucket_by_shape = bucket_by_shape
        self.seq_length = self._fitting_length(seq_length, latent_shapes)
        self.task_encoder.seq_length = self.seq_length
        fewest, most = text_lengths
        if not 1 <= fewest <= most:
            raise UserError(f"text_lengths must be two numbers, 1 <= fewest <= most, got {list(text_lengths)}")
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.use_train_split_for_val = use_train_split_for_val
        self.num_train_samples = num_train_samples
        self.num_val_samples = num_val_samples
        self.num_test_samples = num_test_samples
        self.max_seq_length = max_seq_length
        self.packing_buffer_size = packing_buffer_size
        self.bucket_by_shape = bucket_by_shape
        self.device_mesh = device_mesh
        self.latent_shapes = latent_shapes
        self.text_lengths = (fewest, most)
        self.text_embedding_dim = text_embedding_dim
        self.seed = seed
        self._train: FakeLoader | None = None
        self._saved: dict[str, int] | None = None

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro batches that make one step of the optimizer; depends on the number of ranks."""
        return gradient_accumulation_steps(self.global_batch_size, self.micro_batch_size, self._parallel().size)

    def train_dataloader(self) -> FakeLoader:
        """The training stream; each call goes on with the same one."""
        if self._train is None:
            self.gradient_accumulation_steps  # noqa: B018 - refuses batch sizes that don't fit the ranks
            self._train = self._loader(self.num_train_samples, self.seed, training=True)
            if self._saved is not None:
                self._train.epoch, self._train.batches_done = self._saved["epoch"], self._saved["batches"]
        return self._train

    def val_dataloader(self) -> FakeLoader | list[Any]:
        """One pass over the validation samples; an empty list if there are none."""
        if self.use_train_split_for_val:
            return self._loader(self.num_train_samples, self.seed)
        return self._loader(self.num_val_samples, self.seed + 1) if self.num_val_samples else []

    def test_dataloader(self) -> FakeLoader | list[Any]:
        """One pass over the test samples; an empty list if there are none."""
        return self._loader(self.num_test_samples, self.seed + 2) if self.num_test_samples else []

    def state_dict(self) -> dict[str, Any]:
        """The place in the training stream; the same on all ranks."""
        if self._train is None:
            return self._saved or {}
        return {"epoch": self._train.epoch, "batches": self._train.batches_done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the place for `train_dataloader`, which goes there."""
        self._saved, self._train = state_dict or None, None

    def _parallel(self) -> DataParallel:
        return data_parallel(self.trainer, self.device_mesh)

    def _loader(self, num_samples: int, seed: int, training: bool = False) -> FakeLoader:
        parallel = self._parallel()
        self.task_encoder.length_multiple = math.lcm(self._own_multiple, parallel.length_multiple)
        dataset = FakeLatents(
            self.task_encoder,
            num_samples,
            latent_shapes=self.latent_shapes,
            text_lengths=self.text_lengths,
            text_embedding_dim=self.text_embedding_dim,
            seed=seed,
        )
        planner = BatchPlanner(dataset, self.task_encoder, self.micro_batch_size, self.packing_buffer_size)
        return FakeLoader(
            dataset,
            planner,
            parallel,
            batches_a_step=self.global_batch_size // self.micro_batch_size if training else None,
            seed=seed,
            keeps_samples_together=self.packing_buffer_size is not None or self.bucket_by_shape,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory and torch.cuda.is_available(),
        )

    def _shapes_that_fit(self, seq_length: int) -> list[tuple[int, ...]]:
        """A square picture, one twice as wide as high, and a square clip of 5 latent frames, as large as can be."""
        spatial, temporal = self.task_encoder.patch_spatial, self.task_encoder.patch_temporal

        def shape(patches: int, frames: int, aspect: int) -> tuple[int, ...]:
            rows = math.isqrt(patches // (frames * aspect))
            return (_CHANNELS, frames * temporal, rows * spatial, rows * aspect * spatial)

        shapes = [shape(seq_length, 1, 1), shape(seq_length, 1, 2), shape(seq_length, 5, 1)]
        return [each for each in shapes if min(each) > 0]

    def _fitting_length(self, asked: int | None, shapes: Sequence[Sequence[int]]) -> int:
        """seq_length; every shape has to fit, since a map-style dataset can't skip."""
        lengths = [self.task_encoder.sequence_length_of(shape) for shape in shapes]
        if not lengths or None in lengths:
            raise UserError("latent_shapes must be (C, T, H, W) that whole patches cover")
        longest = max(length for length in lengths if length is not None)
        length = asked or self.task_encoder.seq_length or longest
        if self.task_encoder.max_seq_length is not None and longest > self.task_encoder.max_seq_length:
            raise UserError(
                f"a latent of latent_shapes becomes {longest} patches, more than "
                f"max_seq_length={self.task_encoder.max_seq_length}; raise it or choose smaller latent_shapes"
            )
        if longest > length:
            raise UserError(
                f"a latent of latent_shapes becomes {longest} patches, more than seq_length={length}; "
                "raise seq_length or choose smaller latent_shapes"
            )
        return length
