"""frames uint8 (B, T, H, W, 3) -> latents bfloat16 (B, 16, t, h, w), raw, and back to frames.

The network is diffusers' AutoencoderKLCosmos. Its weights come from a bundled name, a local folder or the hub, in
the hub's layout (encoder.jit, decoder.jit) or in diffusers' (config.json, *.safetensors, maybe under vae/).
Causal in time: T = 1 + k * temporal_compression frames give t = 1 + k latent frames; a picture is T = 1, and has
an encoder of its own that computes the same in 2D.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Collection
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from diffusion_data.cosmos_checkpoint import decoder_config, encoder_config, state_dict_for_diffusers
from diffusion_data.cosmos_picture_encoder import PictureEncoder
from diffusion_data.errors import UserError
from diffusion_data.hub_files import WantedFiles, model_folder
from diffusion_data.torchscript_weights import read_torchscript_weights

Network = Any
"""diffusers' AutoencoderKLCosmos: untyped, and imported only when one is built."""

_MOST_SHAPES = 1000  # that are compiled

SAFETENSORS = "diffusion_pytorch_model.safetensors"
LAYOUTS = (
    ("encoder.jit", "decoder.jit"),
    ("config.json", SAFETENSORS),
    ("vae/config.json", f"vae/{SAFETENSORS}"),
)
"""The files of a tokenizer, in the hub's layout and in the two of diffusers."""

PUBLISHED_CONFIGS: dict[str, dict[str, Any]] = {
    "CV8x8x8": {},
    "CV4x8x8": {
        "encoder_block_out_channels": (128, 256, 512),
        "decode_block_out_channels": (256, 512, 512),
        "temporal_compression_ratio": 4,
    },
    "CV8x16x16": {"spatial_compression_ratio": 16},
    "CV4x8x8-360p": {"patch_size": 2, "temporal_compression_ratio": 4},
}
"""What sets each published network apart from the defaults of AutoencoderKLCosmos."""


