"""A decoded row -> the bytes that its sample will take in a shard, without encoding it."""

from __future__ import annotations

import numpy as np
import torch

from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.latent_sample import LatentSample, build_metadata, sample_key
from diffusion_data.row_decoder import DecodedRow

_BLOCK = 512  # bytes: a tar's header of a member, and what contents are filled up to
_RECORD = 20 * _BLOCK  # a tar is filled up to


def latent_shape(row: DecodedRow, tokenizer: CosmosTokenizer) -> tuple[int, int, int, int]:
    """(C, T, H, W) of the latent that the row will become."""
    frames, height, width, _ = row.pixels.shape
    return (
        tokenizer.latent_channels,
        1 + (frames - 1) // tokenizer.temporal_compression,
        height // tokenizer.spatial_compression,
        width // tokenizer.spatial_compression,
    )


def stored_bytes(row: DecodedRow, shape: tuple[int, ...], num_tokens: int, embedding_dim: int) -> int:
    """What the sample adds to its tar: zeros take as much room as any values do."""
    frames, height, width, _ = row.pixels.shape
    sample = LatentSample(
        key=sample_key(row.row),
        latent=torch.zeros(shape, dtype=torch.bfloat16),
        text_embedding=np.zeros((num_tokens, embedding_dim), np.float16),
        metadata=build_metadata(
            caption=row.caption,
            image_height=row.image_height,
            image_width=row.image_width,
            height=height,
            width=width,
            num_frames=frames,
            framerate=row.framerate,
            num_text_tokens=num_tokens,
            source_file=row.source_file,
            source_row=row.source_row,
            extra=row.metadata,
        ),
    )
    return sum(_BLOCK + -(-len(part) // _BLOCK) * _BLOCK for part in sample.to_parts().values())


def tar_overhead_bytes() -> int:
    """Of a shard, on average: two empty blocks end it, and it is filled up to a record."""
    return 2 * _BLOCK + (_RECORD - _BLOCK) // 2
