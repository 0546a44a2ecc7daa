"""A compact diffusion transformer: noisy patches, timestep and caption embedding -> a prediction for every patch.

    patches (B, S, P)  +  position ids (B, S, 3)          text (B, L, D)           timesteps, shape and fps
            │ linear + sin-cos of (t, h, w)                  │ linear, null token           │ MLP
            ▼                                                ▼                              ▼
        hidden (B, S, hidden_size) ──▶ depth × [ self-attention, cross-attention to text, MLP ] ◀─ adaLN-zero
            │ adaLN, zero-initialised linear
            ▼
        prediction (B, S, P), see rectified_flow.py

Self-attention also rotates queries and keys by position (axial RoPE), so that it need not learn what lies beside what.
Each sample has a noise level, shape and text of its own, whether it has a row to itself or shares one with others
(see sample_layout.py). Positions see only those of their own sample, and padding changes nothing at the real ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_data.errors import UserError
from diffusion_data.scripts.sample_layout import SampleARow, SamplesInOneRow

_FREQUENCIES = 256  # sin-cos features of a scalar before its MLP
_ROTARY_BASE = 100.0  # of axial RoPE on grids of some tens of patches: Heo et al. 2024, arXiv:2403.13298


class DiT(nn.Module):
    """The whole network. At initialisation its output is zero and every block is the identity.

    patch_channels: latent channels × patch height × width × frames: 16 × 2 × 2 × 1 of the default data options.
    text_embedding_dim: width of the stored text embeddings: 1024 for t5-11b and tiny-t5.
    """

    def __init__(
        self,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        patch_channels: int = 64,
        text_embedding_dim: int = 1024,
    ) -> None:
        if hidden_size % (2 * num_heads):
            raise ValueError(f"hidden_size must be a multiple of 2 * num_heads, got {hidden_size=} {num_heads=}")
        super().__init__()
        self.hidden_size, self.patch_channels = hidden_size, patch_channels
        self.head_size = hidden_size // num_heads
        self.text_embedding_dim = text_embedding_dim
        self.patch_embedding = nn.Linear(patch_channels, hidden_size)
        self.text_embedding = nn.Sequential(
            nn.LayerNorm(text_embedding_dim), nn.Linear(text_embedding_dim, hidden_size)
        )
        # Always attended to, so that a caption without tokens has something to look at.
        self.null_text = nn.Parameter(torch.randn(hidden_size) * 0.02)
        self.text_pooling = nn.Linear(hidden_size, hidden_size)
        self.timestep_embedding = ScalarEmbedding(1, hidden_size)
        self.size_embedding = ScalarEmbedding(4, hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.final_modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.output = nn.Linear(hidden_size, patch_channels)
        self._initialise()

    def forward(
        self,
        patches: Tensor,
        timesteps: Tensor,
        *,
        layout: SampleARow | SamplesInOneRow,
        position_ids: Tensor,
        text: Tensor,
        image_size: Tensor,
        fps: Tensor,
        num_frames: Tensor,
    ) -> Tensor:
        """patches (B, S, P), timesteps (N,) from 0 (data) to 1 (noise) of the N samples -> prediction (B, S, P).

        layout: how the N samples lie in the B rows.  position_ids: int64 (B, S, 3) of (t, h, w).
        text: (B, L, D).  image_size: (N, 4) of [h, w, h, w] pixels.  fps, num_frames: (N,).
        """
        self._check_widths(patches, text)
        hidden = self.patch_embedding(patches) + self._position_embedding(position_ids).to(patches.dtype)
        size = torch.stack([image_size[:, 0], image_size[:, 1], fps, num_frames], dim=1).float()
        condition = self.timestep_embedding(1000 * timesteps[:, None]) + self.size_embedding(size.log1p() * 100)
        embedded_text = self.text_embedding(text)
        embedded_text = layout.put_first(self.null_text.to(embedded_text.dtype), embedded_text)
        condition = F.silu(condition + self.text_pooling(layout.pool(embedded_text)))

        angles = rotary_angles(position_ids, self.head_size)
        for block in self.blocks:
            hidden = block(hidden, condition, embedded_text, angles, layout)

        shift, scale = layout.spread(self.final_modulation(condition)).chunk(2, dim=-1)
        return self.output(modulate(self.final_norm(hidden), shift, scale))

    def _position_embedding(self, position_ids: Tensor) -> Tensor:
        """int64 (B, S, 3) -> (B, S, hidden_size): a third of the features each for t, h and w."""
        per_axis = self.hidden_size // 6 * 2
        embedding = sin_cos(position_ids, per_axis, longest_period=1000.0).flatten(-2)
        return F.pad(embedding, (0, self.hidden_size - embedding.shape[-1]))

    def _check_widths(self, patches: Tensor, text: Tensor) -> None:
        if patches.shape[-1] != self.patch_channels:
            raise UserError(
                f"patches have {patches.shape[-1]} channels, the model expects {self.patch_channels}; "
                f"set model.patch_channels={patches.shape[-1]}"
            )
        if text.shape[-1] != self.text_embedding_dim:
            raise UserError(
                f"text embeddings have {text.shape[-1]} features, the model expects {self.text_embedding_dim}; "
                f"set model.text_embedding_dim={text.shape[-1]}"
            )

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        zeroed = [self.final_modulation, self.output]
        for block in self.blocks:
            assert isinstance(block, Block)
            zeroed += [block.modulation, block.cross_attention.output]
        for linear in zeroed:
            nn.init.zeros_(linear.weight)


class Block(nn.Module):
    """Self-attention, cross-attention to the text, MLP; each added to `hidden` (B, S, hidden_size)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attention = Attention(hidden_size, num_heads)
        self.norm_cross_attention = nn.LayerNorm(hidden_size, eps=1e-6)
        self.cross_attention = Attention(hidden_size, num_heads)
        self.norm_mlp = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        inner_size = int(hidden_size * mlp_ratio)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, inner_size), nn.GELU(approximate="tanh"), nn.Linear(inner_size, hidden_size)
        )
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(
        self, hidden: Tensor, condition: Tensor, text: Tensor, angles: Tensor, layout: SampleARow | SamplesInOneRow
    ) -> Tensor:
        """condition: (N, hidden_size).  text: (B, L, hidden_size), the null token before each sample's.

        angles: from `rotary_angles`.
        """
        modulation = layout.spread(self.modulation(condition)).chunk(6, dim=-1)
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = modulation
        normed = modulate(self.norm_attention(hidden), shift_attention, scale_attention)
        hidden = hidden + gate_attention * self.attention(normed, normed, layout.attend, angles)
        hidden = hidden + self.cross_attention(self.norm_cross_attention(hidden), text, layout.attend_to_text)
        normed = modulate(self.norm_mlp(hidden), shift_mlp, scale_mlp)
        return hidden + gate_mlp * self.mlp(normed)