class CosmosTokenizer:
    """A causal video autoencoder with 16 latent channels; frozen, in eval mode, on one device."""

    def __init__(
        self,
        network: Network,
        name: str,
        weight_files: list[Path],
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        if self.device.type == "cpu" and self.dtype == torch.float16:
            raise UserError("the Cosmos tokenizer can't compute in float16 on a CPU: use float32 or bfloat16")
        # not network.to: diffusers' own warns about float32 modules even where there are none
        network = torch.nn.Module.to(network, self.device).eval().requires_grad_(False)
        self.picture_encoder = PictureEncoder(network).to(self.dtype)  # from the weights before they are rounded
        self.network = torch.nn.Module.to(network, self.dtype)
        self.name = name
        self.weight_files = weight_files
        """What the latents depend on: the same list with and without the decoder."""
        self.temporal_compression: int = network.config.temporal_compression_ratio
        self.spatial_compression: int = network.config.spatial_compression_ratio
        self.latent_channels: int = network.config.latent_channels
        self._layout = torch.contiguous_format

    def use_channels_last(self) -> None:
        """Encode clips in the memory layout that tensor cores compute convolutions in, else converted for each of them.

        The latents are the same but for rounding. Pictures have an encoder that always does it.
        """
        self._layout = torch.channels_last_3d
        for module in self.network.encoder.modules():
            if isinstance(module, torch.nn.Conv3d):
                module.weight.data = module.weight.data.contiguous(memory_format=self._layout)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        cache_dir: str | Path | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        decoder: bool = True,
    ) -> CosmosTokenizer:
        """Load by bundled name, folder, or hub name (older names too).

        cache_dir: where the hub's files are kept, instead of huggingface_hub's default.
        dtype: of the computation; bfloat16 on CUDA and float32 on the CPU unless given. Only CPUs with instructions
            for bfloat16 (avx512_bf16, amx_bf16) are quicker with it, others several times slower.
        decoder: False saves reading decoder.jit where nothing will be decoded.
        """
        name, folder = _find(name_or_path, cache_dir, decoder)
        if all((folder / file).is_file() for file in _needed(LAYOUTS[0], decoder)):
            network, weight_files = _load_jit(folder, decoder)
        else:
            network, weight_files = _load_diffusers(folder)
        return cls(network, name, weight_files, device, dtype)

    @classmethod
    def random_weights(
        cls,
        variant: str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> CosmosTokenizer:
        """A published network ("CV4x8x8", ...) of the right size without its weights, for measuring speed."""
        if variant not in PUBLISHED_CONFIGS:
            raise UserError(f"no such variant: {variant}; there are {', '.join(PUBLISHED_CONFIGS)}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = _new_network(PUBLISHED_CONFIGS[variant])
        return cls(network, f"random-{variant}", [], device, dtype)

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """frames uint8 (B, T, H, W, 3) on any device -> latents bfloat16 (B, 16, t, h, w) on this device."""
        return self._encode(frames, self._latents)

    def encode_compiled(self, frames: torch.Tensor) -> torch.Tensor:
        """As `encode` but for rounding, by torch.compile for this very shape, whose first batch may take minutes."""
        return self._encode(frames, self._compiled)

    @torch.inference_mode()
    def _encode(self, frames: torch.Tensor, network: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        self._check_frames(frames)
        pixels = scale_pixels(frames.to(self.device, non_blocking=True), self.dtype, self._layout)
        with _PoolsInFloat32() if self.device.type == "cpu" and frames.shape[1] > 1 else contextlib.nullcontext():
            return network(pixels).to(torch.bfloat16)

    def _latents(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.shape[2] == 1:
            return self.picture_encoder(pixels[:, :, 0])[:, :, None]
        return self.network.encode(pixels).latent_dist.mode()

    @cached_property
    def _compiled(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Compiled anew for each shape; without torch's limit, beyond which it would go on uncompiled."""
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = _MOST_SHAPES
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        return torch.compile(self._latents, dynamic=False)

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """latents (B, 16, t, h, w) of any float dtype -> frames uint8 (B, T, H, W, 3) on this device."""
        if self.network.decoder is None:
            raise ValueError("this tokenizer was loaded with decoder=False")
        if latents.ndim != 5 or latents.shape[1] != self.latent_channels:
            raise ValueError(f"expected latents (B, {self.latent_channels}, t, h, w), got {tuple(latents.shape)}")
        pixels = self.network.decode(latents.to(self.device, self.dtype)).sample
        pixels = pixels.float().add_(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
        return pixels.permute(0, 2, 3, 4, 1).contiguous()

    def _check_frames(self, frames: torch.Tensor) -> None:
        if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[-1] != 3:
            raise ValueError(f"expected frames uint8 (B, T, H, W, 3), got {frames.dtype} {tuple(frames.shape)}")
        _, num_frames, height, width, _ = frames.shape
        if num_frames % self.temporal_compression != 1 % self.temporal_compression:
            raise ValueError(f"expected 1 + k * {self.temporal_compression} frames, got {num_frames}")
        if min(height, width) < 1 or height % self.spatial_compression or width % self.spatial_compression:
            raise ValueError(
                f"expected height and width to be multiples of {self.spatial_compression}, got {height}x{width}"
            )


class _PoolsInFloat32(TorchFunctionMode):
    """avg_pool3d is the one operation of the network that torch lacks in bfloat16 on a CPU."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.nn.functional.avg_pool3d:
            return function(args[0].float(), *args[1:], **kwargs or {}).to(args[0].dtype)
        return function(*args, **kwargs or {})


def scale_pixels(
    frames: torch.Tensor, dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format
) -> torch.Tensor:
    """uint8 (B, T, H, W, 3) in [0, 255] -> dtype (B, 3, T, H, W) in [-1, 1]: one pass, computed in float32."""
    channels_first = frames.permute(0, 4, 1, 2, 3)
    pixels = torch.empty(channels_first.shape, dtype=dtype, device=frames.device, memory_format=layout)
    return torch.add(torch.full((), -1.0, device=frames.device), channels_first, alpha=1 / 127.5, out=pixels)


def hub_name(name: str) -> str:
    """The name on the hub; older names and names without their owner are mapped, others returned as they are."""
    owner, _, model = name.rpartition("/")
    if owner not in ("", "nvidia"):
        return name
    if match := re.fullmatch(r"(?:Cosmos-Tokenizer-CV|CosmosCausalCV_f)(\d+x\d+x\d+)", model):
        return f"nvidia/Cosmos-0.1-Tokenizer-CV{match[1]}"
    return f"nvidia/{model}" if model.startswith("Cosmos-") else name


def _find(name_or_path: str | Path, cache_dir: str | Path | None, decoder: bool) -> tuple[str, Path]:
    """Name and the local folder that holds the files of one of LAYOUTS."""
    from diffusion_data.assets import bundled

    name = str(name_or_path)
    folder = bundled(name) or Path(name).expanduser()
    if folder.is_dir():
        return name, _folder_of_layout(folder, decoder)
    repo = hub_name(name)
    if isinstance(name_or_path, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
        return repo, _folder_of_layout(model_folder(repo, _wanted(decoder), cache_dir), decoder)
    raise UserError(
        f"no such model: {name} is neither bundled, nor a folder, nor a name on the hub "
        f"(owner/model); {_looked_for(decoder)}"
    )


def _needed(layout: tuple[str, str], decoder: bool) -> tuple[str, ...]:
    return layout if decoder or layout[0] != "encoder.jit" else layout[:1]


def _looked_for(decoder: bool) -> str:
    jit = "encoder.jit and decoder.jit" if decoder else "encoder.jit"
    return f"looked for {jit}, or config.json and {SAFETENSORS} (also under vae/)"


def _wanted(decoder: bool) -> WantedFiles:
    def choose(names: Collection[str]) -> list[str]:
        layouts = (_needed(layout, decoder) for layout in LAYOUTS)
        return next((list(files) for files in layouts if set(files) <= set(names)), [])

    return WantedFiles(
        kind="tokenizer",
        looked_for=_looked_for(decoder),
        choose=choose,
        is_complete=lambda folder: _layout_in(folder, decoder) is not None,
    )


def _layout_in(folder: Path, decoder: bool) -> tuple[str, str] | None:
    complete = (layout for layout in LAYOUTS if all((folder / file).is_file() for file in _needed(layout, decoder)))
    return next(complete, None)


def _folder_of_layout(folder: Path, decoder: bool) -> Path:
    layout = _layout_in(folder, decoder)
    if layout is None:
        raise UserError(f"no tokenizer in {folder}: {_looked_for(decoder)}")
    return (folder / layout[0]).parent


def _new_network(config: dict[str, Any]) -> Network:
    from diffusers import AutoencoderKLCosmos

    # Latents stay raw: diffusers' default statistics belong to one checkpoint.
    return AutoencoderKLCosmos(**{**config, "latents_mean": None, "latents_std": None})


def _load_jit(folder: Path, decoder: bool) -> tuple[Network, list[Path]]:
    encoder_file, decoder_file = folder / "encoder.jit", folder / "decoder.jit"
    encoder_weights = read_torchscript_weights(encoder_file)
    config = encoder_config(encoder_weights)
    levels = len(config["encoder_block_out_channels"]) - 1
    files = [(encoder_file, encoder_weights, ("encoder.", "quant_conv."))]
    if decoder:
        decoder_weights = read_torchscript_weights(decoder_file)
        config.update(decoder_config(decoder_weights))
        files.append((decoder_file, decoder_weights, ("decoder.", "post_quant_conv.")))
    else:  # built only to be removed, so as small as it can be
        config["decode_block_out_channels"] = (1,) * (levels + 1)
    network = _new_network(config)
    if not decoder:
        network.decoder = network.post_quant_conv = None
    shapes = {key: tensor.shape for key, tensor in network.state_dict().items()}
    state_dict = {}
    for file, weights, prefixes in files:
        expected = {key: shape for key, shape in shapes.items() if key.startswith(prefixes)}
        state_dict.update(state_dict_for_diffusers(weights, levels, expected, str(file)))
    network.load_state_dict(state_dict)
    return network, [encoder_file]


def _load_diffusers(folder: Path) -> tuple[Network, list[Path]]:
    from diffusers import AutoencoderKLCosmos

    config_file, weights_file = folder / "config.json", folder / SAFETENSORS
    class_name = json.loads(config_file.read_text()).get("_class_name")
    if class_name != "AutoencoderKLCosmos":
        raise UserError(f"{config_file} describes a {class_name}, expected an AutoencoderKLCosmos")
    network = AutoencoderKLCosmos.from_pretrained(
        folder,
        use_safetensors=True,  # never a pickle
        low_cpu_mem_usage=False,
        latents_mean=None,  # raw latents, whichever statistics the folder has
        latents_std=None,
    )
    return network, [config_file, weights_file]
