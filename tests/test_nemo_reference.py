"""NeMo's own Cosmos network and ours give the same latents from one encoder.jit (extra: nemo)."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_data.cosmos_tokenizer import CosmosTokenizer, scale_pixels
from tests.original_cosmos_network import save_traced

pytestmark = pytest.mark.filterwarnings("ignore")  # NeMo's dependencies warn at import


@pytest.fixture(scope="module")
def networks() -> Any:
    try:
        return importlib.import_module("nemo.collections.common.video_tokenizers.networks")
    except (ImportError, TypeError) as error:  # TypeError: beside Lightning 2.6, which it predates
        pytest.skip(f"NeMo 2.7 can't be imported ({error}): pip install -e '.[test,nemo]'")


def nemo_network(networks: Any, **changes: Any) -> torch.nn.Module:
    """With random weights; NeMo's published configuration (CV8x8x8) but for the changes."""
    config = {**copy.deepcopy(networks.TokenizerConfigs.CV.value), **changes}
    torch.manual_seed(0)
    return networks.TokenizerModels[config["name"]].value(**config).eval()


VARIANTS: dict[str, dict[str, Any]] = {
    "CV8x8x8": {},
    "CV4x8x8": {"channels_mult": [2, 4], "temporal_compression": 4},
    "CV8x16x16": {"spatial_compression": 16},
    "CV4x8x8-360p": {"patch_size": 2, "temporal_compression": 4},
}
TINY = {"channels": 8, "num_res_blocks": 1}


def compare(network: torch.nn.Module, folder: Path, frames: torch.Tensor) -> None:
    pixels = scale_pixels(frames, torch.float32)
    save_traced(network.encoder_jit(), network.decoder_jit(), pixels, folder)
    tokenizer = CosmosTokenizer.from_pretrained(folder)
    with torch.no_grad():
        expected = network.encoder_jit()(pixels)[0]
        expected_pixels = network.decode(expected)
        latents = tokenizer.network.encode(pixels).latent_dist.mode()
        ours = tokenizer.network.decode(expected).sample
    assert expected.std() > 0.05
    assert (latents - expected).abs().max() <= 1e-5
    assert (ours - expected_pixels).abs().max() <= 1e-5 * expected_pixels.abs().max()
    if frames.shape[1] == 1:  # the way that pictures go
        with torch.no_grad():
            latents = tokenizer.picture_encoder(pixels[:, :, 0])[:, :, None]
        assert (latents - expected).abs().max() <= 1e-5
    assert torch.equal(tokenizer.encode(frames), latents.to(torch.bfloat16))


def random_frames(num_frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, num_frames, height, width, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("num_frames", [1, 17])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_tiny_channels(networks: Any, tmp_path: Path, variant: str, num_frames: int) -> None:
    network = nemo_network(networks, **VARIANTS[variant], **TINY)
    compare(network, tmp_path, random_frames(num_frames, 32, 48))


def test_published_size(networks: Any, tmp_path: Path) -> None:
    compare(nemo_network(networks, **VARIANTS["CV4x8x8"]), tmp_path, random_frames(5, 64, 64))
