"""A decoded row -> the bytes that each of its samples will take in a shard, without encoding it."""

from __future__ import annotations

import numpy as np
import torch

from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.decoded_row import DecodedRow, DecodedSample, sample_metadata
from diffusion_data.latent_sample import LatentSample, sample_key

_BLOCK = 512  # bytes: a tar's header of a member, and what contents are filled up to
_RECORD = 20 * _BLOCK  # a tar is filled up to


def latent_shape(sample: DecodedSample, tokenizer: CosmosTokenizer) -> tuple[int, int, int, int]:
    """(C, T, H, W) of the latent that the sample will have."""
    frames, height, width, _ = sample.pixels.shape
    return (
        tokenizer.latent_channels,
        1 + (frames - 1) // tokenizer.temporal_compression,
        height // tokenizer.spatial_compression,
        width // tokenizer.spatial_compression,
    )


def stored_bytes(
    row: DecodedRow, number: int, latent_shape: tuple[int, ...], num_tokens: int, embedding_dim: int
) -> int:
    """What sample `number` of the row adds to its tar: zeros take as much room as any values do."""
    sample = row.samples[number]
    frames, height, width, _ = sample.pixels.shape
    stored = LatentSample(
        key=sample_key(row.row, number, len(row.samples)),
        latent=torch.zeros(latent_shape, dtype=torch.bfloat16),
        text_embedding=np.zeros((num_tokens, embedding_dim), np.float16),
        metadata=sample_metadata(row, sample, (frames, height, width), num_tokens),
    )
    return sum(_BLOCK + -(-len(part) // _BLOCK) * _BLOCK for part in stored.to_parts().values())


def tar_overhead_bytes() -> int:
    """Of a shard, on average: two empty blocks end it, and it is filled up to a record."""
    return 2 * _BLOCK + (_RECORD - _BLOCK) // 2
