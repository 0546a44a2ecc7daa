"""The weights of encoder.jit and decoder.jit find their places; whatever does not fit is an error that names it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from diffusion_data.cosmos_checkpoint import decoder_config, encoder_config, state_dict_for_diffusers
from diffusion_data.cosmos_tokenizer import PUBLISHED_CONFIGS, CosmosTokenizer
from diffusion_data.errors import UserError
from diffusion_data.torchscript_weights import TorchScriptWeights
from tests.original_cosmos_network import PUBLISHED, original_network, save_traced, tiny

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


def meta_weights(module: nn.Module, example: torch.Tensor) -> TorchScriptWeights:
    """What reading the traced archive of a network on the meta device would give."""
    called = set()
    for name, child in module.named_modules():
        child.register_forward_hook(lambda *_, name=name: called.add(name))
    module(example)
    return TorchScriptWeights(tensors=module.state_dict(), called_modules=frozenset(called))


@pytest.mark.parametrize("variant", list(PUBLISHED))
def test_published_sizes_fit_without_a_weight_left(variant: str) -> None:
    from diffusers import AutoencoderKLCosmos

    config = PUBLISHED[variant]
    with torch.device("meta"):
        network = AutoencoderKLCosmos(**PUBLISHED_CONFIGS[variant])
        encoder, decoder = original_network(config)
        pixels = torch.empty(1, 3, 1 + config.temporal_compression, 64, 64)
        encoder_weights = meta_weights(encoder, pixels)
        decoder_weights = meta_weights(decoder, encoder(pixels))
    found = {**encoder_config(encoder_weights), **decoder_config(decoder_weights)}
    assert found == {name: network.config[name] for name in found}
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    levels = len(config.channels_mult)
    for weights, parts in ((encoder_weights, ("encoder", "quant")), (decoder_weights, ("decoder", "post_quant"))):
        expected = {name: shape for name, shape in shapes.items() if name.startswith(parts)}
        assert state_dict_for_diffusers(weights, levels, expected, "file").keys() == expected.keys()


def save_encoder(encoder: nn.Module, folder: Path) -> None:
    save_traced(encoder, nn.Identity(), torch.zeros(1, 3, 1, 32, 32), folder)


def test_unused_weights_are_left_out_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_encoder(original_network(tiny("CV8x8x8"))[0], tmp_path)
    with caplog.at_level(logging.INFO, logger="diffusion_data"):
        CosmosTokenizer.from_pretrained(tmp_path, decoder=False)
    (message,) = caplog.messages
    assert "left out 6 weights that its program never uses" in message
    assert "encoder.down.1.downsample.conv1.conv3d.weight" in message


def test_missing_weights_are_named(tmp_path: Path) -> None:
    encoder, _ = original_network(tiny("CV4x8x8"))
    encoder.encoder.down[1].block[0].norm2 = nn.Identity()
    save_encoder(encoder, tmp_path)
    with pytest.raises(UserError, match=r"encoder\.jit lacks 2 weights.* encoder\.down_blocks\.1\.resnets\.0\.norm2"):
        CosmosTokenizer.from_pretrained(tmp_path, decoder=False)


def test_weights_that_the_network_has_no_place_for_are_named(tmp_path: Path) -> None:
    encoder, _ = original_network(tiny("CV4x8x8"))
    encoder.add_module("scale", nn.Conv3d(16, 16, 1))
    save_encoder(encoder, tmp_path)
    with pytest.raises(UserError, match=r"encoder\.jit uses 2 weights unknown to the network: scale\.bias"):
        CosmosTokenizer.from_pretrained(tmp_path, decoder=False)


def test_another_traced_network_is_refused(tmp_path: Path) -> None:
    save_encoder(nn.Sequential(nn.Conv3d(3, 4, 1)), tmp_path)
    with pytest.raises(UserError, match=r"no weight 'encoder\.conv_in\.0\.conv3d\.weight': not a continuous Cosmos"):
        CosmosTokenizer.from_pretrained(tmp_path, decoder=False)
