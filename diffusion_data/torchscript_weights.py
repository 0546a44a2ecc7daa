"""A TorchScript archive (encoder.jit, decoder.jit) -> its tensors by name, without torch.jit and without running code.

The archive is a zip: `<root>/data.pkl` is the module tree, `<root>/data/<key>` the bytes of its tensors and
`<root>/code/` the traced program. Three reasons not to call torch.jit.load: a program traced in bfloat16 on a GPU
can't run on a CPU, torch.jit is being retired, and unpickling through an allow-list runs nothing from the file.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion_data.errors import UserError

_STORAGE_DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
}


@dataclass(frozen=True, kw_only=True)
class TorchScriptWeights:
    """Everything in the archive that loading a network needs."""

    tensors: dict[str, torch.Tensor]
    """Parameters and buffers by dotted name, on the CPU, in the file's dtypes."""
    called_modules: frozenset[str]
    """Dotted names of the modules that the traced program calls. A trace keeps the weights of modules that were
    never called; only this set tells them from the ones that matter."""


def read_torchscript_weights(path: Path) -> TorchScriptWeights:
    """Read `path`; a UserError names the file if it is damaged, no TorchScript archive, or asks to run code."""
    try:
        with zipfile.ZipFile(path) as archive:
            root = _root_folder(archive)
            with archive.open(f"{root}/data.pkl") as pickled:
                tree = _ModuleUnpickler(pickled, archive, root).load()
            return _walk(tree, _classes_with_forward(archive, root))
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}") from error
    except (
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        EOFError,
        KeyError,  # a member that the zip lacks
        NotImplementedError,  # a compression that zipfile lacks
        RuntimeError,  # a tensor that reaches beyond its bytes, an encrypted zip
        TypeError,  # a pickle that calls an allowed function wrongly
        ValueError,
        AttributeError,
        IndexError,
    ) as error:
        raise UserError(f"{path} can't be read as a TorchScript archive: {error}") from error


def _root_folder(archive: zipfile.ZipFile) -> str:
    names = [name for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(names) != 1:
        raise ValueError("it has no data.pkl" if not names else f"it has {len(names)} data.pkl")
    return names[0].split("/")[0]


def _classes_with_forward(archive: zipfile.ZipFile, root: str) -> frozenset[str]:
    """Qualified names of the classes in the archive's program that have a forward; the text is read, not run."""
    found = set()
    for info in archive.infolist():
        if info.filename.startswith(f"{root}/code/") and info.filename.endswith(".py"):
            module = info.filename[len(f"{root}/code/") : -len(".py")].replace("/", ".")
            text = archive.read(info).decode()
            for body in re.split(r"^class ", text, flags=re.MULTILINE)[1:]:
                if re.search(r"^  def forward\(", body, flags=re.MULTILINE):
                    found.add(f"{module}.{body[: body.index('(')]}")
    return frozenset(found)


class _Module:
    """Stands for any module of the archive: unpickling fills its __dict__ with parameters and submodules."""

    qualified_name: str


class _ModuleUnpickler(pickle.Unpickler):
    """Builds the module tree out of `_Module`, plain containers and tensors; refuses every other name."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(file)
        self._archive = archive
        self._root = root
        self._storages: dict[str, torch.Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return type(name, (_Module,), {"qualified_name": f"{module}.{name}"})
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list
        if module == "torch.jit._pickle" and name == "restore_type_tag":
            return _without_type_tag
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no weights need; refused")

    def persistent_load(self, pid: Any) -> torch.Tensor:
        _, dtype, key, _, num_elements = pid
        if key not in self._storages:
            self._storages[key] = self._read_storage(str(key), dtype, num_elements)
        return self._storages[key]

    def _read_storage(self, key: str, dtype: torch.dtype, num_elements: int) -> torch.Tensor:
        info = self._archive.getinfo(f"{self._root}/data/{key}")
        if info.compress_type != zipfile.ZIP_STORED:  # torch never compresses, a zip bomb does
            raise ValueError(f"tensor {key} is compressed")
        if info.file_size != num_elements * dtype.itemsize:
            raise ValueError(f"tensor {key} has {info.file_size} bytes, not {num_elements} of {dtype}")
        if num_elements == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(bytearray(self._archive.read(info)), dtype=dtype)


def _rebuild_tensor(storage: torch.Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> torch.Tensor:
    return storage.as_strided(size, stride, offset)


def _without_type_tag(value: Any, _: Any) -> Any:
    return value


def _walk(tree: Any, classes_with_forward: frozenset[str]) -> TorchScriptWeights:
    if not isinstance(tree, _Module):
        raise ValueError("its data.pkl holds no module")
    tensors: dict[str, torch.Tensor] = {}
    called = set()
    seen: set[int] = set()
    pending: list[tuple[str, _Module]] = [("", tree)]
    while pending:
        name, module = pending.pop()
        if id(module) in seen:  # a module within itself would never end
            raise ValueError(f"module {name} appears twice")
        seen.add(id(module))
        if type(module).qualified_name in classes_with_forward:
            called.add(name)
        for attribute, value in vars(module).items():
            child = f"{name}.{attribute}" if name else attribute
            if isinstance(value, torch.Tensor):
                tensors[child] = value
            elif isinstance(value, _Module):
                pending.append((child, value))
    return TorchScriptWeights(tensors=dict(sorted(tensors.items())), called_modules=frozenset(called))