class Attention(nn.Module):
    """Multi-head attention of queries (B, S, hidden_size) to context (B, L, hidden_size), with normed q and k."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size)
        self.norm_query = nn.RMSNorm(hidden_size // num_heads, eps=1e-6)
        self.norm_key = nn.RMSNorm(hidden_size // num_heads, eps=1e-6)
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(
        self,
        queries: Tensor,
        context: Tensor,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        angles: Tensor | None = None,
    ) -> Tensor:
        """attend: mixes values by queries and keys, (B, heads, S or L, features) each.

        angles: by which the features of queries and keys are rotated, of self-attention
        """
        query = self._split_heads(self.query(queries))
        key, value = (self._split_heads(part) for part in self.key_value(context).chunk(2, dim=-1))
        query, key = self.norm_query(query.float()), self.norm_key(key.float())
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        mixed = attend(query.to(value.dtype), key.to(value.dtype), value)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _split_heads(self, features: Tensor) -> Tensor:
        return features.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class ScalarEmbedding(nn.Module):
    """num_scalars numbers (B, num_scalars) -> (B, hidden_size)."""

    def __init__(self, num_scalars: int, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(num_scalars * _FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, scalars: Tensor) -> Tensor:
        features = sin_cos(scalars, _FREQUENCIES, longest_period=10_000.0).flatten(-2)
        return self.mlp(features)


def sin_cos(values: Tensor, num_features: int, longest_period: float) -> Tensor:
    """Any shape -> float32 (*shape, num_features): sines, then cosines, at geometrically falling frequencies."""
    half = num_features // 2
    exponents = torch.arange(half, device=values.device, dtype=torch.float32) / half
    angles = values.float()[..., None] * torch.exp(-math.log(longest_period) * exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def rotary_angles(position_ids: Tensor, head_size: int) -> Tensor:
    """int64 (B, S, 3) -> float32 (B, 1, S, head_size / 2): of its features h and w have 3/8 each, t has the rest."""
    pairs = head_size // 2
    spatial = pairs * 3 // 8
    angles = []
    for axis, number in enumerate((pairs - 2 * spatial, spatial, spatial)):
        exponents = torch.arange(number, device=position_ids.device, dtype=torch.float32) / max(1, number)
        angles.append(position_ids[..., axis, None].float() * _ROTARY_BASE**-exponents)
    return torch.cat(angles, dim=-1)[:, None]


def rotate(features: Tensor, angles: Tensor) -> Tensor:
    """Each of the first half of the features (B, heads, S, F) turns with one of the second half by (B, 1, S, F / 2)."""
    first, second = features.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def modulate(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: the timestep and shape condition scale and shift normalised features."""
    return normed * (1 + scale) + shift
