"""Synthetic pictures and clips -> the package's tiny Cosmos tokenizer (diffusers layout, bfloat16).

    python scripts/make_tiny_cosmos.py --output diffusion_data/assets/tiny_cosmos_tokenizer

About five minutes on one idle CPU core. The network is diffusers' AutoencoderKLCosmos with the topology of
nvidia/Cosmos-0.1-Tokenizer-CV4x8x8 (frames uint8 (B, T, H, W, 3) to latents (B, 16, t, h, w)) and few
channels. It is for trying the package out and for its tests, not for making a dataset.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_cosmos import (
    AutoencoderKLCosmos,
    CosmosCausalAttention,
    CosmosCausalConv3d,
    CosmosDownsample3d,
    CosmosResnetBlock3d,
    CosmosUpsample3d,
)
from drawn_scenes import MOTIONS, draw, random_scene

DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "diffusion_data" / "assets" / "tiny_cosmos_tokenizer"
CROP = 64
"""Side of a training picture in pixels."""
CLIP_FRAMES = 5


def build_network() -> AutoencoderKLCosmos:
    return AutoencoderKLCosmos(
        encoder_block_out_channels=(32, 48, 48),
        decode_block_out_channels=(48, 48, 48),
        num_layers=1,
        patch_size=4,
        temporal_compression_ratio=4,
        spatial_compression_ratio=8,
        latents_mean=None,
        latents_std=None,
    )


@torch.no_grad()
def initialise(network: AutoencoderKLCosmos, pictures: torch.Tensor) -> None:
    """Starts the network as a nearly linear code of the current frame.

    With PyTorch's own initialisation the small network needs most of its few minutes to find that out:
    after 200 steps it is about 7 dB behind.
    """
    for module in network.modules():
        if isinstance(module, CosmosCausalConv3d):
            _pass_through(module)
    for module in network.modules():
        if isinstance(module, CosmosResnetBlock3d):
            _randomise(module.conv1.conv_s, gain=math.sqrt(2))
            _randomise(module.conv2.conv_s, gain=math.sqrt(2))
            module.conv2.conv_t.weight.mul_(0.1)
        elif isinstance(module, CosmosCausalAttention):
            projection: Any = module.to_out[0]
            projection.weight.mul_(0.05)
        elif isinstance(module, (CosmosDownsample3d, CosmosUpsample3d)):
            # These add to a pooled or repeated copy of their input, which alone is a fair start.
            for convolution in (module.conv1, module.conv2):
                if isinstance(convolution, CosmosCausalConv3d):
                    _randomise(convolution, gain=0.3)
    _principal_components_at_both_ends(network, pictures)


def _pass_through(convolution: CosmosCausalConv3d) -> None:
    """Centre of the last temporal tap = the current pixel: identity, or orthogonal rows."""
    _randomise(convolution, gain=0.02)
    weight = convolution.weight
    out_channels, in_channels, _, height, width = weight.shape
    if out_channels == in_channels:
        mixing = torch.eye(out_channels)
    else:
        mixing = torch.nn.init.orthogonal_(torch.empty(out_channels, in_channels))
    weight[:, :, -1, height // 2, width // 2] += mixing
    if convolution.bias is not None:
        convolution.bias.zero_()


def _randomise(convolution: CosmosCausalConv3d, *, gain: float) -> None:
    fan_in = convolution.weight[0].numel()
    convolution.weight.normal_(std=gain / math.sqrt(fan_in))


def _principal_components_at_both_ends(network: AutoencoderKLCosmos, pictures: torch.Tensor) -> None:
    """The first convolution keeps the strongest wavelet components, the last one puts them back."""
    wavelets = network.encoder.patch_embed(pictures).movedim(1, -1).flatten(0, -2)
    mean = wavelets.mean(0)
    strengths, directions = torch.linalg.eigh(torch.cov(wavelets.T))
    strengths, directions = strengths.flip(0), directions.flip(1)

    first = network.encoder.conv_in.conv_s.weight
    scale = 2 / strengths[0].sqrt()
    first.zero_()
    first[:, :, -1, 1, 1] = directions[:, : first.shape[0]].T * scale

    last = network.decoder.conv_out.conv_s
    kept = last.weight.shape[1]
    last.weight *= 0.1
    last.weight[:, :, -1, 1, 1] = directions[:, :kept] * strengths[:kept].sqrt() / 2
    assert last.bias is not None
    last.bias.copy_(mean)
    for convolution in (network.encoder.conv_in, network.decoder.conv_out):
        over_time = convolution.conv_t.weight
        over_time.zero_()
        over_time[:, :, -1, 0, 0] = torch.eye(len(over_time))


class SyntheticClips:
    """Endless float (B, 3, T, CROP, CROP) in [-1, 1]: cut-outs of drawn scenes, and textures."""

    def __init__(self, seed: int, num_scenes: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.rng = np.random.default_rng(seed)
        self.pool = torch.stack([self._drawn_clip() for _ in range(num_scenes)])

    def batch(self, batch_size: int, num_frames: int) -> torch.Tensor:
        return torch.stack([self._one(num_frames) for _ in range(batch_size)])

    def _one(self, num_frames: int) -> torch.Tensor:
        clip = self.pool[self._integer(len(self.pool))].float() / 127.5 - 1
        clip = self._augmented(clip)
        if num_frames == 1:
            frame = self._integer(CLIP_FRAMES)
            clip = clip[:, frame : frame + 1]
        kind = self._integer(10)
        if kind < 3:  # a drawn scene as it is, with flat colours
            return clip
        texture = self._texture(num_frames)
        if kind < 6:  # texture alone, in motion: what photographs have and drawings lack
            return texture.clamp(-1, 1)
        return (clip + 0.6 * self._uniform() * texture).clamp(-1, 1)

    def _augmented(self, clip: torch.Tensor) -> torch.Tensor:
        clip = clip[torch.randperm(3, generator=self.generator)]
        if self._integer(2):
            clip = clip.flip(-1)
        if self._integer(2):
            clip = clip.flip(1)
        return (clip * (0.5 + 0.5 * self._uniform()) + 0.4 * (self._uniform() - 0.5)).clamp(-1, 1)

    def _texture(self, num_frames: int) -> torch.Tensor:
        """Noise of all scales, mostly grey, drifting by whole pixels: (3, T, CROP, CROP)."""
        reach = 4 * (CLIP_FRAMES - 1)
        side = CROP + 2 * reach
        noise = torch.zeros(1, 3, side, side)
        slope = 0.5 + 0.35 * self._uniform()
        for octave in range(7):
            cells = 2 ** (octave + 1)
            grey = torch.randn(1, 1, cells, cells, generator=self.generator)
            tint = torch.randn(1, 3, cells, cells, generator=self.generator)
            layer = F.interpolate(grey + 0.4 * tint, size=(side, side), mode="bicubic")
            noise += slope**octave * self._uniform() * layer
        step_y, step_x = self._integer(9) - 4, self._integer(9) - 4
        frames = []
        for index in range(num_frames):
            top, left = reach + index * step_y, reach + index * step_x
            frames.append(noise[0, :, top : top + CROP, left : left + CROP])
        return torch.stack(frames, dim=1)

    def _drawn_clip(self) -> torch.Tensor:
        """uint8 (3, CLIP_FRAMES, CROP, CROP), a cut-out of a scene of any size."""
        motion = str(self.rng.choice(list(MOTIONS)))
        scene = random_scene(self.rng, num_shapes=int(self.rng.integers(1, 4)), motion=motion)
        side = int(self.rng.integers(CROP, 4 * CROP))
        # Four times as long as what is cut out, so that shapes move by pixels and not by leaps.
        frames = draw(scene, height=side, width=side, num_frames=4 * CLIP_FRAMES)
        start = int(self.rng.integers(3 * CLIP_FRAMES))
        top, left = (int(self.rng.integers(side - CROP + 1)) for _ in range(2))
        cut = frames[start : start + CLIP_FRAMES, top : top + CROP, left : left + CROP]
        return torch.from_numpy(cut.copy()).movedim(-1, 0)

    def _uniform(self) -> float:
        return float(torch.rand((), generator=self.generator))

    def _integer(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self.generator))


def batches(clips: SyntheticClips) -> Iterator[torch.Tensor]:
    """Two batches of pictures, then one of clips."""
    while True:
        yield clips.batch(12, 1)
        yield clips.batch(12, 1)
        yield clips.batch(4, CLIP_FRAMES)


def train(network: AutoencoderKLCosmos, clips: SyntheticClips, *, steps: int, peak: float) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=1e-4)
    start = time.monotonic()
    for step, target in zip(range(steps), batches(clips), strict=False):
        warm = min(1.0, step / 100)
        rate = peak * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-5
        for group in optimizer.param_groups:
            group["lr"] = rate
        difference = network(target).sample - target
        squared = difference.square().mean()
        optimizer.zero_grad()
        (difference.abs().mean() + 2 * squared).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            elapsed = time.monotonic() - start
            print(f"step {step:5d}  {elapsed:4.0f} s  {decibels(squared):.1f} dB", flush=True)


def decibels(mean_squared_error: torch.Tensor) -> float:
    """Peak signal to noise ratio of values in [-1, 1]."""
    return 10 * math.log10(4 / mean_squared_error.item())


@torch.inference_mode()
def report(network: AutoencoderKLCosmos, seed: int) -> None:
    held_out = SyntheticClips(seed, num_scenes=64)
    for name, num_frames in (("pictures", 1), (f"clips of {CLIP_FRAMES} frames", CLIP_FRAMES)):
        target = held_out.batch(64, num_frames)
        error = (network(target).sample.clamp(-1, 1) - target).square().mean()
        print(f"held-out {name}: {decibels(error):.2f} dB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the package's tiny Cosmos tokenizer.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # more threads add up in another order, and the weights differ
    torch.manual_seed(arguments.seed)
    clips = SyntheticClips(arguments.seed, num_scenes=600)
    network = build_network()
    print(f"{sum(p.numel() for p in network.parameters()):,} parameters")
    initialise(network, clips.batch(64, CLIP_FRAMES))
    train(network, clips, steps=arguments.steps, peak=arguments.learning_rate)
    torch.nn.Module.to(network.eval(), torch.bfloat16)  # diffusers' own `to` warns needlessly
    network.save_pretrained(arguments.output)
    for file in arguments.output.iterdir():
        file.chmod(0o644)  # the weights come out readable by their owner alone
    # What was written is what is measured: the weights as rounded, computed in float32.
    saved = AutoencoderKLCosmos.from_pretrained(arguments.output, low_cpu_mem_usage=False)
    report(saved.float(), arguments.seed + 1)
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
