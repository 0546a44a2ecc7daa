"""The options of the prepare job, as configs/prepare.yaml and the command line give them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from diffusion_data.batching import BatchingConfig
from diffusion_data.errors import UserError
from diffusion_data.media_config import MediaConfig
from diffusion_data.sources import SourceConfig


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """name: a bundled tokenizer (tiny-cosmos), a name on the Hugging Face hub, or a folder.

    cache_dir: where files from the hub are kept; None for huggingface_hub's own place
    dtype: of the computation: float32, bfloat16, or auto, which is bfloat16 on CUDA and float32 on a CPU; a CPU with
        instructions for bfloat16 (avx512_bf16, amx_bf16) is quicker with it, any other several times slower
    compile: full batches, each shape of them once, by torch.compile. That takes up to minutes a shape and rank, so it
        pays for long runs of few shapes (media.resize=buckets); what doesn't fill a batch isn't compiled
    channels_last: clips in the memory layout that GPUs compute convolutions in; pictures always are
    """

    name: str
    cache_dir: str | None = None
    dtype: str = "auto"
    compile: bool = False
    channels_last: bool = False

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None leaves it to the encoder."""
        return _torch_dtype(self.dtype, "tokenizer.dtype")


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """name: a bundled encoder (tiny-t5), a name on the Hugging Face hub, or a folder.

    cache_dir: as the tokenizer's
    max_length: tokens; what a caption has beyond is cut, and counted
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
    samples_per_shard: rows of a shard; None chooses by the number of rows, from 32 to 10,000. More rows make fewer
        files, which training opens faster; fewer bound memory, and what a crash costs
    split_ratio: weights of train, val, test; splits are made of whole shards
    num_workers: decode processes a rank; None shares the node's processors out, 0 decodes in line. Rows fetched by URL
        gain by more, since they mostly wait
    row_timeout_seconds: longest that fetching and decoding one row may take, before it is rejected as timeout; None
        sets no limit, nor can there be one without decode processes
    encode_threads: batches encoded at a time on a CPU; None as num_workers
    seed: of the shuffle that spreads shards over splits, and of what process functions draw, such as one of several
        captions; for a function that draws it belongs to the dataset, and can't change later
    max_reject_rate: share of rejected rows that stops the run, once 300 rows are done: a dataset that is mostly
        rejected is a wrong column name
    verify: what a restart compares of finished shards: "size", or "full", which is the checksum too
    empty_captions: reject rows whose caption is null or empty, or embed them as the empty text
    retry_rejected: network tries rows again that were rejected for it, in shards that are finished; None doesn't
    report: write run/report/index.html when the dataset is finished; takes a minute at most, of one rank
    plan: look at a few hundred rows, tell what the run would take and give, and write nothing. Start it with as many
        processes a node as the run will have: they share the node's processors, and the first works alone
    plan_gpus: GPUs (on a CPU: ranks) that the plan's hours are for; None for as many as were started
    plan_price: of one of them for an hour, in any currency; the plan then tells what the run costs
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
    verify: str
    report: bool
    plan: bool
    plan_gpus: int | None
    plan_price: float | None
    empty_captions: str
    retry_rejected: str | None
    media: MediaConfig
    tokenizer: TokenizerConfig
    text_encoder: TextEncoderConfig
    batching: BatchingConfig
    device: str

    def __post_init__(self) -> None:
        if self.verify not in ("size", "full"):
            raise UserError(f"verify: expected size or full, got {self.verify!r}")
        if self.plan_gpus is not None and self.plan_gpus < 1:
            raise UserError(f"plan_gpus: expected at least 1, or null, got {self.plan_gpus}")
        if self.empty_captions not in ("reject", "embed"):
            raise UserError(f"empty_captions: expected reject or embed, got {self.empty_captions!r}")
        if self.retry_rejected not in ("network", None):
            raise UserError(f"retry_rejected: expected network or null, got {self.retry_rejected!r}")
        if self.row_timeout_seconds is not None and not self.row_timeout_seconds > 0:
            raise UserError(f"row_timeout_seconds: expected more than 0 or null, got {self.row_timeout_seconds}")


def _torch_dtype(name: str, option: str) -> torch.dtype | None:
    dtypes = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in dtypes:
        raise UserError(f"{option}: expected {', '.join(dtypes)}, got {name!r}")
    return dtypes[name]
