"""One encoded sample, as it stands between the task encoder's `encode_sample` and `batch`. No padding yet."""

from __future__ import annotations

from typing import Any

import torch
from megatron.energon import Sample, edataclass


@edataclass
class CookedSample(Sample):
    """The decoded parts of a sample, not looked at yet.

    parts: part name -> tensor, array, dict, or `BadPart`
    """

    parts: dict[str, Any]


@edataclass
class DiffusionSample(Sample):
    """A sample in patches. S patches of dimension D = patch_spatial**2 * patch_temporal * C; L text tokens."""

    #: bfloat16 (S, D), patch order '(T H W) (ph pw pt C)'.
    video: torch.Tensor
    #: bfloat16 (L, E): real tokens only, at most text_embedding_padding_size.
    t5_text_embeddings: torch.Tensor
    #: int64 (S, 3): (t, h, w) of each patch. Shared between samples of one shape: don't write to it.
    pos_ids: torch.Tensor
    #: (C, T, H, W) of the latent that was patched, after max_frames cut it.
    latent_shape: tuple[int, int, int, int]
    #: (height, width) in pixels of the encoded frames.
    image_size: tuple[float, float]
    #: Frames per second of the encoded frames; 30 for a picture.
    fps: float
    #: Pixel frames that the latent stands for; 1 for a picture.
    num_frames: int

    @property
    def seq_len_q(self) -> int:
        """S, the patches of the latent."""
        return len(self.video)

    @property
    def seq_len_kv(self) -> int:
        """L, the real tokens of the text."""
        return len(self.t5_text_embeddings)
