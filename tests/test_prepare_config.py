"""Options that are names are checked where they are used."""

from __future__ import annotations

import pytest
import torch

from diffusion_data.errors import UserError
from diffusion_data.prepare_config import TextEncoderConfig, TokenizerConfig


def test_dtypes_by_name() -> None:
    assert TokenizerConfig(name="tiny-cosmos").torch_dtype is None
    assert TokenizerConfig(name="tiny-cosmos", dtype="bfloat16").torch_dtype == torch.bfloat16
    assert TextEncoderConfig(name="tiny-t5", dtype="float32").torch_dtype == torch.float32


def test_an_unknown_dtype_is_an_error_that_names_the_option() -> None:
    with pytest.raises(UserError, match=r"text_encoder\.dtype: expected auto, float32, bfloat16, got 'half'"):
        TextEncoderConfig(name="tiny-t5", dtype="half").torch_dtype  # noqa: B018
