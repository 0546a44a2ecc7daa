import sys
from types import SimpleNamespace

import pytest

from diffusion_data.errors import UserError
from diffusion_data.parallel_ranks import data_parallel, gradient_accumulation_steps


def fake_megatron(initialised: bool) -> SimpleNamespace:
    return SimpleNamespace(
        is_initialized=lambda: initialised,
        get_data_parallel_rank=lambda: 1,
        get_data_parallel_world_size=lambda: 4,
        get_data_parallel_group=lambda: "group",
        get_tensor_model_parallel_world_size=lambda: 2,
        get_context_parallel_world_size=lambda: 3,
    )


def test_alone_without_anything(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    parallel = data_parallel()
    assert (parallel.rank, parallel.size, parallel.group) == (0, 1, None)


def test_torchruns_variables_count_before_a_process_group_exists(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert (data_parallel().rank, data_parallel().size) == (2, 3)


def test_the_trainers_ranks_come_before_torchruns_variables(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    parallel = data_parallel(SimpleNamespace(global_rank=1, world_size=2))
    assert (parallel.rank, parallel.size) == (1, 2)


def test_megatron_core_comes_first_once_it_is_initialised(monkeypatch):
    trainer = SimpleNamespace(global_rank=5, world_size=8)
    monkeypatch.setitem(sys.modules, "megatron.core.parallel_state", fake_megatron(initialised=False))
    assert data_parallel(trainer).size == 8
    monkeypatch.setitem(sys.modules, "megatron.core.parallel_state", fake_megatron(initialised=True))
    parallel = data_parallel(trainer)
    assert (parallel.rank, parallel.size, parallel.group) == (1, 4, "group")
    assert parallel.length_multiple == 12


def test_gradient_accumulation():
    assert gradient_accumulation_steps(8, 1, 1) == 8
    assert gradient_accumulation_steps(8, 2, 4) == 1


@pytest.mark.parametrize(("global_batch_size", "nearest"), [(8, "6"), (1, "6"), (10, "12")])
def test_batch_sizes_that_do_not_divide_are_refused_with_one_that_would(global_batch_size, nearest):
    with pytest.raises(UserError, match=f"set global_batch_size={nearest}"):
        gradient_accumulation_steps(global_batch_size, 2, 3)


def test_batch_sizes_below_one_are_refused():
    with pytest.raises(UserError, match="at least 1"):
        gradient_accumulation_steps(8, 0, 1)
