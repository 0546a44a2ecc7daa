"""The continuous Cosmos video tokenizer in its original layout, for tests: pixels (B, 3, T, H, W) <-> latents.

Module and parameter names, order of operations and unused convolutions are those of the networks that NVIDIA
published as encoder.jit and decoder.jit; tests give it random weights, save it the same way and load it with ours.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class OriginalConfig:
    """Sizes of a network; the defaults are those of the published CV8x8x8."""

    channels: int = 128
    channels_mult: tuple[int, ...] = (2, 4, 4)
    num_res_blocks: int = 2
    patch_size: int = 4
    spatial_compression: int = 8
    temporal_compression: int = 8
    latent_channels: int = 16

    @property
    def level_channels(self) -> list[int]:
        return [self.channels * mult for mult in self.channels_mult]

    @property
    def num_spatial(self) -> int:
        return int(math.log2(self.spatial_compression // self.patch_size))

    @property
    def num_temporal(self) -> int:
        return int(math.log2(self.temporal_compression // self.patch_size))


PUBLISHED = {
    "CV8x8x8": OriginalConfig(),
    "CV4x8x8": OriginalConfig(channels_mult=(2, 4), temporal_compression=4),
    "CV8x16x16": OriginalConfig(spatial_compression=16),
    "CV4x8x8-360p": OriginalConfig(patch_size=2, temporal_compression=4),
}


def tiny(variant: str) -> OriginalConfig:
    """A published variant with few channels and layers."""
    return replace(PUBLISHED[variant], channels=8, num_res_blocks=1)


def repeat_first_frame(x: Tensor, times: int) -> Tensor:
    return torch.cat([x[:, :, :1].expand(-1, -1, times, -1, -1), x], dim=2)


class CausalConv3d(nn.Module):
    def __init__(self, c_in, c_out, kernel=(1, 1, 1), stride=(1, 1, 1), padding=0):
        super().__init__()
        self.past, self.padding = kernel[0] - stride[0], padding
        self.conv3d = nn.Conv3d(c_in, c_out, kernel, stride)

    def forward(self, x):
        return self.conv3d(F.pad(repeat_first_frame(x, self.past), (self.padding,) * 4 + (0, 0)))


def space_then_time(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(CausalConv3d(c_in, c_out, (1, 3, 3), padding=1), CausalConv3d(c_out, c_out, (3, 1, 1)))


class Normalize(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(1, channels, eps=1e-6)

    def forward(self, x):
        frames = self.norm(rearrange(x, "b c t h w -> (b t) c h w"))
        return rearrange(frames, "(b t) c h w -> b c t h w", b=x.shape[0])


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = Normalize(c_in), space_then_time(c_in, c_out)
        self.norm2, self.conv2 = Normalize(c_out), space_then_time(c_out, c_out)
        self.nin_shortcut = CausalConv3d(c_in, c_out) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Over the positions of a frame, or over the frames of a position, where a frame sees no later one."""

    def __init__(self, channels, temporal):
        super().__init__()
        self.norm = Normalize(channels)
        self.q, self.k, self.v = (CausalConv3d(channels, channels) for _ in "qkv")
        self.proj_out = CausalConv3d(channels, channels)
        self.temporal = temporal

    def forward(self, x):
        b, channels, t, h, w = x.shape
        pattern = "(b h w) t c" if self.temporal else "(b t) (h w) c"
        normed = self.norm(x)
        q, k, v = (rearrange(f(normed), f"b c t h w -> {pattern}") for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(1, 2) / math.sqrt(channels)
        if self.temporal:
            future = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        out = rearrange(scores.softmax(-1) @ v, f"{pattern} -> b c t h w", b=b, t=t, h=h, w=w)
        return x + self.proj_out(out)


class Downsample(nn.Module):
    def __init__(self, channels, spatial, temporal):
        super().__init__()
        self.spatial, self.temporal = spatial, temporal
        self.conv1 = CausalConv3d(channels, channels, (1, 3, 3), (1, 2, 2))
        self.conv2 = CausalConv3d(channels, channels, (3, 1, 1), (2, 1, 1))
        self.conv3 = CausalConv3d(channels, channels)

    def forward(self, x):
        if not self.spatial and not self.temporal:
            return x
        if self.spatial:
            x = F.pad(x, (0, 1, 0, 1, 0, 0))
            x = self.conv1(x) + F.avg_pool3d(x, (1, 2, 2))
        if self.temporal:
            x = repeat_first_frame(x, 1)
            x = self.conv2(x) + F.avg_pool3d(x, (2, 1, 1))
        return self.conv3(x)


class Upsample(nn.Module):
    def __init__(self, channels, spatial, temporal):
        super().__init__()
        self.spatial, self.temporal = spatial, temporal
        self.conv1 = CausalConv3d(channels, channels, (3, 1, 1))
        self.conv2 = CausalConv3d(channels, channels, (1, 3, 3), padding=1)
        self.conv3 = CausalConv3d(channels, channels)

    def forward(self, x):
        if not self.spatial and not self.temporal:
            return x
        if self.temporal:
            if x.shape[2] > 1:
                x = x.repeat_interleave(2, dim=2)[:, :, 1:]
            x = self.conv1(x) + x
        if self.spatial:
            x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
            x = self.conv2(x) + x
        return self.conv3(x)


class Wavelets(nn.Module):
    """Haar transform over 2x2x2 blocks, log2(patch_size) times, and its inverse."""

    def __init__(self, patch_size):
        super().__init__()
        self.patch_size = patch_size
        self.register_buffer("wavelets", torch.full((2,), 0.5**0.5), persistent=False)
        self.register_buffer("_arange", torch.arange(2), persistent=False)
        self.register_buffer("patch_size_buffer", torch.tensor([patch_size], dtype=torch.int32), persistent=False)

    def matrix(self):
        return torch.stack([self.wavelets, self.wavelets * (-1) ** self._arange])


class Patcher(Wavelets):
    def forward(self, x):
        x = repeat_first_frame(x, self.patch_size - 1)
        for _ in range(int(math.log2(self.patch_size))):
            x = rearrange(x, "b c (t p) (h q) (w r) -> b c t p h q w r", p=2, q=2, r=2)
            m = self.matrix()
            x = torch.einsum("ip,jq,kr,bctphqwr->bijkcthw", m, m, m, x) / math.sqrt(8)
            x = x.flatten(1, 4)
        return x


class Unpatcher(Wavelets):
    def forward(self, x):
        for _ in range(int(math.log2(self.patch_size))):
            x = rearrange(x, "b (i j k c) t h w -> b i j k c t h w", i=2, j=2, k=2)
            m = self.matrix()
            x = torch.einsum("ip,jq,kr,bijkcthw->bctphqwr", m, m, m, x) * math.sqrt(8)
            x = rearrange(x, "b c t p h q w r -> b c (t p) (h q) (w r)")
        return x[:, :, self.patch_size - 1 :]


def middle(channels: int) -> nn.Module:
    mid = nn.Module()
    mid.block_1 = ResBlock(channels, channels)
    mid.attn_1 = nn.Sequential(Attention(channels, False), Attention(channels, True))
    mid.block_2 = ResBlock(channels, channels)
    return mid


def level(c_in: int, c_out: int, num_blocks: int) -> nn.Module:
    module = nn.Module()
    module.block = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out) for i in range(num_blocks))
    module.attn = nn.ModuleList()
    return module


