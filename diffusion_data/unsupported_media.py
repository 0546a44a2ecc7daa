"""The first bytes of a file -> is it of a known format that nothing here reads?"""

from __future__ import annotations

from diffusion_data.errors import Reason, RowRejected

# Formats that are media but that nothing here reads: better named than called "not media".
_UNSUPPORTED = (
    (0, b"%!PS", "PostScript"), (0, b"\xc5\xd0\xd3\xc6", "PostScript"), (0, b"%PDF", "PDF"), (0, b"8BPS", "Photoshop"),
    (0, b"\xff\x0a", "JPEG XL"), (4, b"JXL ", "JPEG XL"), (4, b"ftypheic", "HEIC"), (4, b"ftypheix", "HEIC"),
    (4, b"ftyphevc", "HEIC"), (4, b"ftypmif1", "HEIF"), (4, b"ftypmsf1", "HEIF"), (4, b"ftypavif", "AVIF"),
    (4, b"ftypavis", "AVIF"), (0, b"v/1\x01", "OpenEXR"), (0, b"#?RADIANCE", "Radiance HDR"), (0, b"DDS ", "DDS"),
    (0, b"#EXTM3U", "playlist"), (0, b"ffconcat", "playlist"), (0, b"<svg", "SVG"),
)  # fmt: skip


def refuse_unsupported(head: bytes) -> None:
    """Raises RowRejected, naming the format."""
    for offset, mark, name in _UNSUPPORTED:
        if head[offset : offset + len(mark)] == mark or (name == "SVG" and _looks_like_svg(head)):
            raise RowRejected(Reason.unsupported_format, f"{name} is not supported")


def _looks_like_svg(head: bytes) -> bool:
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"<svg", b"<?xml")) and b"<svg" in head
