"""energon's packing stage, and what its options may be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from megatron.energon.wrappers import PackingDataset

from diffusion_data.errors import UserError


class FullPacking(PackingDataset[Any, Any, Any]):
    """Samples -> packed samples; the emptiest sequence of a buffer waits for the next one, to be filled better.

    No sample waits twice. And no progress bar is drawn while the buffer fills, as energon does.
    """

    _savable_fields = (*PackingDataset._savable_fields, "_held_back")

    def __init__(self, *arguments: Any, pre_packer: Callable[[list[Any]], list[list[Any]]], **options: Any) -> None:
        self._select = pre_packer
        super().__init__(*arguments, pre_packer=self._hold_one_back, **options)

    def reset_state_own(self) -> None:
        super().reset_state_own()
        self._held_back = 0  # samples at the buffer's beginning

    def _hold_one_back(self, samples: list[Any]) -> list[list[Any]]:
        packs = self._select(samples)
        waited = {id(sample) for sample in samples[: self._held_back]}
        self._held_back = 0
        if len(samples) < self.buffer_size or len(packs) == 1:  # the stream ends, or there is nothing to choose from
            return packs
        may_wait = [pack for pack in packs if not any(id(sample) in waited for sample in pack)]
        if not may_wait:
            return packs
        emptiest = min(may_wait, key=lambda pack: sum(sample.seq_len_q for sample in pack))
        self._reading_buffer.extend(emptiest)
        self._held_back = len(emptiest)
        return [pack for pack in packs if pack is not emptiest]

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
