"""energon's packing stage, and what its options may be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron.energon.wrappers import PackingDataset

from diffusion_data.errors import UserError


class QuietPacking(PackingDataset[Any, Any, Any]):
    """Samples -> packed samples, without the progress bar that energon draws while its buffer fills."""

    def _fill_reading_buffer(self, source_iter: Iterator[Any], log_progress: bool = False) -> bool:
        return super()._fill_reading_buffer(source_iter, log_progress=False)


def agreed(name: str, of_datamodule: int | None, of_task_encoder: int | None) -> int | None:
    """An option that both may have: where only one has it, its value.

    Raises:
        UserError: they have different values.
    """
    if None not in (of_datamodule, of_task_encoder) and of_datamodule != of_task_encoder:
        raise UserError(f"{name}={of_datamodule}, but the task encoder was made with {of_task_encoder}")
    return of_task_encoder if of_datamodule is None else of_datamodule


def refuse_unfit_packing(max_seq_length: int | None, packing_buffer_size: int | None, bucket_by_shape: bool) -> None:
    """Packing needs both of its options, and excludes buckets.

    Raises:
        UserError: naming the option to set or leave out.
    """
    if (max_seq_length is None) != (packing_buffer_size is None):
        missing = "max_seq_length" if max_seq_length is None else "packing_buffer_size"
        raise UserError(f"packing needs max_seq_length and packing_buffer_size; {missing} is not set")
    if min(max_seq_length or 1, packing_buffer_size or 1) < 1:
        raise UserError("max_seq_length and packing_buffer_size must be at least 1")
    if max_seq_length is not None and bucket_by_shape:
        raise UserError("max_seq_length packs samples of any shape; bucket_by_shape can't be set beside it")
