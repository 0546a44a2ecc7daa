"""Rectified flow: x_t = (1 - t) x + t noise, with x the scaled latent; the velocity is noise - x.

    batch, noise, t  ─▶ rectified_flow_loss        noise, text ─▶ draw (Euler steps from t = 1 to 0) ─▶ x

The network sees x_t at a deviation of 1 (EDM's c_in, Karras et al. 2022, arXiv:2206.00364) and predicts x, of which
the velocity follows. Patches of a latent are far from white: most of their 64 directions hold next to nothing of x, but
all of them hold noise. A network that predicts x says nothing there; one that predicts noise or velocity has to undo
the noise in each, and a small one leaves it in the picture (Li and He 2025, arXiv:2511.13720).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffusion_data.scripts.sample_layout import Batch, SampleARow, SamplesInOneRow, layout_of

_LARGEST_WEIGHT = 5.0
"""Min-SNR-gamma (Hang et al. 2023, arXiv:2303.09556): low noise must not outweigh all else."""


def rectified_flow_loss(model: nn.Module, batch: Batch, noise: Tensor, timesteps: Tensor, sigma_data: float) -> Tensor:
    """Mean over the real positions of all samples: the same for samples in one row as in several.

    It is the squared error of the predicted latent, in units of the latents' variance, times `weight`.

    batch: from `without_padding`.  noise: float32, shaped as batch["video"].  timesteps: float32 (N,), one a sample.
    """
    layout = layout_of(batch)
    latents = batch["video"].float() * sigma_data
    time = layout.spread(timesteps[:, None])
    predicted = predict_latents(
        model,
        (1 - time) * latents + time * noise,
        timesteps,
        sigma_data,
        layout=layout,
        position_ids=batch["pos_ids"],
        text=batch["t5_text_embeddings"].float(),
        image_size=batch["image_size"],
        fps=batch["fps"],
        num_frames=batch["num_frames"],
    )
    error = ((predicted - latents) / sigma_data).square() * weight(time, sigma_data)
    mask = batch["loss_mask"].float()
    return (error.mean(dim=-1) * mask).sum() / mask.sum().clamp(min=1)  # a batch without samples counts for nothing


def predict_latents(
    model: nn.Module,
    noisy: Tensor,
    timesteps: Tensor,
    sigma_data: float,
    *,
    layout: SampleARow | SamplesInOneRow,
    **conditions: Tensor,
) -> Tensor:
    """float32 (B, S, P) of `noisy` (B, S, P).  timesteps: (N,).  sigma_data: deviation of the scaled latents."""
    time = layout.spread(timesteps[:, None])
    deviation = (((1 - time) * sigma_data) ** 2 + time**2).sqrt()
    return sigma_data * model(noisy / deviation, timesteps, layout=layout, **conditions).float()


def weight(time: Tensor, sigma_data: float) -> Tensor:
    """Of the error at each noise level: EDM's, 1 plus the ratio of signal to noise, but at most _LARGEST_WEIGHT."""
    return (1 + ((1 - time) * sigma_data / time) ** 2).clamp(max=_LARGEST_WEIGHT)


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
    guidance: how far to go from what is predicted without caption to that with it; 1 is with it, and half the work.
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
        latents = predict_latents(model, inputs, time, sigma_data, layout=layout, text=text, **shape)
        if guided:
            with_text, without = latents.chunk(2)
            latents = without + guidance * (with_text - without)
        velocity = (patches - latents) / times[step]
        patches = patches + (times[step + 1] - times[step]) * velocity
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
