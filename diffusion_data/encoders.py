"""The two models of a run, on a rank's device, such that results can be repeated."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.prepare_config import PrepareConfig
from diffusion_data.t5_text_encoder import T5TextEncoder


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """The two models, on this rank's device."""

    tokenizer: CosmosTokenizer
    text_encoder: T5TextEncoder


def load_encoders(config: PrepareConfig, device: torch.device) -> Encoders:
    """The models that the config names, read from disk or fetched."""
    tokenizer, text_encoder = config.tokenizer, config.text_encoder
    encoders = Encoders(
        tokenizer=CosmosTokenizer.from_pretrained(
            tokenizer.name, tokenizer.cache_dir, device, tokenizer.torch_dtype, decoder=False
        ),
        text_encoder=T5TextEncoder.from_pretrained(
            text_encoder.name, text_encoder.cache_dir, text_encoder.max_length, device, text_encoder.torch_dtype
        ),
    )
    if tokenizer.channels_last:
        encoders.tokenizer.use_channels_last()
    return encoders


def set_up_torch(device: torch.device) -> None:
    """Make results repeatable: on a CPU they depend on the number of threads, on a GPU on cuDNN's choice."""
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = True
