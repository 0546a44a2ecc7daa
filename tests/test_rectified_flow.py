"""What is learnt; and drawing by Euler steps: exact where the data is known, with guidance, from each sample's text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion_data.scripts.rectified_flow import draw, predict_latents, rectified_flow_loss, weight
from diffusion_data.scripts.sample_layout import SampleARow, without_padding
from tests.test_dit import PATCH_CHANNELS, make_batch

SIGMA = 0.5


class KnownData(nn.Module):
    """Predicts data that is the mean of the sample's text, in all patches."""

    def forward(self, patches: Tensor, timesteps: Tensor, *, layout: SampleARow, text: Tensor, **_: Any) -> Tensor:
        assert layout.text_mask is not None
        mask = layout.text_mask[..., None]
        target = ((text * mask).sum(1) / mask.sum(1))[:, None].expand_as(patches)
        return target / SIGMA


def drawn(steps: int, guidance: float) -> Tensor:
    text, mask = torch.full((2, 3, 4), 100.0), torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    text[0, :2], text[1, 0] = 5.0, -2.0
    return draw(
        KnownData(),
        torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)),
        text=text,
        text_mask=mask,
        unconditional_text=torch.ones(5, 4),  # longer than the texts
        steps=steps,
        guidance=guidance,
        sigma_data=SIGMA,
        shape={"fps": torch.tensor([30.0, 24.0])},
    )


@pytest.mark.parametrize("steps", [1, 7])
def test_a_straight_flow_ends_at_its_data(steps: int) -> None:
    patches = drawn(steps, guidance=1.0)

    torch.testing.assert_close(patches[0], torch.full((6, 4), 5.0))
    torch.testing.assert_close(patches[1], torch.full((6, 4), -2.0))


def test_guidance_goes_beyond_the_text_away_from_the_empty_caption() -> None:
    patches = drawn(1, guidance=3.0)

    torch.testing.assert_close(patches[0], torch.full((6, 4), 1 + 3 * (5.0 - 1)))
    torch.testing.assert_close(patches[1], torch.full((6, 4), 1 + 3 * (-2.0 - 1)))


class Constant(nn.Module):
    """Predicts `value` everywhere, and keeps what it was given."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, patches: Tensor, timesteps: Tensor, **_: Any) -> Tensor:
        self.patches = patches
        return torch.full_like(patches, self.value)


@pytest.mark.parametrize("time", [0.0, 0.3, 0.8, 1.0])
def test_the_network_sees_a_deviation_of_1_and_answers_in_units_of_the_data(time: float) -> None:
    random = torch.Generator().manual_seed(0)
    data = SIGMA * torch.randn(1, 1000, 100, generator=random)
    noisy = (1 - time) * data + time * torch.randn(1, 1000, 100, generator=random)
    model = Constant(2.0)
    latents = predict_latents(model, noisy, torch.tensor([time]), SIGMA, layout=SampleARow(None, None))

    assert model.patches.std().item() == pytest.approx(1, rel=0.01)
    assert torch.equal(latents, torch.full_like(noisy, 2 * SIGMA))


def test_the_loss_is_the_weighted_error_of_the_latents_whatever_the_noise() -> None:
    batch = without_padding(make_batch(seq_length=6, garbage=7.0))
    times = torch.tensor([0.25, 0.5])
    noise = torch.randn(2, 6, PATCH_CHANNELS, generator=torch.Generator().manual_seed(0))
    loss = rectified_flow_loss(Constant(1.5), batch, noise, times, SIGMA)

    first, second = (
        (batch["video"][sample, :length].float() - 1.5).square().mean(dim=-1).sum()
        for sample, length in ((0, 6), (1, 4))
    )
    # Signal to noise: (0.75 * 0.5 / 0.25)^2 and (0.5 * 0.5 / 0.5)^2
    torch.testing.assert_close(loss, (first * (1 + 2.25) + second * (1 + 0.25)) / 10)


def test_low_noise_does_not_outweigh_all_else() -> None:
    assert weight(torch.tensor([0.0, 0.01, 0.2, 1.0]), SIGMA).tolist() == [5.0, 5.0, 5.0, 1.0]
