from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusion_data import text_conversion
from diffusion_data.text_conversion import convert_finite

every_half = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
every_finite_half = every_half[np.isfinite(every_half)]


@pytest.fixture(params=[1, 100, 1 << 18])
def values_a_thread(request, monkeypatch) -> None:
    """From a row at a time to all at once."""
    monkeypatch.setattr(text_conversion, "_VALUES_A_THREAD", request.param)


@pytest.mark.usefixtures("values_a_thread")
def test_every_value_becomes_what_torch_makes_of_it_and_the_room_stays_as_it_is():
    source = every_finite_half[:63_480].reshape(-1, 24)
    target = torch.full((len(source) + 2, 24), 7, dtype=torch.bfloat16)
    assert convert_finite(target, source)
    assert torch.equal(target[: len(source)], torch.from_numpy(source).to(torch.bfloat16))
    assert (target[len(source) :] == 7).all()


@pytest.mark.usefixtures("values_a_thread")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (49, 7), (25, 3)])
def test_one_bad_value_anywhere_is_found(bad, place):
    source = np.full((50, 8), 65504, np.float16)  # the largest half: a sum of them is finite
    target = torch.empty(50, 8, dtype=torch.bfloat16)
    assert convert_finite(target, source)
    source[place] = bad
    assert not convert_finite(target, source)


def test_infinities_of_both_signs_do_not_cancel_out():
    source = np.array([[np.inf, -np.inf]], np.float16)
    assert not convert_finite(torch.empty(1, 2, dtype=torch.bfloat16), source)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("memory", [bytes, bytearray])
def test_an_array_that_must_not_be_written_to_is_read_without_a_warning(memory):
    source = np.frombuffer(memory(every_finite_half[:64].tobytes()), np.float16).reshape(8, 8)
    source.setflags(write=False)
    target = torch.empty(8, 8, dtype=torch.bfloat16)
    assert convert_finite(target, source)
    assert torch.equal(target, torch.tensor(every_finite_half[:64].reshape(8, 8)).to(torch.bfloat16))
    assert not source.flags.writeable


def test_what_was_converted_stays_when_the_next_text_is():
    first, second = (torch.empty(3, 4, dtype=torch.bfloat16) for _ in range(2))
    convert_finite(first, np.ones((3, 4), np.float16))
    convert_finite(second, np.full((3, 4), 2, np.float16))
    assert (first == 1).all()
    assert (second == 2).all()