class Encoder(nn.Module):
    def __init__(self, config: OriginalConfig):
        super().__init__()
        channels = [config.channels, *config.level_channels]
        self.patcher3d = Patcher(config.patch_size)
        self.conv_in = space_then_time(3 * config.patch_size**3, channels[0])
        self.down = nn.ModuleList()
        for i in range(len(channels) - 1):
            down = level(channels[i], channels[i + 1], config.num_res_blocks)
            if i < len(channels) - 2:
                down.downsample = Downsample(channels[i + 1], i < config.num_spatial, i < config.num_temporal)
            self.down.append(down)
        self.mid = middle(channels[-1])
        self.norm_out = Normalize(channels[-1])
        self.conv_out = space_then_time(channels[-1], config.latent_channels)

    def forward(self, x):
        x = self.conv_in(self.patcher3d(x))
        for down in self.down:
            for block in down.block:
                x = block(x)
            if hasattr(down, "downsample"):
                x = down.downsample(x)
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, config: OriginalConfig):
        super().__init__()
        levels = config.level_channels
        self.conv_in = space_then_time(config.latent_channels, levels[-1])
        self.mid = middle(levels[-1])
        self.up = nn.ModuleList()  # the last is applied first
        for i in range(len(levels)):
            c_in = levels[min(i + 1, len(levels) - 1)]
            up = level(c_in, levels[i], config.num_res_blocks + 1)
            if i > 0:
                step = len(levels) - 1 - i
                temporal = 0 < step <= config.num_temporal
                more_space = config.num_spatial > config.num_temporal
                spatial = temporal or (step < config.num_spatial and more_space)
                up.upsample = Upsample(levels[i], spatial, temporal)
            self.up.append(up)
        self.norm_out = Normalize(levels[0])
        self.conv_out = space_then_time(levels[0], 3 * config.patch_size**3)
        self.unpatcher3d = Unpatcher(config.patch_size)

    def forward(self, x):
        x = self.conv_in(x)
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        for up in reversed(self.up):
            for block in up.block:
                x = block(x)
            if hasattr(up, "upsample"):
                x = up.upsample(x)
        return self.unpatcher3d(self.conv_out(F.silu(self.norm_out(x))))


def original_network(config: OriginalConfig, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder with random weights, named as in the published files."""
    torch.manual_seed(seed)
    z = config.latent_channels
    encoder = OrderedDict(encoder=Encoder(config), quant_conv=CausalConv3d(z, z))
    decoder = OrderedDict(post_quant_conv=CausalConv3d(z, z), decoder=Decoder(config))
    return nn.Sequential(encoder).eval(), nn.Sequential(decoder).eval()


def save_traced(encoder: nn.Module, decoder: nn.Module, pixels: Tensor, folder: Path) -> None:
    """encoder.jit and decoder.jit as the hub has them."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        latents = encoder(pixels)
        latents = latents[0] if isinstance(latents, tuple) else latents
        for module, example, name in ((encoder, pixels, "encoder"), (decoder, latents, "decoder")):
            torch.jit.trace(module, example, check_trace=False).save(str(folder / f"{name}.jit"))
