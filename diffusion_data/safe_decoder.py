"""Parts of a sample (bytes) -> tensor, array or dict, without running code that a dataset brings along.

    .pth .pt        torch.load(weights_only=True), of one plain tensor
    .pickle .pkl    an unpickler that knows numpy arrays and torch tensors, and nothing else (`array_pickle`)
    .json           json

energon's own decoder runs whatever a pickle names; this one takes its place. Parts of a kind that was read before
are not unpickled again, see `part_layouts`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from megatron.energon import SampleDecoder

from diffusion_data.array_pickle import load_array_pickle, load_saved_tensor
from diffusion_data.part_layouts import PartLayouts


@dataclass(frozen=True)
class BadPart:
    """Stands where a part couldn't be decoded, so that whoever uses the sample can count it."""

    reason: str


_DECODERS: dict[str, Callable[[bytes], Any]] = {
    "pth": load_saved_tensor,
    "pt": load_saved_tensor,
    "pickle": load_array_pickle,
    "pkl": load_array_pickle,
    "json": json.loads,
}
# Each reader's own: what one of them accepts is nothing to another.
_LAYOUTS: dict[Callable[[bytes], Any], PartLayouts] = {
    load_saved_tensor: PartLayouts(),
    load_array_pickle: PartLayouts(),
}


def decode_part(name: str, raw: bytes | memoryview) -> Any:
    """The value of one part; bytes where the name's extension is none of ours.

    A tensor is the caller's own. An array is read-only: it may share the memory of `raw`.

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
    if isinstance(value, np.ndarray):
        value.setflags(write=False)
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
