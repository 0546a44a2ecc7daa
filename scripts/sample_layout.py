"""A batch of the datamodules -> the same batch without needless padding, and where its samples lie in it.

    padded batch: B samples, each padded to S     -> padded to what the longest of them needs: rows are samples
    packed batch: B rows of samples, then padding -> one row (1, T, D) of N samples, one after another, no padding

`without_padding` runs where lengths are on the CPU; `layout_of` gives the network what it has to know of the result:
which positions attend to each other, and which sample a position belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Batch = dict[str, Any]

_LENGTH_MULTIPLE = 32  # few different lengths, which attention kernels like
_POSITION_KEYS = ("video", "loss_mask", "pos_ids")
_TEXT_KEYS = ("t5_text_embeddings", "t5_text_mask")


def is_packed(batch: Batch) -> bool:
    """Whether rows hold several samples, as the task encoder packs them."""
    return "cu_seqlens_q_padded" in batch


def without_padding(batch: Batch) -> Batch:
    """The batch with less padding, or, if it was packed, with none; for a batch whose tensors are on the CPU.

    Adds `lengths` and `text_lengths`, lists of numbers, so that nobody has to ask the device for them; `joined`,
    whether the samples now follow one another in one row; and for who counts `num_samples`, `num_tokens` and
    `num_positions`, real and in all, that the loader gave.
    """
    lengths, text_lengths = batch["seq_len_q"].tolist(), batch["seq_len_kv"].tolist()
    counts_for_nothing = not batch["__key__"]  # fills the epoch of a rank that has fewer samples than others
    known = {
        "lengths": lengths,
        "text_lengths": text_lengths,
        "num_samples": len(batch["__key__"]),
        "num_tokens": 0 if counts_for_nothing else sum(lengths),
        "num_positions": batch["loss_mask"].numel(),
    }
    if is_packed(batch):
        starts, text_starts = batch["cu_seqlens_q_padded"].tolist(), batch["cu_seqlens_kv_padded"].tolist()
        joined = {key: _join(batch[key], starts, lengths) for key in _POSITION_KEYS}
        joined |= {key: _join(batch[key], text_starts, text_lengths) for key in _TEXT_KEYS}
        return {**batch, **joined, **known, "joined": True}
    trimmed = {key: _trim(batch[key], lengths) for key in _POSITION_KEYS}
    trimmed |= {key: _trim(batch[key], text_lengths) for key in _TEXT_KEYS}
    return {**batch, **trimmed, **known, "joined": False}


def layout_of(batch: Batch) -> SampleARow | SamplesInOneRow:
    """Where the samples of a batch lie that went through `without_padding`."""
    assert "joined" in batch, "this batch has not been through without_padding"
    if batch["joined"]:
        lengths = batch["seq_len_q"]
        numbers = torch.arange(len(lengths), device=lengths.device)
        sample_of_position = numbers.repeat_interleave(lengths, output_size=batch["video"].shape[1])
        return SamplesInOneRow(batch["lengths"], batch["text_lengths"], sample_of_position[None])
    nothing_to_mask = min(batch["lengths"]) == batch["video"].shape[1]
    return SampleARow(None if nothing_to_mask else batch["loss_mask"], batch["t5_text_mask"])


@dataclass(frozen=True)
class SampleARow:
    """B rows of one sample each; masks (B, S) and (B, L) are 1 where they are real, None where all is."""

    mask: Tensor | None
    text_mask: Tensor | None

    def spread(self, values: Tensor) -> Tensor:
        """One vector a sample (B, F) -> (B, 1, F), for all of its positions."""
        return values[:, None]

    def put_first(self, token: Tensor, text: Tensor) -> Tensor:
        """text (B, L, F) with `token` (F,) before the text of each sample."""
        return torch.cat([token.expand(len(text), 1, -1), text], dim=1)

    def pool(self, text: Tensor) -> Tensor:
        """The mean (B, F) of each sample's text, made by `put_first`."""
        if self.text_mask is None:
            return text.mean(dim=1)
        mask = F.pad(self.text_mask.to(text.dtype), (1, 0), value=1.0)[..., None]
        return (text * mask).sum(dim=1) / mask.sum(dim=1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of positions to those of their sample; all are (B, heads, S, features)."""
        mask = None if self.mask is None else self.mask.bool()[:, None, None, :]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    def attend_to_text(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same to the text of the sample, made by `put_first`."""
        mask = None if self.text_mask is None else F.pad(self.text_mask.bool(), (1, 0), value=True)[:, None, None, :]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


@dataclass(frozen=True)
class SamplesInOneRow:
    """N samples and their texts one after another, each in one row (1, T) and (1, texts' lengths together).

    Attention is a call for each sample, without a mask: it does no work for pairs of different samples, which are
    most of a packed sequence's, and the quickest kernels of every device take it.
    """

    lengths: Sequence[int]
    text_lengths: Sequence[int]
    sample_of_position: Tensor  # int64 (1, T)

    def spread(self, values: Tensor) -> Tensor:
        """One vector a sample (N, F) -> (1, T, F)."""
        # An embedding is a gather whose gradient is summed in the same order each time, on CUDA too.
        return F.embedding(self.sample_of_position, values)

    def put_first(self, token: Tensor, text: Tensor) -> Tensor:
        texts = text[0].split(list(self.text_lengths))
        return torch.cat(list(chain.from_iterable((token[None], each) for each in texts)))[None]

    def pool(self, text: Tensor) -> Tensor:
        """The mean (N, F) of each sample's text, made by `put_first`."""
        texts = text[0].split([1 + length for length in self.text_lengths])
        return torch.stack([each.mean(dim=0) for each in texts])

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _attend_by_sample(query, key, value, self.lengths, self.lengths)

    def attend_to_text(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _attend_by_sample(query, key, value, self.lengths, [1 + length for length in self.text_lengths])


def _attend_by_sample(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], key_lengths: Sequence[int]
) -> Tensor:
    queries = query.split(list(lengths), dim=2)
    keys, values = key.split(list(key_lengths), dim=2), value.split(list(key_lengths), dim=2)
    samples = zip(queries, keys, values, strict=True)
    return torch.cat([F.scaled_dot_product_attention(*sample) for sample in samples], dim=2)


def _join(rows: Tensor, starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """(B, S, ...) -> (1, T, ...): what is real of each sample, in order; starts count in the flattened (B * S)."""
    flat = rows.flatten(0, 1)
    return torch.cat([flat[start : start + length] for start, length in zip(starts, lengths, strict=False)])[None]


def _trim(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """Datasets pad to their longest sample, which may be many times what this batch holds."""
    return rows[:, : -(-max(lengths) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE]
