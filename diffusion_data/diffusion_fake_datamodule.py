"""No dataset -> batches like a real dataset's, from random latents and texts.

Random `LatentSample`s go through the real task encoder, so keys, shapes and dtypes are the real ones by
construction. Sample i of a seed is always the same, whatever the ranks, workers and batch sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from diffusion_data.diffusion_taskencoder import BasicDiffusionTaskEncoder, cook
from diffusion_data.errors import UserError
from diffusion_data.latent_sample import (
    LATENT_PART,
    METADATA_PART,
    TEXT_PART,
    LatentSample,
    build_metadata,
    sample_key,
)
from diffusion_data.parallel_ranks import DataParallel, data_parallel, gradient_accumulation_steps

_CHANNELS = 16
_SPATIAL_COMPRESSION = _TEMPORAL_COMPRESSION = 8
_CLIP_FPS = 24.0


class FakeLatents(Dataset[Any]):
    """Map-style: index -> encoded DiffusionSample."""

    def __init__(
        self,
        task_encoder: BasicDiffusionTaskEncoder,
        num_samples: int,
        *,
        latent_shapes: Sequence[Sequence[int]],
        text_lengths: tuple[int, int],
        text_embedding_dim: int,
        seed: int,
    ) -> None:
        self._task_encoder = task_encoder
        self._num_samples = num_samples
        self._latent_shapes = [tuple(shape) for shape in latent_shapes]
        self._text_lengths = text_lengths
        self._text_embedding_dim = text_embedding_dim
        self._seed = seed

    def __len__(self) -> int:
        return self._num_samples

    def latent_sample(self, index: int) -> LatentSample:
        """Normally distributed latent and text; shape and text length drawn at random."""
        rng = np.random.default_rng([self._seed, index])
        shape = self._latent_shapes[rng.integers(len(self._latent_shapes))]
        tokens = int(rng.integers(self._text_lengths[0], self._text_lengths[1] + 1))
        text = rng.standard_normal((tokens, self._text_embedding_dim), dtype=np.float32)
        _, frames, height, width = shape
        pixels = (height * _SPATIAL_COMPRESSION, width * _SPATIAL_COMPRESSION)
        return LatentSample(
            key=sample_key(index),
            latent=torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(torch.bfloat16),
            text_embedding=text.astype(np.float16),
            metadata=build_metadata(
                caption="",
                image_height=pixels[0],
                image_width=pixels[1],
                height=pixels[0],
                width=pixels[1],
                num_frames=1 + _TEMPORAL_COMPRESSION * (frames - 1),
                framerate=None if frames == 1 else _CLIP_FPS,
                num_text_tokens=tokens,
                source_file="",
                source_row=index,
                extra={},
            ),
        )

    def __getitem__(self, index: int) -> Any:
        sample = self.latent_sample(index)
        crude = {
            "__key__": sample.key,
            "__restore_key__": (),
            LATENT_PART: sample.latent,
            TEXT_PART: sample.text_embedding,
            METADATA_PART: sample.metadata,
        }
        return self._task_encoder.encode_sample(cook(crude))

    def collate(self, samples: list[Any]) -> dict[str, Any]:
        """DiffusionSamples -> batch."""
        return self._task_encoder.encode_batch(self._task_encoder.batch(samples))


class FakeLoader:
    """Batches of one data-parallel rank; every rank has equally many.

    Training: a new order each epoch, the tail that doesn't fill a step of all ranks is left out. A pass
    that a checkpoint interrupted goes on where it was. Validation: in order, from the start each time.
    """

    def __init__(
        self,
        dataset: FakeLatents,
        parallel: DataParallel,
        *,
        micro_batch_size: int,
        samples_a_step: int | None,
        seed: int,
        **loading: Any,
    ) -> None:
        self._dataset = dataset
        self._parallel = parallel
        self._micro_batch_size = micro_batch_size
        self._samples_a_step = samples_a_step
        self._seed = seed
        self._loading = loading
        self.epoch = 0
        self.batches_done = 0
        self._length = -(-len(self._indices()) // micro_batch_size)
        if self._length == 0:
            raise UserError(
                f"{len(dataset)} fake samples don't fill one step on {parallel.size} ranks; raise num_train_samples"
            )

    def _indices(self) -> list[int]:
        """Samples of this rank in this epoch."""
        count, ranks = len(self._dataset), self._parallel.size
        if self._samples_a_step is None:
            order = np.arange(-(-count // ranks) * ranks) % max(count, 1)  # the last ranks repeat a few
        else:
            order = np.random.default_rng([self._seed, self.epoch]).permutation(count)
            order = order[: count // self._samples_a_step * self._samples_a_step]
        return order[self._parallel.rank :: ranks].tolist()

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._samples_a_step is None:
            self.batches_done = 0
        loader = DataLoader(
            self._dataset,
            batch_size=self._micro_batch_size,
            sampler=self._indices()[self.batches_done * self._micro_batch_size :],
            collate_fn=self._dataset.collate,
            **self._loading,
        )
        for batch in loader:
            self.batches_done += 1
            if self.batches_done == self._length:
                self.epoch, self.batches_done = self.epoch + 1, 0
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Empty: the datamodule saves the place. Being there at all tells Lightning that it can resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load here, see `state_dict`."""


