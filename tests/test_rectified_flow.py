"""Drawing by Euler steps: exact where the velocity is known, with guidance, from the text of each sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion_data.scripts.rectified_flow import draw, linear_guess, velocity
from diffusion_data.scripts.sample_layout import SampleARow

SIGMA = 0.5


class KnownFlow(nn.Module):
    """What `velocity` makes the velocity towards data that is the mean of the sample's text, in all patches."""

    def forward(self, patches: Tensor, timesteps: Tensor, *, layout: SampleARow, text: Tensor, **_: Any) -> Tensor:
        assert layout.text_mask is not None
        mask = layout.text_mask[..., None]
        target = ((text * mask).sum(1) / mask.sum(1))[:, None].expand_as(patches)
        time = timesteps[:, None, None]
        share, deviation = linear_guess(time, SIGMA)
        return ((patches - target) / time - share * patches) / deviation


def drawn(steps: int, guidance: float) -> Tensor:
    text, mask = torch.full((2, 3, 4), 100.0), torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    text[0, :2], text[1, 0] = 5.0, -2.0
    return draw(
        KnownFlow(),
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


@pytest.mark.parametrize("time", [0.0, 0.3, 0.8, 1.0])
def test_a_prediction_of_zero_is_the_best_linear_guess(time: float) -> None:
    random = torch.Generator().manual_seed(0)
    data = SIGMA * torch.randn(1, 1000, 100, generator=random)
    noise = torch.randn(1, 1000, 100, generator=random)
    noisy, wanted = (1 - time) * data + time * noise, noise - data
    guess = velocity(ZeroModel(), noisy, torch.tensor([time]), SIGMA, layout=SampleARow(None, None))

    best = (wanted * noisy).sum() / noisy.square().sum()  # least squares
    torch.testing.assert_close(guess, best * noisy, atol=0.02, rtol=0.02)
    deviation = linear_guess(torch.tensor(time), SIGMA)[1]
    assert (wanted - guess).std().item() == pytest.approx(deviation.item(), rel=0.02)


class ZeroModel(nn.Module):
    def forward(self, patches: Tensor, timesteps: Tensor, **_: Any) -> Tensor:
        return torch.zeros_like(patches)
