"""One encoded sample, as it stands between the task encoder's `encode_sample` and `batch`. No padding yet."""

from __future__ import annotations

from typing import Any

import torch
from megatron.energon import Sample, edataclass

from diffusion_data.patchify import patchify, position_ids_3d


@edataclass
class CookedSample(Sample):
    """The decoded parts of a sample, not looked at yet.

    parts: part name -> tensor, array, dict, or `BadPart`
    """

    parts: dict[str, Any]


@edataclass
class DiffusionSample(Sample):
    """A sample that was checked and cut. `batch` patches it, straight into the tensor of the batch.

    S patches of dimension D = patch_spatial**2 * patch_temporal * C; L text tokens.
    """

    #: bfloat16 (C, T, H, W), as stored.
    latent: torch.Tensor
    #: bfloat16 (text_embedding_padding_size, E): the text's tokens, then room that nothing was written to yet.
    text_and_room: torch.Tensor
    #: L, the real tokens of the text, at most text_embedding_padding_size.
    seq_len_kv: int
    #: (patch_spatial, patch_temporal)
    patch_sizes: tuple[int, int]
    #: (height, width) in pixels of the encoded frames.
    image_size: tuple[float, float]
    #: Frames per second of the encoded frames; 30 for a picture.
    fps: float
    #: Pixel frames that the latent stands for; 1 for a picture.
    num_frames: int
    #: S, the patches of the latent.
    seq_len_q: int

    @property
    def video(self) -> torch.Tensor:
        """bfloat16 (S, D), patch order '(T H W) (ph pw pt C)'. Made anew each time."""
        return patchify(self.latent, *self.patch_sizes)

    @property
    def pos_ids(self) -> torch.Tensor:
        """int64 (S, 3): (t, h, w) of each patch. Shared between samples of one shape: don't write to it."""
        patch_spatial, patch_temporal = self.patch_sizes
        _, frames, height, width = self.latent.shape
        return position_ids_3d(frames // patch_temporal, height // patch_spatial, width // patch_spatial)

    @property
    def t5_text_embeddings(self) -> torch.Tensor:
        """bfloat16 (L, E): real tokens only."""
        return self.text_and_room[: self.seq_len_kv]

    @property
    def t5_text_mask(self) -> torch.Tensor:
        """bfloat16 (L,): all 1."""
        return torch.ones(self.seq_len_kv, dtype=torch.bfloat16)

    @property
    def loss_mask(self) -> torch.Tensor:
        """bfloat16 (S,): all 1."""
        return torch.ones(self.seq_len_q, dtype=torch.bfloat16)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, T, H, W) of the latent that is patched, after max_frames cut it."""
        return tuple(self.latent.shape)
