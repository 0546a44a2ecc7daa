"""Drawing by Euler steps: exact where the velocity is known, with guidance, from the text of each sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion_data.scripts.rectified_flow import draw
from diffusion_data.scripts.sample_layout import SampleARow


class KnownFlow(nn.Module):
    """The velocity towards data that is the mean of the sample's text, in all patches."""

    def forward(self, patches: Tensor, timesteps: Tensor, *, layout: SampleARow, text: Tensor, **_: Any) -> Tensor:
        assert layout.text_mask is not None
        mask = layout.text_mask[..., None]
        target = ((text * mask).sum(1) / mask.sum(1))[:, None].expand_as(patches)
        return (patches - target) / timesteps[:, None, None]


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
