"""pixels (B, 3, H, W) in [-1, 1] -> latents (B, 16, h, w): what a causal video encoder computes for one frame, in 2D.

Before its first frame a causal network sees that frame again and again. For a still picture, therefore, a kernel
over time is the sum of its taps, attention over time has one choice, and the wavelets' differences over time are
zero. What is left between two nonlinearities is linear and becomes one convolution: 3x3 in space followed by 3 in
time are a single 3x3, a downsampling with its pooling another. The result is the network's but for rounding, with
a quarter fewer operations, half the passes over memory and none of the 3D kernels that CPUs are slow at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

Linear = tuple[torch.Tensor, torch.Tensor]
"""weight (out, in, height, width) and bias (out,) of what is linear in the input."""


class PictureEncoder(nn.Module):
    """Made from diffusers' AutoencoderKLCosmos; holds weights of its own."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        encoder = network.encoder
        self.patch_size: int = encoder.patch_embed.patch_size
        self.conv_in = _convolution(_on_patches(_projection(encoder.conv_in), encoder.patch_embed), padding=1)
        blocks: list[nn.Module] = []
        for down in encoder.down_blocks:
            for resnet, attention, temporal in zip(down.resnets, down.attentions, down.temp_attentions, strict=True):
                blocks += [_Resnet(resnet), *_attentions(attention, temporal)]
            blocks += [_downsampling(each) for each in down.downsamplers or ()]
        middle = encoder.mid_block
        blocks.append(_Resnet(middle.resnets[0]))
        for attention, temporal, resnet in zip(
            middle.attentions, middle.temp_attentions, middle.resnets[1:], strict=True
        ):
            blocks += [*_attentions(attention, temporal), _Resnet(resnet)]
        self.blocks = nn.Sequential(*blocks)
        self.norm_out = _norm(encoder.norm_out)
        self.conv_out = _convolution(_then(_projection(encoder.conv_out), _summed(network.quant_conv)), padding=1)
        self.requires_grad_(False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = functional.pixel_unshuffle(pixels, self.patch_size)
        hidden = self.blocks(self.conv_in(patches.contiguous(memory_format=torch.channels_last)))
        return self.conv_out(functional.silu(self.norm_out(hidden), inplace=True))


class _Resnet(nn.Module):
    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(block.norm1), _norm(block.norm2)
        self.conv1 = _convolution(_projection(block.conv1), padding=1)
        self.conv2 = _convolution(_projection(block.conv2), padding=1)
        shortcut = block.conv_shortcut
        self.shortcut = nn.Identity() if isinstance(shortcut, nn.Identity) else _convolution(_summed(shortcut))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        residual = self.shortcut(hidden)
        hidden = self.conv1(functional.silu(self.norm1(hidden), inplace=True))
        return self.conv2(functional.silu(self.norm2(hidden), inplace=True)).add_(residual)


class _SpatialAttention(nn.Module):
    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.num_heads: int = attention.num_attention_heads
        self.norm = _norm(attention.norm)
        weights, biases = zip(*map(_summed, (attention.to_q, attention.to_k, attention.to_v)), strict=True)
        self.to_qkv = _convolution((torch.cat(weights), torch.cat(biases)))
        self.to_out = _convolution(_summed(attention.to_out[0]))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        height, width = hidden.shape[2:]
        qkv = self.to_qkv(self.norm(hidden)).flatten(2).mT  # (B, H W, 3 N C)
        heads = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, N, H W, C)
        mixed = functional.scaled_dot_product_attention(*heads)
        mixed = mixed.transpose(1, 2).flatten(2).mT.unflatten(2, (height, width))
        return self.to_out(mixed) + hidden


class _TemporalAttention(nn.Module):
    """Over a single frame: every weight is 1, and the value goes straight to the output."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.norm = _norm(attention.norm)
        self.value = _convolution(_then(_summed(attention.to_v), _summed(attention.to_out[0])))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.value(self.norm(hidden)).add_(hidden)


class _SpatialDownsampling(nn.Module):
    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.conv = _convolution(linear, stride=2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.conv(functional.pad(hidden, (0, 1, 0, 1)))


def _attentions(spatial: Any, temporal: Any) -> list[nn.Module]:
    """Blocks without attention have None in place of either."""
    blocks: list[nn.Module] = [] if spatial is None else [_SpatialAttention(spatial)]
    return blocks if temporal is None else [*blocks, _TemporalAttention(temporal)]


def _downsampling(block: Any) -> nn.Module:
    linear: Linear | None = None
    if block.spatial_downsample:
        weight, bias = _summed(block.conv1)
        channels = torch.arange(len(weight))
        weight = weight.clone()
        weight[channels, channels, :2, :2] += 0.25  # the average of 2x2 that is added to the convolution
        linear = weight, bias
    if block.temporal_downsample:
        weight, bias = _summed(block.conv2)
        # The average of a frame and its copy is the frame itself.
        temporal = weight + torch.eye(len(weight), dtype=weight.dtype, device=weight.device)[..., None, None], bias
        linear = temporal if linear is None else _then(linear, temporal)
    if linear is None:
        return nn.Identity()
    linear = _then(linear, _summed(block.conv3))
    return _SpatialDownsampling(linear) if block.spatial_downsample else _convolution(linear)


def _summed(conv: Any) -> Linear:
    """A causal 3D convolution of one frame: every tap in time sees it. Sums are made in float64."""
    return conv.weight.detach().double().sum(2), conv.bias.detach().double()


def _projection(projection: Any) -> Linear:
    return _then(_summed(projection.conv_s), _summed(projection.conv_t))


def _then(first: Linear, second: Linear) -> Linear:
    """`second`, which is 1x1, after `first`."""
    (weight, bias), (mixing, mixing_bias) = first, second
    mixing = mixing[:, :, 0, 0]
    return torch.einsum("om,mihw->oihw", mixing, weight), mixing @ bias + mixing_bias


def _on_patches(linear: Linear, patch_embed: Any) -> Linear:
    """`linear` after `patch_embed`, as a function of pixel_unshuffle's channels.

    What the embedding does to a picture is read off from what it does to each pixel of one patch.
    """
    weight, bias = linear
    size = patch_embed.patch_size
    num_inputs = 3 * size * size
    dtype = patch_embed.wavelets.dtype
    each_pixel = torch.eye(num_inputs, dtype=dtype, device=weight.device).view(num_inputs, 3, 1, size, size)
    embedding = patch_embed(each_pixel).flatten(1).double()  # (inputs, channels)
    return torch.einsum("omhw,im->oihw", weight, embedding), bias


def _convolution(linear: Linear, stride: int = 1, padding: int = 0) -> nn.Conv2d:
    weight, bias = linear
    conv = nn.utils.skip_init(
        nn.Conv2d, weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), stride=stride, padding=padding
    )
    conv.weight = nn.Parameter(weight.float().contiguous(memory_format=torch.channels_last))
    conv.bias = nn.Parameter(bias.float())
    return conv


def _norm(norm: Any) -> nn.GroupNorm:
    """Statistics are each frame's own in any case, as long as there is one group."""
    if norm.num_groups != 1:
        raise ValueError(f"expected a norm of one group, got {norm.num_groups}")
    copied = nn.GroupNorm(1, norm.norm.num_channels, norm.norm.eps, device=norm.norm.weight.device)
    copied.load_state_dict(norm.norm.state_dict())
    return copied.float()