class VideoLatentFakeDataModule(LightningDataModule):
    """Random latents in place of a dataset, to try, test and time a model.

    seq_length: patches each sample is padded to; None takes the longest of latent_shapes
    micro_batch_size, global_batch_size, num_workers, pin_memory, task_encoder: as in DiffusionDataModule
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
        latent_shapes: Sequence[Sequence[int]] | None = None,
        text_lengths: Sequence[int] = (4, 80),
        text_embedding_dim: int = 1024,
        seed: int = 0,
    ) -> None:
        super().__init__()
        gradient_accumulation_steps(global_batch_size, micro_batch_size, 1)  # ranks may not be known yet
        self.task_encoder = task_encoder or BasicDiffusionTaskEncoder()
        if latent_shapes is None:
            latent_shapes = self._shapes_that_fit(seq_length or self.task_encoder.seq_length or 2048)
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
        self.latent_shapes = latent_shapes
        self.text_lengths = (fewest, most)
        self.text_embedding_dim = text_embedding_dim
        self.seed = seed
        self._train: FakeLoader | None = None
        self._saved: dict[str, int] | None = None

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro batches that make one step of the optimizer; depends on the number of ranks."""
        return gradient_accumulation_steps(
            self.global_batch_size, self.micro_batch_size, data_parallel(self.trainer).size
        )

    def train_dataloader(self) -> FakeLoader:
        """The training stream; each call goes on with the same one."""
        if self._train is None:
            self.gradient_accumulation_steps  # noqa: B018 - refuses batch sizes that don't fit the ranks
            self._train = self._loader(self.num_train_samples, self.seed, self.global_batch_size)
            if self._saved is not None:
                self._train.epoch, self._train.batches_done = self._saved["epoch"], self._saved["batches"]
        return self._train

    def val_dataloader(self) -> FakeLoader | list[Any]:
        """One pass over the validation samples; an empty list if there are none."""
        if self.use_train_split_for_val:
            return self._loader(self.num_train_samples, self.seed, None)
        if self.num_val_samples == 0:
            return []
        return self._loader(self.num_val_samples, self.seed + 1, None)

    def state_dict(self) -> dict[str, Any]:
        """The place in the training stream; the same on all ranks."""
        if self._train is None:
            return self._saved or {}
        return {"epoch": self._train.epoch, "batches": self._train.batches_done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the place for `train_dataloader`, which goes there."""
        self._saved, self._train = state_dict or None, None

    def _loader(self, num_samples: int, seed: int, samples_a_step: int | None) -> FakeLoader:
        dataset = FakeLatents(
            self.task_encoder,
            num_samples,
            latent_shapes=self.latent_shapes,
            text_lengths=self.text_lengths,
            text_embedding_dim=self.text_embedding_dim,
            seed=seed,
        )
        return FakeLoader(
            dataset,
            data_parallel(self.trainer),
            micro_batch_size=self.micro_batch_size,
            samples_a_step=samples_a_step,
            seed=seed,
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
        if longest > length:
            raise UserError(
                f"a latent of latent_shapes becomes {longest} patches, more than seq_length={length}; "
                "raise seq_length or choose smaller latent_shapes"
            )
        return length
