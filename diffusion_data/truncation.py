"""A media file (seekable, binary) -> does it end before its own structure says it should?

Decoders report damage in many words and some not at all. This looks at the file itself, so that a file cut
short in transfer is told from one that is broken. Unknown formats and formats without an end mark give False.
"""

from __future__ import annotations

import os
from typing import BinaryIO

_TAIL_BYTES = 4096  # an end mark may be followed by some padding
_BOXES_THAT_MATTER = (b"ftyp", b"moov", b"mdat", b"moof", b"meta", b"jp2c")


def is_cut_short(file: BinaryIO) -> bool:
    """True if bytes are missing at the end of a JPEG, PNG, GIF, BMP, QOI, RIFF, ISO media, MPEG-TS or Matroska file."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL_BYTES))
    tail = file.read()
    file.seek(0)
    head = file.read(256)
    if head.startswith((b"\xff\xd8", b"\xff\x4f\xff\x51")):
        return b"\xff\xd9" not in tail
    if head.startswith(b"\x89PNG"):
        return b"IEND" not in tail
    if head.startswith(b"GIF8"):
        return b";" not in tail[-16:]
    if head.startswith(b"qoif"):
        return not tail.endswith(b"\0\0\0\0\0\0\0\1")
    if head.startswith(b"BM"):
        return int.from_bytes(head[2:6], "little") > size
    if head.startswith(b"RIFF"):
        return int.from_bytes(head[4:8], "little") + 8 > size
    if head[:1] == head[188:189] == b"\x47":  # MPEG transport stream: packets of 188 bytes
        return size % 188 != 0
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return _matroska_end(head) > size
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"jP  "):
        return _iso_media_is_cut(file, size)
    return False


def _iso_media_is_cut(file: BinaryIO, size: int) -> bool:
    """Walks the top-level boxes: a box that matters passes the end, or a film has lost its index."""
    seen: set[bytes] = set()
    position = 0
    while position + 8 <= size:
        file.seek(position)
        header = file.read(16)
        length, kind = int.from_bytes(header[:4], "big"), header[4:8]
        seen.add(kind)
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if length == 0:  # to the end of the file
            break
        if position + length > size:
            return kind in _BOXES_THAT_MATTER
        if length < 8:  # no box at all: broken, not cut
            return False
        position += length
    return not seen & {b"moov", b"moof", b"meta", b"jp2c"}


def _matroska_end(head: bytes) -> int:
    """Where the segment says it ends; 0 if it does not say."""
    header_length, position = _ebml_size(head, 4)
    segment = (header_length or 0) + position
    if segment >= len(head):
        return segment + 4
    if head[segment : segment + 4] != b"\x18\x53\x80\x67":
        return 0
    length, position = _ebml_size(head, segment + 4)
    return 0 if length is None else position + length


def _ebml_size(data: bytes, position: int) -> tuple[int | None, int]:
    """A variable-length size and the position after it; None for 'unknown'."""
    if position >= len(data) or data[position] == 0:
        return None, position
    width = 9 - data[position].bit_length()
    value = int.from_bytes(data[position : position + width], "big") & ((1 << (7 * width)) - 1)
    return (None if value == (1 << (7 * width)) - 1 else value), position + width
