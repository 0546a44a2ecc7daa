"""Sample number -> random LatentSample, or the DiffusionSample that the real task encoder makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.energon import SkipSample
from torch.utils.data import Dataset

from diffusion_data.diffusion_sample import DiffusionSample
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
from diffusion_data.text_dropout import uniform

_SPATIAL_COMPRESSION = _TEMPORAL_COMPRESSION = 8
_CLIP_FPS = 24.0
_EMPTY_CAPTION = -1  # in the place of a sample's number


class Place(NamedTuple):
    """A sample and where it is used."""

    sample: int
    row: int
    """Row of its batch."""
    epoch: int | None
    """None in validation, where no caption is dropped."""


class FakeLatents(Dataset[Any]):
    """Map-style: `Place` -> (row, encoded sample)."""

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
        if task_encoder.text_dropout > 0 and task_encoder.empty_text is None:
            rng = np.random.default_rng([seed, abs(_EMPTY_CAPTION), num_samples])
            empty = rng.standard_normal((1, text_embedding_dim), dtype=np.float32)
            task_encoder.empty_text = torch.from_numpy(empty).to(torch.bfloat16)

    def __len__(self) -> int:
        return self._num_samples

    def latent_shape(self, index: int) -> tuple[int, ...]:
        """(C, T, H, W) of a sample."""
        return self._draw(index)[1]

    def _draw(self, index: int) -> tuple[np.random.Generator, tuple[int, ...]]:
        rng = np.random.default_rng([self._seed, index])
        return rng, self._latent_shapes[rng.integers(len(self._latent_shapes))]

    def latent_sample(self, index: int) -> LatentSample:
        """Normally distributed latent and text; shape and text length drawn at random."""
        rng, shape = self._draw(index)
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

    def __getitem__(self, place: Place) -> tuple[int, DiffusionSample]:
        sample = self.latent_sample(place.sample)
        crude = {
            "__key__": sample.key,
            "__restore_key__": (),
            LATENT_PART: sample.latent,
            TEXT_PART: sample.text_embedding,
            METADATA_PART: sample.metadata,
        }
        try:
            encoded = self._task_encoder.encode_sample(cook(crude))
        except SkipSample as skipped:
            skips = self._task_encoder.skips
            raise UserError(
                f"filters and limits of the task encoder leave out fake samples ({skips}), which the fake datamodule "
                "can't replace: set none of these"
            ) from skipped
        if place.epoch is not None and self._task_encoder.text_dropout > 0:
            encoded = self._task_encoder.drop_text(encoded, uniform(self._seed, place.epoch, place.sample))
        return place.row, encoded

    def collate(self, samples: list[tuple[int, DiffusionSample]]) -> dict[str, Any]:
        """What `__getitem__` gave for the samples of a batch -> the batch."""
        encoder = self._task_encoder
        if encoder.max_seq_length is None:
            return encoder.encode_batch(encoder.batch([sample for _, sample in samples]))
        rows = [[sample for _, sample in row] for _, row in groupby(samples, key=lambda numbered: numbered[0])]
        return encoder.encode_batch(encoder.batch([encoder.pack_selected_samples(row) for row in rows]))
