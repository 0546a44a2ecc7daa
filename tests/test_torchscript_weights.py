"""Tensors come out of a TorchScript archive by name, and nothing in the archive runs."""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from diffusion_data.errors import UserError
from diffusion_data.torchscript_weights import read_torchscript_weights

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*")


class Branching(nn.Module):
    """Two convolutions, one of which a trace never sees called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Conv1d(2, 3, 1), nn.Conv1d(2, 3, 1)
        self.register_buffer("scale", torch.tensor([0.5, 2.0]), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x) * self.scale[0]


def save_traced(module: nn.Module, path: Path) -> None:
    dtype = next(module.parameters()).dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(module, torch.ones(1, 2, 4, dtype=dtype)).save(str(path))


def archive_with_pickle(path: Path, payload: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("encoder/data.pkl", payload)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_comes_out_as_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    module = nn.Sequential(Branching()).to(dtype)
    save_traced(module, tmp_path / "encoder.jit")
    tensors = read_torchscript_weights(tmp_path / "encoder.jit").tensors
    expected = {**module.state_dict(), "0.scale": module[0].scale}
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == dtype
        assert torch.equal(tensors[name], tensor), name


def test_tells_which_modules_the_program_calls(tmp_path: Path) -> None:
    save_traced(nn.Sequential(Branching()), tmp_path / "encoder.jit")
    assert read_torchscript_weights(tmp_path / "encoder.jit").called_modules == {"", "0", "0.used"}


def test_views_and_shared_storages_keep_their_values(tmp_path: Path) -> None:
    module = nn.Conv1d(2, 3, 1)
    base = torch.arange(12.0)
    module.weight = nn.Parameter(base[:6].view(2, 3).T[:, :, None])  # transposed, and
    module.bias = nn.Parameter(base[9:])  # not at the start of its storage
    save_traced(module, tmp_path / "encoder.jit")
    tensors = read_torchscript_weights(tmp_path / "encoder.jit").tensors
    assert tensors["weight"][:, :, 0].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert tensors["bias"].tolist() == [9, 10, 11]


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def test_refuses_an_archive_that_asks_to_run_code(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = archive_with_pickle(tmp_path / "encoder.jit", pickle.dumps(Hostile(marker)))
    with pytest.raises(UserError, match=r"encoder\.jit .*asks for (posix|nt)\.system.*refused"):
        read_torchscript_weights(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name", ["builtins eval", "torch load", "torch.jit._pickle build", "torch._utils _rebuild_tensor", "os system"]
)
def test_refuses_every_name_that_weights_do_not_need(tmp_path: Path, name: str) -> None:
    payload = b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n."
    with pytest.raises(UserError, match="refused"):
        read_torchscript_weights(archive_with_pickle(tmp_path / "encoder.jit", payload))


def test_refuses_a_tensor_that_reaches_beyond_its_bytes(tmp_path: Path) -> None:
    save_traced(nn.Conv1d(2, 3, 1), tmp_path / "good.jit")
    with zipfile.ZipFile(tmp_path / "good.jit") as good, zipfile.ZipFile(tmp_path / "bad.jit", "w") as bad:
        for name in good.namelist():
            bad.writestr(name, good.read(name)[:4] if name.endswith("/data/0") else good.read(name))
    with pytest.raises(UserError, match=r"bad\.jit .*tensor 0 has 4 bytes"):
        read_torchscript_weights(tmp_path / "bad.jit")


def test_refuses_a_module_within_itself(tmp_path: Path) -> None:
    payload = b"\x80\x02c__torch__\nM\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb."
    with pytest.raises(UserError, match="module a appears twice"):
        read_torchscript_weights(archive_with_pickle(tmp_path / "encoder.jit", payload))


def test_a_damaged_or_other_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "encoder.jit"
    with pytest.raises(UserError, match=f"no such file: {path}"):
        read_torchscript_weights(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"encoder\.jit can't be read as a TorchScript archive: .*zip"):
        read_torchscript_weights(path)
    save_traced(nn.Conv1d(2, 3, 1), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"encoder\.jit can't be read"):
        read_torchscript_weights(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "x")
    with pytest.raises(UserError, match=r"it has no data\.pkl"):
        read_torchscript_weights(path)
