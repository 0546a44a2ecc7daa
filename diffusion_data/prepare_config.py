"""The options of the prepare job, as configs/prepare.yaml and the command line give them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from diffusion_data.batching import BatchingConfig
from diffusion_data.errors import UserError
from diffusion_data.media import MediaConfig
from diffusion_data.sources import SourceConfig


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """name: a bundled tokenizer (tiny-cosmos), a name on the Hugging Face hub, or a folder.

    dtype: of the computation: float32, bfloat16, or auto, which is bfloat16 on CUDA and float32 on a CPU
    compile: full batches, each shape of them once, by torch.compile. That takes up to minutes a shape and rank, so it
        pays for long runs of few shapes (media.resize=buckets); what doesn't fill a batch isn't compiled
    """

    name: str
    cache_dir: str | None = None
    dtype: str = "auto"
    compile: bool = False

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None leaves it to the encoder."""
        return _torch_dtype(self.dtype, "tokenizer.dtype")


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """name: a bundled encoder (tiny-t5), a name on the Hugging Face hub, or a folder.

    max_length: tokens; what a caption has beyond is cut, and counted.
    dtype: as the tokenizer's
    """

    name: str
    cache_dir: str | None = None
    max_length: int = 512
    dtype: str = "auto"

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None leaves it to the encoder."""
        return _torch_dtype(self.dtype, "text_encoder.dtype")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Options of the job; configs/prepare.yaml has their defaults.

    process_func: `_target_` and the function's arguments
    metadata_columns: columns whose values go into each sample's json
    samples_per_shard: rows of a shard; None chooses by the number of rows
    split_ratio: weights of train, val, test; by shard
    num_workers: decode processes a rank; None shares the node's processors out, 0 decodes in line
    row_timeout_seconds: longest that fetching and decoding one row may take; None sets no limit
    encode_threads: batches encoded at a time on a CPU; None as num_workers
    seed: of the shuffle that spreads shards over splits
    max_reject_rate: share of rejected rows that stops the run
    """

    output_dir: str
    source: SourceConfig
    process_func: dict[str, Any]
    metadata_columns: tuple[str, ...]
    samples_per_shard: int | None
    split_ratio: tuple[float, ...]
    num_workers: int | None
    row_timeout_seconds: float | None
    encode_threads: int | None
    seed: int
    max_reject_rate: float
    media: MediaConfig
    tokenizer: TokenizerConfig
    text_encoder: TextEncoderConfig
    batching: BatchingConfig
    device: str


def _torch_dtype(name: str, option: str) -> torch.dtype | None:
    dtypes = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in dtypes:
        raise UserError(f"{option}: expected {', '.join(dtypes)}, got {name!r}")
    return dtypes[name]
