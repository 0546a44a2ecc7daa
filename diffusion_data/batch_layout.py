"""DiffusionSamples -> one batch, a row for each sample (see diffusion_taskencoder for the keys)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from diffusion_data.diffusion_sample import DiffusionSample
from diffusion_data.errors import UserError
from diffusion_data.patchify import patchify_into

_ONE_AS_BFLOAT16 = 0x3F80


def padded_batch(samples: Sequence[DiffusionSample], *, length: int, text_length: int) -> dict[str, Any]:
    """length: positions of each row. text_length: tokens of each row."""
    size, width = len(samples), require_one_width(samples)
    bf16 = torch.bfloat16
    # Every position is written once: what is the sample's, then what is padding.
    video = torch.empty(size, length, width.video, dtype=bf16)
    positions = torch.empty(size, length, 3, dtype=torch.int64)
    if size == 1 and len(samples[0].text_and_room) >= text_length:
        text = samples[0].text_and_room[None, :text_length]
    else:
        text = torch.empty(size, text_length, width.text, dtype=bf16)
    for row, sample in enumerate(samples):
        patches, tokens = sample.seq_len_q, sample.seq_len_kv
        write_patches(video[row, :patches], positions[row, :patches], sample)
        if text.data_ptr() != sample.text_and_room.data_ptr():
            text[row, :tokens] = sample.t5_text_embeddings
        if tokens < text_length:
            text[row, tokens:] = 0
        if patches < length:
            video[row, patches:] = 0
            positions[row, patches:] = 0
    return {
        "video": video,
        "t5_text_embeddings": text,
        "t5_text_mask": mask_of([sample.seq_len_kv for sample in samples], text_length),
        "loss_mask": mask_of([sample.seq_len_q for sample in samples], length),
        "pos_ids": positions,
        **per_sample_values(samples),
    }


def write_patches(video: torch.Tensor, positions: torch.Tensor, sample: DiffusionSample) -> None:
    """Fill bfloat16 (S, D) and int64 (S, 3) with the sample's."""
    patchify_into(video, sample.latent, *sample.patch_sizes)
    positions[:] = sample.pos_ids


def per_sample_values(samples: Sequence[DiffusionSample]) -> dict[str, Any]:
    """What a batch holds once for each sample, whatever the layout of its sequences."""

    def tensor(values: list[Any], dtype: type) -> torch.Tensor:
        return torch.from_numpy(np.array(values, dtype))  # torch.tensor takes several times as long

    values: dict[str, Any] = {
        "seq_len_q": tensor([sample.seq_len_q for sample in samples], np.int32),
        "seq_len_kv": tensor([sample.seq_len_kv for sample in samples], np.int32),
        "image_size": tensor([sample.image_size * 2 for sample in samples], np.float32),
        "fps": tensor([sample.fps for sample in samples], np.float32),
        "num_frames": tensor([sample.num_frames for sample in samples], np.float32),
        "latent_shape": tensor([sample.latent_shape for sample in samples], np.int32),
        "__key__": [sample.__key__ for sample in samples],
    }
    if any(sample.__subflavors__ for sample in samples):
        values["__subflavors__"] = [dict(sample.__subflavors__ or {}) for sample in samples]
    return values


def mask_of(lengths: Sequence[int], longest: int) -> torch.Tensor:
    """bfloat16 (B, longest): 1 for the first of each row."""
    bits = np.zeros((len(lengths), longest), np.int16)
    for row, length in enumerate(lengths):
        bits[row, :length] = _ONE_AS_BFLOAT16
    return torch.from_numpy(bits).view(torch.bfloat16)


class Widths(NamedTuple):
    video: int
    text: int


def require_one_width(samples: Sequence[DiffusionSample]) -> Widths:
    """One dataset is made with one tokenizer and one text encoder; a mixture can't be batched.

    Raises:
        UserError: the samples differ, naming one that does.
    """
    first = _widths(samples[0])
    for sample in samples[1:]:
        for name, width, expected in zip(("video", "t5_text_embeddings"), _widths(sample), first, strict=True):
            if width != expected:
                raise UserError(
                    f"{name} of {sample.__key__} is {width} wide, that of {samples[0].__key__} {expected}: the "
                    "dataset mixes the output of different models"
                )
    return first


def _widths(sample: DiffusionSample) -> Widths:
    patch_spatial, patch_temporal = sample.patch_sizes
    return Widths(patch_spatial**2 * patch_temporal * sample.latent.shape[0], sample.text_and_room.shape[1])
