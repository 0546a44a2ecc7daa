"""An image file (seekable, binary) -> uint8 (H, W, 3) sRGB-like pixels, upright, alpha over white.

Only formats that Pillow decodes itself are tried: nothing here starts another program. Of an animated GIF,
PNG or WebP the first frame is taken: in a dataset those are pictures far more often than clips. ICC
profiles are not applied: pixels are taken as stored, as training pipelines do.
"""

from __future__ import annotations

import struct
import warnings
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, features

from diffusion_data.errors import Reason, RowRejected
from diffusion_data.truncation import is_cut_short

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusion_data.media import MediaConfig
    from diffusion_data.resize import ResizePlan

_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "QOI", "ICO"]
if "avif" in features.modules and features.check("avif"):
    _FORMATS.append("AVIF")

# First bytes of the formats above: damaged beyond recognition by Pillow, it is still a picture.
_SIGNATURES = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"II*\0",
    b"MM\0*",
    b"\0\0\0\x0cjP  ",
    b"\xff\x4f\xff\x51",
    b"qoif",
    b"\0\0\1\0",
)

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow's parsers are known to raise on damaged files.
_DAMAGE = (OSError, RuntimeError, SyntaxError, ValueError, TypeError, EOFError, LookupError, struct.error)


def open_image(file: BinaryIO, config: MediaConfig) -> Image.Image | None:
    """Reads the header only. None if the content is no picture."""
    file.seek(0)
    head = file.read(16)
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata; max_pixels is checked below
            image = Image.open(file, formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise RowRejected(Reason.too_large, str(error)) from error
    except Image.UnidentifiedImageError as error:
        if _is_picture(head):
            raise _damaged(file, error) from error
        return None
    except _DAMAGE as error:
        raise _damaged(file, error) from error
    if image.width * image.height > config.max_pixels:
        raise RowRejected(
            Reason.too_large,
            f"{image.width} x {image.height} pixels, more than media.max_pixels={config.max_pixels}",
        )
    return image


def decode_image(
    image: Image.Image, file: BinaryIO, plan_for: Callable[[int, int], ResizePlan], jpeg_draft: bool
) -> tuple[np.ndarray, int, int]:
    """An opened image -> uint8 (1, h, w, 3) as plan_for(height, width) wants it; upright source height, width.

    jpeg_draft: shrink a JPEG by powers of two while it is decoded, to no less than twice what the resize asks
    for: several times faster on photos, and within 2 of 255 after the resize.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source_size = None
            if jpeg_draft and image.format in ("JPEG", "MPO"):
                source_size = _draft(image, plan_for)
            image.load()
            upright = _upright(to_rgb(image), _orientation(image))
    except Image.DecompressionBombError as error:
        raise RowRejected(Reason.too_large, str(error)) from error
    except _DAMAGE as error:
        raise _damaged(file, error) from error
    height, width = source_size or (upright.height, upright.width)
    return plan_for(height, width).apply(np.array(upright)[None]), height, width


def _draft(image: Image.Image, plan_for: Callable[[int, int], ResizePlan]) -> tuple[int, int]:
    """Tells the JPEG decoder how small it may go; returns the picture's full upright (height, width)."""
    lies_on_its_side = _orientation(image) >= 5
    height, width = (image.width, image.height) if lies_on_its_side else (image.height, image.width)
    plan = plan_for(height, width)
    at_least = (2 * plan.cover_width, 2 * plan.cover_height)
    image.draft("RGB", at_least[::-1] if lies_on_its_side else at_least)
    return height, width


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB: 16-bit, 32-bit and float grey to 8 bits, transparency over white."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_grey_to_uint8(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def _grey_to_uint8(grey: np.ndarray) -> np.ndarray:
    """White is 65535 for whole numbers; 1, 255 or 65535 for floats, whichever holds the brightest pixel.

    Grey values outside all of these have no known white: they are stretched from the darkest to the brightest.
    """
    values = np.nan_to_num(grey.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    whites = (1.0, 255.0, 65535.0) if grey.dtype.kind == "f" else (65535.0,)
    fitting = [white for white in whites if low >= 0 and high <= white]
    if fitting:
        low, high = 0.0, fitting[0]
    return ((values - low) * (255.0 / max(high - low, 1e-12)) + 0.5).clip(0, 255).astype(np.uint8)


def _is_picture(head: bytes) -> bool:
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return "AVIF" in _FORMATS
    return head.startswith(_SIGNATURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8. Pillow turns TIFF itself while loading and then says 1."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except (*_DAMAGE, AttributeError):
        return 1  # unreadable EXIF: viewers show such a picture as it is stored
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _damaged(file: BinaryIO, error: Exception) -> RowRejected:
    reason = Reason.truncated if "truncated" in str(error) or is_cut_short(file) else Reason.decode_error
    # Pillow's own words would name an object by its address here, which no two runs share.
    said = "no readable header" if isinstance(error, Image.UnidentifiedImageError) else error
    return RowRejected(reason, f"the picture can't be decoded: {said}")
