"""The options of the prepare job, as configs/prepare.yaml and the command line give them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusion_data.encode_pipeline import BatchingConfig
from diffusion_data.media import MediaConfig
from diffusion_data.sources import SourceConfig


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """name: a bundled tokenizer (tiny-cosmos), a name on the Hugging Face hub, or a folder."""

    name: str
    cache_dir: str | None = None


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """name: a bundled encoder (tiny-t5), a name on the Hugging Face hub, or a folder.

    max_length: tokens; what a caption has beyond is cut, and counted.
    """

    name: str
    cache_dir: str | None = None
    max_length: int = 512


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Options of the job; configs/prepare.yaml has their defaults.

    process_func: `_target_` and the function's arguments
    metadata_columns: columns whose values go into each sample's json
    samples_per_shard: rows of a shard; None chooses by the number of rows
    split_ratio: weights of train, val, test; by shard
    num_workers: decode processes a rank; None shares the node's processors out, 0 decodes in line
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
    seed: int
    max_reject_rate: float
    media: MediaConfig
    tokenizer: TokenizerConfig
    text_encoder: TextEncoderConfig
    batching: BatchingConfig
    device: str
