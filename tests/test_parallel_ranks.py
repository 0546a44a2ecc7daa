import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch

from diffusion_data.diffusion_energon_datamodule import DiffusionDataModule
from diffusion_data.errors import UserError
from diffusion_data.parallel_ranks import data_parallel, gradient_accumulation_steps
from tests.rank_processes import run_ranks


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


def write_what_is_read(data: DiffusionDataModule, folder) -> None:
    batches = list(data.train_dataloader())
    seen = {
        "keys": [batch["__key__"][0] for batch in batches],
        "length": batches[0]["video"].shape[1],
        "states": len(data.state_dict()["ranks"]),
        "steps": data.gradient_accumulation_steps,
        "validated": [batch["__key__"] for batch in data.val_dataloader() or []],
    }
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(seen))


def read_with_mesh(dataset, folder) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
    write_what_is_read(DiffusionDataModule(dataset, global_batch_size=2, num_workers=0, device_mesh=mesh), folder)


def test_tensor_parallel_ranks_of_a_device_mesh_read_the_same_padded_to_what_they_share_out(
    make_tiny_dataset, tmp_path
):
    dataset = make_tiny_dataset(8, latent_shapes=[(4, 1, 2, 6), (4, 1, 2, 2)])  # 3 patches at most
    assert run_ranks(4, read_with_mesh, dataset, tmp_path) == [0] * 4
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    assert ranks[0] == ranks[1]
    assert ranks[2] == ranks[3]
    assert len({*ranks[0]["keys"], *ranks[2]["keys"]}) == 8
    assert ranks[0]["length"] == 4  # a multiple of 2 x 2
    assert ranks[0]["states"] == 2
    assert ranks[0]["steps"] == 1


def read_with_megatron_core(dataset, folder, tensor_parallel_size, context_parallel_size) -> None:
    from megatron.core import parallel_state

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel_size, context_parallel_size=context_parallel_size
    )
    write_what_is_read(DiffusionDataModule(dataset, global_batch_size=2, num_workers=0), folder)


@pytest.mark.filterwarnings("ignore")  # what megatron-core says of CUDA kernels that aren't there
@pytest.mark.parametrize(
    ("tensor_parallel_size", "context_parallel_size", "alike", "length"),
    [(2, 2, [(0, 1, 2, 3)], 8), (2, 1, [(0, 1), (2, 3)], 4), (1, 2, [(0, 1), (2, 3)], 4)],
)
def test_ranks_that_megatron_core_puts_together_read_the_same_and_validate_together(
    make_tiny_dataset, tmp_path, tensor_parallel_size, context_parallel_size, alike, length
):
    pytest.importorskip("megatron.core", reason="pip install --no-deps megatron-core==0.16.1")
    shapes = [(4, 1, 2, 6), (4, 1, 2, 2)]  # 3 patches at most
    dataset = make_tiny_dataset(11, latent_shapes=shapes, per_shard=1, split={"train": 8, "val": 3})
    sizes = tensor_parallel_size, context_parallel_size
    assert run_ranks(4, read_with_megatron_core, dataset, tmp_path, *sizes) == [0] * 4
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    shares = [ranks[group[0]] for group in alike]
    assert [ranks[rank] for group in alike for rank in group] == [ranks[group[0]] for group in alike for _ in group]
    assert sorted(int(key[-9:]) for share in shares for key in share["keys"]) == list(range(8))
    assert sorted(int(key[-9:]) for share in shares for keys in share["validated"] for key in keys) == [8, 9, 10]
    assert {share["length"] for share in shares} == {length}
    assert {share["states"] for share in shares} == {len(alike)}
    assert {share["steps"] for share in shares} == {2 // len(alike)}


class Mesh:
    """As much of a DeviceMesh as is asked: a process group of 48 ranks is more than a test can start."""

    def __init__(self, coordinates: dict[str, tuple[int, int]]) -> None:
        self.mesh_dim_names = tuple(coordinates)
        self.ndim = len(coordinates)
        self._of = list(coordinates.values())

    def size(self, dim):
        return self._of[dim][1]

    def get_local_rank(self, dim):
        return self._of[dim][0]


def test_data_dimensions_of_a_mesh_are_counted_together_and_the_others_are_shared():
    mesh = Mesh({"pp": (1, 2), "dp_replicate": (1, 2), "dp_shard": (2, 3), "cp": (0, 2), "tp": (1, 2)})
    parallel = data_parallel(device_mesh=mesh)
    assert (parallel.rank, parallel.size, parallel.length_multiple) == (5, 6, 8)
    assert data_parallel(SimpleNamespace(strategy=SimpleNamespace(_device_mesh=mesh))) == parallel
    assert data_parallel(device_mesh=Mesh({"data_parallel": (1, 2), "tensor_parallel": (0, 1)})).length_multiple == 1


def test_a_mesh_dimension_of_unknown_meaning_is_refused():
    with pytest.raises(UserError, match="dimension 'model'"):
        data_parallel(device_mesh=Mesh({"dp": (0, 2), "model": (0, 2)}))
