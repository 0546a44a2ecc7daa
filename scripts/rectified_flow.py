"""Rectified flow: x_t = (1 - t) x + t noise, with x the scaled latent; the velocity is noise - x.

    batch, noise, t  ─▶ rectified_flow_loss        noise, text ─▶ draw (Euler steps from t = 1 to 0) ─▶ x

The network gives what the best linear guess of the velocity from x_t leaves open, in units of its deviation. So it
need not carry the noise through to its output, and starts, with an output of zero, from that guess.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffusion_data.scripts.sample_layout import Batch, SampleARow, SamplesInOneRow, layout_of


def rectified_flow_loss(model: nn.Module, batch: Batch, noise: Tensor, timesteps: Tensor, sigma_data: float) -> Tensor:
    """Mean squared error over the real positions of all samples: the same for samples in one row as in several.

    It is in units of the best linear guess's, at each noise level: 1 is what that guess is worth.

    batch: from `without_padding`.  noise: float32, shaped as batch["video"].  timesteps: float32 (N,), one a sample.
    """
    layout = layout_of(batch)
    latents = batch["video"].float() * sigma_data
    time = layout.spread(timesteps[:, None])
    noisy = (1 - time) * latents + time * noise
    prediction = model(
        noisy,
        timesteps,
        layout=layout,
        position_ids=batch["pos_ids"],
        text=batch["t5_text_embeddings"].float(),
        image_size=batch["image_size"],
        fps=batch["fps"],
        num_frames=batch["num_frames"],
    )
    share, deviation = linear_guess(time, sigma_data)
    left_open = (noise - latents - share * noisy) / deviation
    error = (prediction.float() - left_open).square().mean(dim=-1)
    mask = batch["loss_mask"].float()
    return (error * mask).sum() / mask.sum().clamp(min=1)  # a batch without samples counts for nothing


def velocity(
    model: nn.Module,
    noisy: Tensor,
    timesteps: Tensor,
    sigma_data: float,
    *,
    layout: SampleARow | SamplesInOneRow,
    **conditions: Tensor,
) -> Tensor:
    """float32 (B, S, P) at `noisy` (B, S, P).  timesteps: (N,).  sigma_data: deviation of the scaled latents."""
    share, deviation = linear_guess(layout.spread(timesteps[:, None]), sigma_data)
    return share * noisy + deviation * model(noisy, timesteps, layout=layout, **conditions).float()


def linear_guess(time: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """What share of x_t the best linear guess of the velocity is, and the deviation of the velocity from it."""
    variance = ((1 - time) * sigma_data) ** 2 + time**2
    return (time - (1 - time) * sigma_data**2) / variance, sigma_data * variance.rsqrt()


@torch.no_grad()
def draw(
    model: nn.Module,
    noise: Tensor,
    *,
    text: Tensor,
    text_mask: Tensor,
    unconditional_text: Tensor,
    steps: int,
    guidance: float,
    sigma_data: float,
    shape: dict[str, Tensor],
) -> Tensor:
    """noise (B, S, P) -> scaled latents' patches (B, S, P), with classifier-free guidance.

    text: (B, L, D) with text_mask (B, L).  unconditional_text: (M, D), of the empty caption.
    guidance: how far to go from the velocity without caption to that with it; 1 is with it, and half the work.
    shape: position_ids (B, S, 3), image_size (B, 4), fps (B,) and num_frames (B,) of what is drawn.
    """
    guided = guidance != 1
    if guided:
        text, text_mask = _with_unconditional(text, text_mask, unconditional_text)
        shape = {name: torch.cat([values, values]) for name, values in shape.items()}
    layout = SampleARow(None, text_mask)
    patches = noise
    times = torch.linspace(1, 0, steps + 1, device=noise.device)
    for step in range(steps):
        inputs = torch.cat([patches, patches]) if guided else patches
        time = times[step].expand(len(inputs))
        direction = velocity(model, inputs, time, sigma_data, layout=layout, text=text, **shape)
        if guided:
            with_text, without = direction.chunk(2)
            direction = without + guidance * (with_text - without)
        patches = patches + (times[step + 1] - times[step]) * direction
    return patches


def _with_unconditional(text: Tensor, text_mask: Tensor, unconditional_text: Tensor) -> tuple[Tensor, Tensor]:
    """(2B, L, D) and (2B, L): each text, then as many empty captions; L is at least the empty caption's length."""
    missing = max(0, len(unconditional_text) - text.shape[1])
    text = nn.functional.pad(text, (0, 0, 0, missing))
    text_mask = nn.functional.pad(text_mask, (0, missing))
    without, without_mask = torch.zeros_like(text), torch.zeros_like(text_mask)
    without[:, : len(unconditional_text)] = unconditional_text
    without_mask[:, : len(unconditional_text)] = 1
    return torch.cat([text, without]), torch.cat([text_mask, without_mask])
