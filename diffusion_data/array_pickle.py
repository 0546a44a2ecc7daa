"""Pickled arrays and tensors (bytes) -> numpy arrays and torch tensors, and nothing that the pickle could play with.

To allow the names that such a pickle needs is not enough: numpy.ndarray, called with a dtype of objects, takes the
pickle's bytes for addresses; a function can be given other defaults, for everybody; a tensor may claim sizes that no
bytes stand for. So each name gets a builder of ours, which checks what it is given, and what comes out is never larger
than the bytes it came from.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

_MOST_OPCODES = 10_000  # an array takes about 30
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")  # the unpickler's table of values is as long as the largest number
_PLAIN_DTYPE = re.compile(r"[<>=|]?[biuf][0-9]{1,2}")


def load_saved_tensor(raw: bytes) -> torch.Tensor:
    """The tensor that torch.save wrote.

    Raises:
        pickle.UnpicklingError: it is something else, or larger than `raw`; other exceptions of torch's, if damaged.
    """
    return _bounded(_torch_load(raw), len(raw))


def load_array_pickle(raw: bytes) -> np.ndarray | torch.Tensor | list[Any] | tuple[Any, ...]:
    """The array or tensor that pickle wrote, or a list or tuple of them.

    Raises:
        pickle.UnpicklingError: it is something else, or larger than `raw`; other exceptions of pickle's, if damaged.
    """
    _check_opcodes(raw)
    value = _ArrayUnpickler(io.BytesIO(raw)).load()
    if not isinstance(value, (list, tuple)):
        return _bounded(value, len(raw))
    checked = [_bounded(each, len(raw)) for each in value]
    if sum(each.nbytes for each in checked) > len(raw):  # one may stand there many times
        raise pickle.UnpicklingError("it holds more values than bytes")
    return type(value)(checked)


def _check_opcodes(raw: bytes) -> None:
    """Refuse what would make the unpickler itself reserve memory, or work, out of proportion."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(raw)):
        if count > _MOST_OPCODES or (opcode.name in _PUTS and (argument or 0) > len(raw)):
            raise pickle.UnpicklingError("no array is pickled like this")


def _bounded(value: Any, num_bytes: int) -> Any:
    """A plain array or tensor of at most num_bytes."""
    if isinstance(value, np.ndarray):
        value = value.view(np.ndarray)
        size = value.nbytes
    elif isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu":
        value = value.detach()
        size = max(value.nbytes, value.untyped_storage().nbytes())  # a stride of 0 claims what is not there
    else:
        raise pickle.UnpicklingError(f"{type(value).__name__} is neither an array nor a plain tensor")
    if size > num_bytes:
        raise pickle.UnpicklingError(f"its {size} bytes of values can't come from {num_bytes} bytes")
    return value


def _torch_load(raw: bytes) -> Any:
    if zipfile.is_zipfile(io.BytesIO(raw)):
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise pickle.UnpicklingError("it is compressed, which torch.save never does")
        if sum(member.file_size for member in members) > len(raw):  # members may overlap
            raise pickle.UnpicklingError("its members are larger than the whole")
    return torch.load(io.BytesIO(raw), weights_only=True, map_location="cpu")


class _Builder:
    """What a pickle gets for a name: it can be called, and nothing in it can be changed."""

    def __init__(self, build: Callable[..., Any]) -> None:
        self._build = build

    def __call__(self, *arguments: Any) -> Any:
        return self._build(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a function is not to be changed")


class _DType:
    """A dtype of plain numbers, as numpy pickles it: its code, then its byte order."""

    def __init__(self, code: object, *_: object) -> None:
        if not isinstance(code, str) or not _PLAIN_DTYPE.fullmatch(code):
            raise pickle.UnpicklingError(f"the dtype {code!r:.50} is not one of plain numbers")
        self.numpy = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        _, order, subarray, names, fields, *_ = state
        if order not in ("<", ">", "=", "|") or not subarray is names is fields is None:
            raise pickle.UnpicklingError("the dtype is not one of plain numbers")
        self.numpy = self.numpy.newbyteorder(order)


class _Array(np.ndarray):
    """An array that is filled by a state that was checked."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, raw = state
        dtype = _numpy_dtype(dtype)
        if not isinstance(raw, bytes) or len(raw) != math.prod(shape) * dtype.itemsize:
            raise pickle.UnpicklingError(f"{type(raw).__name__} can't fill an array {shape!r:.50} of {dtype}")
        checked: Any = (1, shape, dtype, bool(is_fortran), raw)
        super().__setstate__(checked)


class _Storage:
    """The numbers of a tensor, flat; a tensor refers to it."""

    def __init__(self, raw: bytes) -> None:
        loaded = _torch_load(raw)
        if not isinstance(loaded, torch.TypedStorage):
            raise pickle.UnpicklingError(f"{type(loaded).__name__} is no storage of a tensor")
        self.values = torch.empty(0, dtype=loaded.dtype).set_(loaded._untyped_storage)  # untyped() warns

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a storage is not to be changed")


def _rebuild_tensor(storage: Any, offset: int, size: Any, stride: Any, *_: object) -> torch.Tensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError(f"{type(storage).__name__} is no storage of a tensor")
    return torch.as_strided(storage.values, size, stride, offset)  # refuses to leave the storage


def _numpy_dtype(dtype: Any) -> np.dtype:
    if not isinstance(dtype, _DType):
        raise pickle.UnpicklingError(f"{type(dtype).__name__} is no dtype")
    return dtype.numpy


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(raw, (bytes, bytearray)):
        raise pickle.UnpicklingError(f"{type(raw).__name__} holds no array")
    return np.frombuffer(raw, _numpy_dtype(dtype)).reshape(shape, order=order)


def _encode_latin1(text: str, encoding: str) -> bytes:
    """What old pickles use to carry bytes; other codecs would be a way to code."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the codec {encoding!r:.50} is not allowed")
    return text.encode("latin1")


def _no_ndarray(*_: object) -> None:
    raise pickle.UnpicklingError("numpy.ndarray is not to be called")


_NDARRAY = _Builder(_no_ndarray)  # only named: as what _reconstruct makes


def _reconstruct(kind: object, *_: object) -> _Array:
    if kind is not _NDARRAY:
        raise pickle.UnpicklingError("only a numpy.ndarray is made")
    return _Array(0)


_NUMPY_MODULES = ("numpy.core", "numpy._core")  # numpy 2 moved them
_BUILDERS = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Builder(_DType),
    **{(f"{module}.multiarray", "_reconstruct"): _Builder(_reconstruct) for module in _NUMPY_MODULES},
    **{(f"{module}.numeric", "_frombuffer"): _Builder(_from_buffer) for module in _NUMPY_MODULES},
    ("_codecs", "encode"): _Builder(_encode_latin1),
    ("collections", "OrderedDict"): _Builder(lambda: {}),  # a tensor's hooks, which are dropped
    ("torch._utils", "_rebuild_tensor_v2"): _Builder(_rebuild_tensor),
    ("torch.storage", "_load_from_bytes"): _Builder(_Storage),
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _BUILDERS:
            raise pickle.UnpicklingError(f"{module}.{name} is neither an array nor a tensor")
        return _BUILDERS[(module, name)]
