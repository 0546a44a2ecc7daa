"""Parts of a sample (bytes) -> tensor, array or dict, without running code that a dataset brings along.

    .pth .pt        torch.load(weights_only=True)
    .pickle .pkl    an unpickler that knows numpy arrays and torch tensors, and nothing else
    .json           json

energon's own decoder runs whatever a pickle names; this one takes its place. Parts of a kind that was read before
are not unpickled again, see `part_layouts`.
"""

from __future__ import annotations

import codecs
import io
import json
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from megatron.energon import SampleDecoder

from diffusion_data.part_layouts import PartLayouts


@dataclass(frozen=True)
class BadPart:
    """Stands where a part couldn't be decoded, so that whoever uses the sample can count it."""

    reason: str


def _load_tensor(raw: bytes) -> Any:
    return torch.load(io.BytesIO(raw), weights_only=True, map_location="cpu")


def _encode_latin1(text: str, encoding: str) -> bytes:
    """What old pickles use to carry bytes; other codecs would be a way to code."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the codec {encoding!r} is not allowed")
    return codecs.encode(text, "latin1")


def _from_numpy(module: str, name: str) -> Any:
    """A function that numpy's pickles name; numpy 2 moved them."""
    package = "numpy._core" if hasattr(np, "_core") else "numpy.core"
    return getattr(import_module(f"{package}.{module}"), name)


_reconstruct = _from_numpy("multiarray", "_reconstruct")
_frombuffer = _from_numpy("numeric", "_frombuffer")
_NUMPY_MODULES = ("numpy.core", "numpy._core")
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{(f"{module}.multiarray", "_reconstruct"): _reconstruct for module in _NUMPY_MODULES},
    **{(f"{module}.numeric", "_frombuffer"): _frombuffer for module in _NUMPY_MODULES},
    ("_codecs", "encode"): _encode_latin1,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    # The original calls torch.load(weights_only=False).
    ("torch.storage", "_load_from_bytes"): _load_tensor,
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is neither an array nor a tensor")
        return _ALLOWED[(module, name)]


def _unpickle_array(raw: bytes) -> Any:
    return _ArrayUnpickler(io.BytesIO(raw)).load()


_DECODERS: dict[str, Callable[[bytes], Any]] = {
    "pth": _load_tensor,
    "pt": _load_tensor,
    "pickle": _unpickle_array,
    "pkl": _unpickle_array,
    "json": json.loads,
}
# Each reader's own: what one of them accepts is nothing to another.
_LAYOUTS: dict[Callable[[bytes], Any], PartLayouts] = {_load_tensor: PartLayouts(), _unpickle_array: PartLayouts()}


def decode_part(name: str, raw: bytes | memoryview) -> Any:
    """The value of one part; bytes where the name's extension is none of ours.

    Tensors and arrays can be written to. They share the memory of `raw` if that can be written to.

    Raises:
        ValueError: the part is broken, or holds more than arrays, tensors or json.
    """
    decoder = _DECODERS.get(name.rsplit(".", 1)[-1])
    if decoder is None:
        return bytes(raw)
    layouts = _LAYOUTS.get(decoder)
    if layouts is not None:
        value = layouts.read(memoryview(raw))
        if value is not None:
            return value
    content = bytes(raw)
    try:
        value = decoder(content)
    # A hostile or truncated part can end in any exception of the parsers, and none may stop the run.
    except Exception as error:
        first_line = str(error).strip().split("\n")[0][:200]
        raise ValueError(f"part {name!r} is refused: {type(error).__name__}: {first_line}") from error
    if layouts is not None:
        layouts.learn(content, value)
    return value


class SafeDecoder(SampleDecoder):
    """Takes the place of energon's decoder, as the attribute `decoder` of a task encoder."""

    def __init__(self) -> None:
        """The parent would set up image and video decoders, which no part of ours needs."""

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Decode the parts of a sample; what can't be decoded becomes a `BadPart`."""
        return {
            name: value if name.startswith("__") or not isinstance(value, bytes | memoryview) else _or_bad(name, value)
            for name, value in sample.items()
        }

    def decode(self, fname: str, raw: bytes) -> Any:
        return decode_part(fname, raw)

    def config(self) -> dict[str, Any]:
        return {"decoder": type(self).__qualname__}


def _or_bad(name: str, raw: bytes | memoryview) -> Any:
    try:
        return decode_part(name, raw)
    except ValueError as error:
        return BadPart(str(error))
