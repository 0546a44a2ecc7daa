"""Everything that changes a shard's bytes, as a run finds it: what `fingerprint` compares and hashes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from diffusion_data.batching import Budgets, fingerprint_fields
from diffusion_data.encoders import Encoders
from diffusion_data.fingerprint import files_digest, library_versions, module_digest
from diffusion_data.latent_sample import FORMAT_VERSION
from diffusion_data.prepare_config import PrepareConfig
from diffusion_data.process_func_options import process_func_arguments
from diffusion_data.resize import resampler
from diffusion_data.row_decoder import handed_over, resolve_process_func
from diffusion_data.shard_plan import Shard
from diffusion_data.sources import ParquetSource

# Options that decide whether a row's media can be had, but not what comes of it.
_WAYS_TO_FETCH = (
    "allowed_roots", "allowed_hosts", "fetch_timeout_seconds", "fetch_retries", "max_redirects",
    "max_connections_per_host", "max_fetch_bytes",
)  # fmt: skip


def run_fingerprint(
    config: PrepareConfig, source: ParquetSource, shards: list[Shard], encoders: Encoders, budgets: Budgets
) -> dict[str, Any]:
    """Everything that changes a shard's bytes. Not in it: ranks, workers, splits, where models are cached."""
    tokenizer, text_encoder = encoders.tokenizer, encoders.text_encoder
    function = resolve_process_func(config.process_func["_target_"])
    return {
        "format_version": FORMAT_VERSION,
        "source": [
            {
                "name": file.name,
                "num_rows": file.num_rows,
                "num_bytes": file.num_bytes,
                "footer_sha256": file.footer_sha256,
            }
            for file in source.files
        ],
        "samples_per_shard": shards[0].num_rows,
        "process_func": {
            "_target_": config.process_func["_target_"],
            **process_func_arguments(config),
            "module_sha256": module_digest(function),
            **({"seed": config.seed} if "rng" in handed_over(function) else {}),
        },
        "metadata_columns": list(config.metadata_columns),
        "empty_captions": config.empty_captions,
        "media": {name: value for name, value in asdict(config.media).items() if name not in _WAYS_TO_FETCH},
        "versions": library_versions(),
        "resampler": resampler(),
        "tokenizer": {
            "files_sha256": files_digest(tokenizer.weight_files),
            "dtype": str(tokenizer.dtype),
            "compile": config.tokenizer.compile,
            "channels_last": config.tokenizer.channels_last,
        },
        "text_encoder": {
            "files_sha256": files_digest(text_encoder.weight_files),
            "dtype": str(text_encoder.dtype),
            "max_length": config.text_encoder.max_length,
        },
        "batching": fingerprint_fields(budgets),
        "device": tokenizer.device.type,
    }
