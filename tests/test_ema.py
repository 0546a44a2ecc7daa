"""The average of the weights: its values, and that it is saved and never trained."""

from __future__ import annotations

import pytest
from torch import nn

from diffusion_data.scripts.ema import Ema, EmaOptions


def test_early_steps_count_for_more_than_the_decay_says() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    ema = Ema(model, decay=0.5)

    model.weight.data.fill_(1.0)
    ema.update(model, step=1)
    assert ema.model.weight.item() == pytest.approx(1 - 2 / 11)

    model.weight.data.fill_(3.0)
    ema.update(model, step=1000)
    assert ema.model.weight.item() == pytest.approx(0.5 * (1 - 2 / 11) + 0.5 * 3)
    assert model.weight.item() == 3.0


def test_the_average_is_saved_and_has_nothing_to_train() -> None:
    ema = Ema(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), decay=0.9)

    assert list(ema.state_dict()) == ["model.0.weight", "model.0.bias"]
    assert not any(parameter.requires_grad for parameter in ema.parameters())
    nn.ModuleList([ema]).train()
    assert not ema.model.training


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_refuses_a_decay_that_is_no_share(decay: float) -> None:
    with pytest.raises(ValueError, match="decay must be at least 0 and below 1"):
        EmaOptions(decay=decay, validate=True)
