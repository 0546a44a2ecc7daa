"""Bytes of a stored tensor or array -> the same tensor or array, in place, where a part like it was read before.

A part written by `torch.save` or pickle is a frame around the values: same dtype and shape, same frame. Unpickling
it costs more than everything else that is done with a sample. So the first part of a kind goes through the safe and
slow reader, and its frame is remembered; a part whose frame is equal byte for byte holds its values in the same
place. Everything else, from another writer's part to a hostile one, has another frame and is left to the
slow reader. No pickle is interpreted here.
"""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_MOST_PER_SIZE = 8  # frames of one length, and
_LARGEST_FRAME = 1 << 16  # bytes; a writer's is below 2,000, and frames are kept
_MOST_TRIED = 4096  # parts looked at: a dataset of too many kinds is read slowly, not without bounds
_BYTES_OPCODES = {"BYTEARRAY8": 9, "BINBYTES8": 9, "BINBYTES": 5, "SHORT_BINBYTES": 2}  # with their length field
_CENTRAL_HEADER = struct.Struct("<4s12xI8xHHH12x")  # signature, crc, lengths of name, extra field and comment
_DESCRIPTOR = b"PK\x07\x08"  # stands after the bytes of each member, then comes their crc


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where the values stand, and what has to stand around them: (offset, bytes), ..."""

    start: int
    stop: int
    dtype: Any
    shape: tuple[int, ...]
    frame: tuple[tuple[int, bytes], ...]

    def fits(self, raw: memoryview) -> bool:
        for offset, expected in self.frame:  # noqa: SIM110 - all() takes twice as long
            if raw[offset : offset + len(expected)] != expected:
                return False
        return True

    def read(self, raw: memoryview) -> Any:
        """The values: a tensor of its own, since tensors can't tell that they mustn't be changed; an array in place."""
        values = raw[self.start : self.stop]
        if isinstance(self.dtype, torch.dtype):
            return torch.frombuffer(bytearray(values), dtype=self.dtype).view(self.shape)
        array = np.frombuffer(values, dtype=self.dtype).reshape(self.shape)
        array.setflags(write=False)
        return array


class PartLayouts:
    """The frames seen so far, by the length of the part."""

    def __init__(self) -> None:
        self._known: dict[int, list[_Layout]] = {}
        self._tried = 0

    def read(self, raw: memoryview) -> Any:
        """The tensor or array of a part of a known kind, else None."""
        for layout in self._known.get(len(raw), ()):
            if layout.fits(raw):
                return layout.read(raw)
        return None

    def learn(self, raw: bytes, value: Any) -> None:
        """Remember the frame of `raw`, which the slow reader found to be `value`; most kinds of part have none."""
        known = self._known.setdefault(len(raw), [])
        if self._tried >= _MOST_TRIED or len(known) >= _MOST_PER_SIZE:
            return
        self._tried += 1
        layout = None
        if type(value) is torch.Tensor:
            layout = _layout_of_saved_tensor(raw, value)
        elif type(value) is np.ndarray:
            layout = _layout_of_pickled_array(raw, value)
        if layout is not None:
            known.append(layout)


def _layout_of_pickled_array(raw: bytes, array: np.ndarray) -> _Layout | None:
    """The values are the only bytes of that length that the pickle holds."""
    if not (array.flags.c_contiguous and array.dtype.isnative and array.dtype.kind in "iuf"):
        return None
    starts = [
        position + _BYTES_OPCODES[opcode.name]
        for opcode, argument, position in pickletools.genops(raw)
        if opcode.name in _BYTES_OPCODES and len(argument or b"") == array.nbytes and position is not None
    ]
    if len(starts) != 1:
        return None
    return _layout(raw, starts[0], array.dtype, array.shape, array.tobytes(), varying=[])


def _layout_of_saved_tensor(raw: bytes, tensor: torch.Tensor) -> _Layout | None:
    """The values are the member `data/0` of a zip archive without compression.

    What else differs between two tensors of one kind is a number that identifies the archive, and checksums.
    """
    if (
        not tensor.is_contiguous()
        or tensor.storage_offset()
        or tensor.requires_grad
        or not zipfile.is_zipfile(io.BytesIO(raw))
    ):
        return None
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        members, central = archive.infolist(), archive.start_dir
    start, varying = None, []
    for member in members:
        signature, _, name, extra, comment = _CENTRAL_HEADER.unpack_from(raw, central)
        if signature != b"PK\x01\x02" or member.compress_type != zipfile.ZIP_STORED:
            return None
        name_and_extra = struct.unpack_from("<HH", raw, member.header_offset + 26)
        first = member.header_offset + 30 + sum(name_and_extra)
        last = first + member.file_size
        is_values = member.filename.endswith("/data/0")
        if is_values or member.filename.endswith("/.data/serialization_id"):
            if raw[last : last + 4] != _DESCRIPTOR:
                return None
            varying += [(last + 4, last + 8), (central + 16, central + 20)]
            if is_values:
                start = first
            else:
                varying.append((first, last))
        central += _CENTRAL_HEADER.size + name + extra + comment
    if start is None:
        return None
    values = tensor.view(-1).view(torch.uint8).numpy().tobytes()
    return _layout(raw, start, tensor.dtype, tuple(tensor.shape), values, varying)


def _layout(
    raw: bytes, start: int, dtype: Any, shape: tuple[int, ...], values: bytes, varying: list[tuple[int, int]]
) -> _Layout | None:
    """None unless the values are found at `start`; the frame is all else but the ranges `varying`."""
    stop = start + len(values)
    if not values or raw[start:stop] != values or len(raw) - len(values) > _LARGEST_FRAME:
        return None
    frame, begin = [], 0
    for first, last in sorted([*varying, (start, stop), (len(raw), len(raw))]):
        if first < begin:
            return None
        if first > begin:
            frame.append((begin, raw[begin:first]))
        begin = last
    return _Layout(start=start, stop=stop, dtype=dtype, shape=shape, frame=tuple(frame))
