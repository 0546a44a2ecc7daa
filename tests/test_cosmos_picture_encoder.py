"""The 2D encoder of still pictures gives what the network gives for one frame, whatever the network's topology."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffusion_data.cosmos_picture_encoder import PictureEncoder
from diffusion_data.cosmos_tokenizer import PUBLISHED_CONFIGS, CosmosTokenizer


def small_network(**changes: Any) -> Any:
    from diffusers import AutoencoderKLCosmos

    levels = len(changes.pop("encoder_block_out_channels", range(4)))
    sizes = {
        "encoder_block_out_channels": tuple(8 * (level + 1) for level in range(levels)),
        "decode_block_out_channels": (1,) * levels,
        "latents_mean": None,
        "latents_std": None,
    }
    torch.manual_seed(0)
    network = AutoencoderKLCosmos(**{**changes, **sizes}).eval().requires_grad_(False)
    for parameter in network.parameters():  # so that biases and the norms' weights count
        parameter.add_(torch.randn(parameter.shape) * 0.02)
    return network


def assert_same_latents(network: Any) -> None:
    pixels = torch.rand(2, 3, 64, 96) * 2 - 1
    with torch.inference_mode():
        expected = network.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
        latents = PictureEncoder(network)(pixels)
    assert expected.std() > 0.02
    torch.testing.assert_close(latents, expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("variant", PUBLISHED_CONFIGS)
def test_every_published_topology(variant: str) -> None:
    assert_same_latents(small_network(**PUBLISHED_CONFIGS[variant]))


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_resolutions": (16,), "resolution": 64},  # attention in a block, not only in the middle
        {"patch_size": 1},
        {"patch_type": "rearrange"},
        {"spatial_compression_ratio": 4, "temporal_compression_ratio": 8},  # downsampling in time alone
    ],
)
def test_other_topologies(changes: dict[str, Any]) -> None:
    assert_same_latents(small_network(**changes))


def test_a_picture_is_the_first_latent_of_a_clip() -> None:
    tokenizer = CosmosTokenizer.from_pretrained("tiny-cosmos", decoder=False)
    frames = torch.randint(0, 256, (2, 5, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture, clip = tokenizer.encode(frames[:, :1]), tokenizer.encode(frames)
    assert picture.shape == (2, 16, 1, 4, 6)
    torch.testing.assert_close(picture, clip[:, :, :1], atol=0.01, rtol=0.02)  # a rounding of bfloat16


@pytest.mark.parametrize("num_frames", [1, 5])
def test_bfloat16_on_a_cpu_is_close_to_float32(num_frames: int) -> None:
    frames = torch.randint(0, 256, (1, num_frames, 32, 48, 3), dtype=torch.uint8)
    exact = CosmosTokenizer.from_pretrained("tiny-cosmos", decoder=False).encode(frames).float()
    tokenizer = CosmosTokenizer.from_pretrained("tiny-cosmos", dtype=torch.bfloat16, decoder=False)
    assert tokenizer.dtype == torch.bfloat16
    assert (tokenizer.encode(frames).float() - exact).norm() < 0.02 * exact.norm()
