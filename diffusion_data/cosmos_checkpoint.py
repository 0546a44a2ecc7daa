"""Weights of NVIDIA's encoder.jit / decoder.jit -> configuration and state dict of diffusers' AutoencoderKLCosmos.

Both are the same network under other names. The variant (CV4x8x8, CV8x8x8, CV8x16x16, any number of channels) is
read off the weights: shapes give patch size, channels and levels, and the traced program tells which
down-sampling convolutions are in use. The file keeps the others as well, so shapes alone could not.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch

from diffusion_data.errors import UserError
from diffusion_data.torchscript_weights import TorchScriptWeights

logger = logging.getLogger(__name__)

_RENAMES = (  # applied in this order: the specific before the general
    (r"\.down\.(\d+)\.", r".down_blocks.\1."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.mid\.block_1\.", r".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", r".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.0\.", r".mid_block.attentions.0."),
    (r"\.mid\.attn_1\.1\.", r".mid_block.temp_attentions.0."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"\.([qkv])\.conv3d\.", r".to_\1."),
    (r"\.proj_out\.conv3d\.", r".to_out.0."),
    (r"\.nin_shortcut\.conv3d\.", r".conv_shortcut."),
    (r"\.0\.conv3d\.", r".conv_s."),  # factorised convolution: first space,
    (r"\.1\.conv3d\.", r".conv_t."),  # then time
    (r"\.conv3d\.", r"."),
)


def encoder_config(weights: TorchScriptWeights) -> dict[str, Any]:
    """The part of AutoencoderKLCosmos's configuration that encoder.jit determines."""
    tensors, called = weights.tensors, weights.called_modules
    try:
        conv_in = tensors["encoder.conv_in.0.conv3d.weight"]
        levels = _count(tensors, r"encoder\.down\.(\d+)\.")
        level_channels = [_out_channels(tensors, f"encoder.down.{i}") for i in range(levels)]
        latent_channels = tensors["quant_conv.conv3d.weight"].shape[0]
    except KeyError as error:
        raise UserError(
            f"encoder.jit has no weight {error}: not a continuous Cosmos video tokenizer (names CV...)"
        ) from error
    if "encoder.conv_in.0" not in called:
        raise UserError("encoder.jit holds no traced program, which tells the compression of the tokenizer")
    patch_size = round((conv_in.shape[1] / 3) ** (1 / 3))
    if 3 * patch_size**3 != conv_in.shape[1]:
        raise UserError(f"encoder.jit takes {conv_in.shape[1]} channels, not 3 x a cube of its patch size")
    downs = [f"encoder.down.{i}.downsample" for i in range(levels)]
    return {
        "latent_channels": latent_channels,
        "encoder_block_out_channels": (conv_in.shape[0], *level_channels),
        "num_layers": _count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        "patch_size": patch_size,
        "spatial_compression_ratio": patch_size * 2 ** sum(f"{down}.conv1" in called for down in downs),
        "temporal_compression_ratio": patch_size * 2 ** sum(f"{down}.conv2" in called for down in downs),
    }


def decoder_config(weights: TorchScriptWeights) -> dict[str, Any]:
    """The part of AutoencoderKLCosmos's configuration that decoder.jit determines."""
    tensors = weights.tensors
    try:
        levels = _count(tensors, r"decoder\.up\.(\d+)\.")
        level_channels = [_out_channels(tensors, f"decoder.up.{i}") for i in range(levels)]
        conv_in = tensors["decoder.conv_in.0.conv3d.weight"]
    except KeyError as error:
        raise UserError(f"decoder.jit has no weight {error}: not a continuous Cosmos video tokenizer") from error
    return {"decode_block_out_channels": (*level_channels, conv_in.shape[0])}


def rename_for_diffusers(name: str, levels: int) -> str:
    """Name of a weight in AutoencoderKLCosmos; `levels` of resolution, which the two count from opposite ends."""
    name = re.sub(r"\.up\.(\d+)\.", lambda match: f".up_blocks.{levels - 1 - int(match[1])}.", name)
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def state_dict_for_diffusers(
    weights: TorchScriptWeights, levels: int, expected: Mapping[str, torch.Size], file_name: str
) -> dict[str, torch.Tensor]:
    """The weights under the `expected` names, all of them; those that the traced program never uses are left out.

    A network that uses a weight we have no place for, or the other way round, would load and give other latents:
    both are errors that name the weights.
    """
    used, unused = {}, []
    for name, tensor in weights.tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias"):
            continue  # constants of the wavelet transform, which diffusers makes itself
        if module in weights.called_modules:
            used[rename_for_diffusers(name, levels)] = tensor
        else:
            unused.append(name)
    if unused:
        logger.info(
            "%s: left out %d weights that its program never uses: %s",
            file_name,
            len(unused),
            ", ".join(unused),
        )
    if missing := sorted(set(expected) - set(used)):
        raise UserError(f"{file_name} lacks {len(missing)} weights of the network: {_some(missing)}")
    if unexpected := sorted(set(used) - set(expected)):
        raise UserError(f"{file_name} uses {len(unexpected)} weights unknown to the network: {_some(unexpected)}")
    if wrong := sorted(name for name in used if used[name].shape != expected[name]):
        raise UserError(f"{file_name} has weights of unexpected shapes: {_some(wrong)}")
    return used


def _count(tensors: Collection[str], pattern: str) -> int:
    return 1 + max((int(match[1]) for name in tensors if (match := re.match(pattern, name))), default=-1)


def _out_channels(tensors: dict[str, torch.Tensor], level: str) -> int:
    return tensors[f"{level}.block.0.conv1.0.conv3d.weight"].shape[0]


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
