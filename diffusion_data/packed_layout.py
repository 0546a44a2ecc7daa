"""Samples that share sequences -> one batch (see diffusion_taskencoder for the keys).

    row 0   | sample 0 | sample 1 |  padding |      cu_seqlens_q         0  n0  n0+n1  n0+n1+n2
    row 1   |      sample 2     |   padding  |      cu_seqlens_q_padded  0  n0  S      2*S

Texts lie the same way in rows of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from megatron.energon import Sample, edataclass

from diffusion_data.batch_layout import mask_of, per_sample_values, require_one_width, write_patches
from diffusion_data.diffusion_sample import DiffusionSample


@edataclass
class PackedSample(Sample):
    """Samples that share a sequence, in its order."""

    samples: list[DiffusionSample]

    @classmethod
    def of(cls, samples: Sequence[DiffusionSample]) -> PackedSample:
        first = samples[0]
        return cls(__key__=first.__key__, __restore_key__=first.__restore_key__, samples=list(samples))


def rounded_up(number: int, multiple: int) -> int:
    """The next multiple of `multiple` that isn't below `number`."""
    return -(-number // multiple) * multiple


def packed_batch(rows: Sequence[Sequence[DiffusionSample]], *, length: int, multiple: int) -> dict[str, Any]:
    """length: positions of each row. multiple: each sample's patches begin at a multiple of it within their row."""
    samples = [sample for row in rows for sample in row]
    width = require_one_width(samples)
    starts = [_starts([sample.seq_len_q for sample in row], multiple) for row in rows]
    text_starts = [_starts([sample.seq_len_kv for sample in row], 1) for row in rows]
    text_length = rounded_up(max(row[-1] for row in text_starts), multiple)
    video = torch.zeros(len(rows), length, width.video, dtype=torch.bfloat16)
    positions = torch.zeros(len(rows), length, 3, dtype=torch.int64)
    loss_mask = torch.zeros(len(rows), length, dtype=torch.bfloat16)
    text = torch.zeros(len(rows), text_length, width.text, dtype=torch.bfloat16)
    for row, row_samples in enumerate(rows):
        for sample, start, text_start in zip(row_samples, starts[row], text_starts[row], strict=False):
            place = slice(start, start + sample.seq_len_q)
            write_patches(video[row, place], positions[row, place], sample)
            loss_mask[row, place] = 1
            text[row, text_start : text_start + sample.seq_len_kv] = sample.t5_text_embeddings
    values = per_sample_values(samples)
    return {
        "video": video,
        "t5_text_embeddings": text,
        "t5_text_mask": mask_of([row[-1] for row in text_starts], text_length),
        "loss_mask": loss_mask,
        "pos_ids": positions,
        **values,
        "cu_seqlens_q": _cumulated(values["seq_len_q"]),
        "cu_seqlens_kv": _cumulated(values["seq_len_kv"]),
        "cu_seqlens_q_padded": _flattened(starts, length),
        "cu_seqlens_kv_padded": _flattened(text_starts, text_length),
    }


def _starts(lengths: Sequence[int], multiple: int) -> list[int]:
    """Where each begins in its row, and where the next one would."""
    return list(accumulate((rounded_up(length, multiple) for length in lengths), initial=0))


def _cumulated(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _flattened(starts: Sequence[Sequence[int]], length: int) -> torch.Tensor:
    """Where each sample begins when the rows, of `length` each, lie one after another; at last, where they end."""
    begins = [row * length + start for row, row_starts in enumerate(starts) for start in row_starts[:-1]]
    return torch.tensor([*begins, len(starts) * length], dtype=torch.int32)
