"""The steps that NeMo's diffusion task encoder takes with a sample, as a measure for ours. Not for training.

Decoded parts (latent (C, T, H, W), text (S, E), json) -> a batch of sequences padded one by one. Written anew
after its description: three scans for bad values, random seeds set for each sample, `rearrange`, `F.pad`,
positions from a grid, energon's general collation.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from megatron.energon import Cooker, DefaultTaskEncoder, Sample, SkipSample, basic_sample_keys, edataclass, stateless

from diffusion_data.latent_sample import LATENT_PART, METADATA_PART, TEXT_PART

MAX_MAGNITUDE = 1e3
GRID = (32, 128, 128)  # frames, rows, columns


@edataclass
class Crude(Sample):
    parts: dict[str, Any]


@edataclass
class Padded(Sample):
    video: torch.Tensor
    t5_text_embeddings: torch.Tensor
    t5_text_mask: torch.Tensor
    loss_mask: torch.Tensor
    image_size: torch.Tensor
    fps: torch.Tensor
    num_frames: torch.Tensor
    seq_len_q: torch.Tensor
    seq_len_kv: torch.Tensor
    pos_ids: torch.Tensor
    latent_shape: torch.Tensor


@stateless
def cook(sample: dict[str, Any]) -> Crude:
    parts = {name: value for name, value in sample.items() if not name.startswith("__")}
    return Crude(**basic_sample_keys(sample), parts=parts)


class OriginalTaskEncoder(DefaultTaskEncoder[Crude, Padded, Any, Any]):
    """Decodes with energon's own decoder, which is what a task encoder without a decoder of its own gets."""

    cookers = (Cooker(cook),)

    def __init__(self, seq_length: int, text_length: int) -> None:
        super().__init__()
        self.seq_length = seq_length
        self.text_length = text_length
        axes = torch.meshgrid(*(torch.arange(size) for size in GRID), indexing="ij")
        self.grid = torch.stack(axes, dim=-1)

    @stateless(restore_seeds=True)
    def encode_sample(self, sample: Crude) -> Padded:
        latent, info = sample.parts[LATENT_PART], sample.parts[METADATA_PART]
        if torch.isnan(latent).any() or torch.isinf(latent).any():
            raise SkipSample
        if torch.max(torch.abs(latent)) > MAX_MAGNITUDE:
            raise SkipSample
        channels, frames, height, width = latent.shape
        length = frames * height * width // 4
        if length > self.seq_length:
            raise SkipSample
        video = rearrange(latent, "C (T pt) (H ph) (W pw) -> (T H W) (ph pw pt C)", ph=2, pw=2, pt=1)
        text = torch.from_numpy(sample.parts[TEXT_PART]).to(torch.bfloat16)[: self.text_length]
        loss_mask = torch.zeros(self.seq_length, dtype=torch.bfloat16)
        loss_mask[:length] = 1
        positions = rearrange(self.grid[:frames, : height // 2, : width // 2], "T H W coordinate -> (T H W) coordinate")
        size = [info["height"], info["width"]]
        return Padded.derive_from(
            sample,
            video=F.pad(video, (0, 0, 0, self.seq_length - length)),
            t5_text_embeddings=F.pad(text, (0, 0, 0, self.text_length - len(text))),
            t5_text_mask=torch.ones(len(text), dtype=torch.bfloat16),
            loss_mask=loss_mask,
            image_size=torch.tensor([size + size], dtype=torch.bfloat16),
            fps=torch.tensor([info["framerate"] or 30], dtype=torch.bfloat16),
            num_frames=torch.tensor([info["num_frames"]], dtype=torch.bfloat16),
            seq_len_q=torch.tensor(length, dtype=torch.int32),
            seq_len_kv=torch.tensor(self.text_length, dtype=torch.int32),
            pos_ids=F.pad(positions, (0, 0, 0, self.seq_length - length)),
            latent_shape=torch.tensor([channels, frames, height, width], dtype=torch.int32),
        )

    @stateless
    def batch(self, samples: list[Padded]) -> dict[str, Any]:
        batch = super().batch(samples)
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
