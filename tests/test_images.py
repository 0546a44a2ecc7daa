"""Every kind of picture becomes the RGB pixels a viewer shows; damage is told apart."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from diffusion_data.errors import Reason, RowRejected
from diffusion_data.images import decode_image, open_image
from diffusion_data.media import MediaConfig
from diffusion_data.resize import ResizePlan, plan_resize, resampler
from tests.media_files import encoded, gradient

RGB = gradient()
PICTURE = Image.fromarray(RGB)
LUMA = np.asarray(PICTURE.convert("L"))


def as_it_is(height: int, width: int) -> ResizePlan:
    return ResizePlan(cover_height=height, cover_width=width, height=height, width=width)


def decode(data: bytes, config: MediaConfig | None = None) -> np.ndarray:
    file = io.BytesIO(data)
    image = open_image(file, config or MediaConfig())
    assert image is not None
    pixels, height, width = decode_image(image, file, as_it_is, jpeg_draft=False)
    assert pixels.shape == (1, height, width, 3)
    assert pixels.dtype == np.uint8
    return pixels[0]


def reason(data: bytes, config: MediaConfig | None = None) -> Reason:
    with pytest.raises(RowRejected) as rejected:
        decode(data, config)
    return rejected.value.reason


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=-1)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "QOI"])
def test_lossless_rgb_is_exact(format: str) -> None:
    np.testing.assert_array_equal(decode(encoded(PICTURE, format)), RGB)


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "GIF", "JPEG2000", "AVIF"])
def test_lossy_rgb_is_close(format: str) -> None:
    options = {"quality": 90} if format in ("JPEG", "WEBP", "AVIF") else {}
    difference = np.abs(decode(encoded(PICTURE, format, **options)).astype(int) - RGB)
    assert difference.mean() < (14 if format == "GIF" else 3)  # a GIF has 256 colours


def test_grey_one_bit_and_palette() -> None:
    np.testing.assert_array_equal(decode(encoded(PICTURE.convert("L"), "PNG")), grey(LUMA))
    one_bit = PICTURE.convert("1")
    np.testing.assert_array_equal(decode(encoded(one_bit, "PNG")), grey(np.asarray(one_bit).astype(np.uint8) * 255))
    palette = PICTURE.convert("P", palette=Image.Palette.ADAPTIVE)
    np.testing.assert_array_equal(decode(encoded(palette, "PNG")), np.asarray(palette.convert("RGB")))


def test_transparency_is_laid_over_white() -> None:
    alpha = np.zeros((64, 96), np.uint8)
    alpha[:, 48:] = 255
    alpha[:, 0] = 128
    for source, opaque in ((PICTURE, RGB), (PICTURE.convert("L"), grey(LUMA))):
        image = source.copy()
        image.putalpha(Image.fromarray(alpha))  # RGBA, LA
        decoded = decode(encoded(image, "PNG"))
        np.testing.assert_array_equal(decoded[:, 48:], opaque[:, 48:])
        assert (decoded[:, 1:48] == 255).all()
        half = (opaque[:, 0].astype(int) * 128 + 255 * 127) / 255
        assert np.abs(decoded[:, 0] - half).max() <= 1


def test_transparent_colour_of_palette_and_rgb_is_white() -> None:
    indexes = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8).repeat(16, 0).repeat(16, 1), "P")
    indexes.putpalette([10, 20, 30, 40, 50, 60])
    decoded = decode(encoded(indexes, "PNG", transparency=0))
    assert decoded[0, 0].tolist() == [255, 255, 255]
    assert decoded[0, 16].tolist() == [40, 50, 60]
    flat = Image.new("RGB", (16, 16), (7, 8, 9))
    assert (decode(encoded(flat, "PNG", transparency=(7, 8, 9))) == 255).all()


def test_16_bit_and_float_grey_are_scaled_not_cut() -> None:
    wide = LUMA.astype(np.uint16) * 257
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(wide), "PNG")), grey(LUMA))
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(wide), "TIFF")), grey(LUMA))
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(wide.astype(np.int32)), "TIFF")), grey(LUMA))
    for white in (1.0, 255.0, 65535.0):
        image = Image.fromarray((LUMA / 255 * white).astype(np.float32))
        np.testing.assert_array_equal(decode(encoded(image, "TIFF")), grey(LUMA))


def test_values_without_a_known_white_are_stretched() -> None:
    image = Image.fromarray(np.array([[-2.0, 0.0], [2.0, np.nan]], np.float32).repeat(8, 0).repeat(8, 1))
    assert decode(encoded(image, "TIFF"))[::8, ::8, 0].tolist() == [[0, 128], [255, 128]]


def test_cmyk_and_adobe_inverted_cmyk_show_the_same_colours() -> None:
    cmyk = PICTURE.convert("CMYK")
    for format in ("JPEG", "TIFF"):  # Pillow writes CMYK JPEG inverted, with Adobe's marker
        options = {"quality": 95, "subsampling": 0} if format == "JPEG" else {}
        difference = np.abs(decode(encoded(cmyk, format, **options)).astype(int) - RGB)
        assert difference.mean() < 2


def test_cielab_is_converted() -> None:
    if not Image.core.__dict__.get("HAVE_LCMS2", True):
        pytest.skip("Pillow was built without LittleCMS")
    difference = np.abs(decode(encoded(PICTURE.convert("LAB"), "TIFF")).astype(int) - RGB)
    assert difference.mean() < 8  # of the saturated colours Lab in 8 bits keeps less


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(format: str, orientation: int) -> None:
    stored = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: np.rot90(RGB),
        7: np.rot90(RGB, 2).transpose(1, 0, 2),
        8: np.rot90(RGB, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if format == "JPEG" else {"lossless": True} if format == "WEBP" else {}
    decoded = decode(encoded(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif, **options))
    assert decoded.shape == RGB.shape
    assert np.abs(decoded.astype(int) - RGB).mean() < 3


def test_unreadable_exif_leaves_the_picture_as_stored() -> None:
    data = encoded(PICTURE, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage", quality=95)
    assert decode(data).shape == RGB.shape


def test_with_jpeg_draft_a_large_jpeg_is_shrunk_while_decoding_without_a_visible_difference() -> None:
    large = PICTURE.resize((1536, 1024), Image.Resampling.BICUBIC)
    file = io.BytesIO(encoded(large, "JPEG", quality=92))
    image = open_image(file, MediaConfig())
    assert image is not None
    small, height, width = decode_image(image, file, lambda h, w: plan_resize(h, w, 128, 16), jpeg_draft=True)
    assert (height, width) == (1024, 1536)
    assert image.size == (384, 256)  # a quarter: still twice 192 x 128
    full = Image.open(file).resize((192, 128), Image.Resampling.LANCZOS)
    assert np.abs(small[0].astype(int) - np.asarray(full)).max() <= 4


def test_first_frame_of_an_animation_is_the_picture() -> None:
    first, second = Image.new("RGB", (32, 32), (200, 0, 0)), Image.new("RGB", (32, 32), (0, 0, 200))
    for format in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if format == "WEBP" else {}
        decoded = decode(encoded(first, format, save_all=True, append_images=[second], **options))
        assert decoded[0, 0].tolist() == [200, 0, 0]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000", "AVIF", "QOI"])
@pytest.mark.parametrize("kept", [0.2, 0.6, 0.9])
def test_truncated_file_is_rejected_never_half_grey(format: str, kept: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), format)
    assert reason(data[: int(len(data) * kept)]) == Reason.truncated


def test_progressive_jpeg_without_its_last_scans_is_truncated() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG", progressive=True)
    assert reason(data[: len(data) // 2]) == Reason.truncated


def test_damaged_file_is_a_decode_error() -> None:
    data = bytearray(encoded(PICTURE, "PNG"))
    data[12:16] = b"XXXX"  # the header chunk's name
    assert reason(bytes(data)) == Reason.decode_error
    assert reason(b"\xff\xd8\xff" + b"\0" * 100 + b"\xff\xd9") == Reason.decode_error


def test_pixel_limit_is_checked_before_decoding() -> None:
    assert reason(encoded(PICTURE, "PNG"), MediaConfig(max_pixels=64 * 96 - 1)) == Reason.too_large
    assert decode(encoded(PICTURE, "PNG"), MediaConfig(max_pixels=64 * 96)).shape == RGB.shape
    header = b"P6 60000 60000 255\n"  # a bomb: 3.6 gigapixels announced, nothing there
    assert reason(header) == Reason.too_large


@pytest.mark.parametrize("data", [b"hello, this is text", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\0" * 64])
def test_what_is_no_picture_is_left_to_others(data: bytes) -> None:
    assert open_image(io.BytesIO(data), MediaConfig()) is None


def test_resize_covers_and_crops_the_centre() -> None:
    assert plan_resize(300, 451, 256, 16) == ResizePlan(cover_height=256, cover_width=385, height=256, width=384)
    assert plan_resize(512, 688, 512, 16) == ResizePlan(cover_height=512, cover_width=688, height=512, width=688)
    assert plan_resize(100, 205, None, 16) == ResizePlan(cover_height=100, cover_width=205, height=96, width=192)
    frames = RGB[None]
    plan = ResizePlan(cover_height=64, cover_width=96, height=32, width=48)
    np.testing.assert_array_equal(plan.apply(frames), frames[:, 16:48, 24:72])


@pytest.mark.parametrize("short_side", [None, 96, 100, 250, 512])
def test_a_planned_size_plans_to_itself(short_side: int | None) -> None:
    for height, width in ((97, 301), (1080, 1920), (333, 200), (16, 16), (500, 4999)):
        plan = plan_resize(height, width, short_side, 16)
        assert plan.height % 16 == plan.width % 16 == 0
        again = plan_resize(plan.height, plan.width, short_side, 16)
        assert (again.cover_height, again.cover_width) == (plan.height, plan.width)


@pytest.mark.parametrize("shape", [(540, 960), (37, 53)])
def test_lanczos_agrees_with_pillow(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), dtype=np.uint8)
    plan = plan_resize(*shape, 128, 16)
    ours = plan.apply(frames)
    monkeypatch.setattr("diffusion_data.resize.resampler", lambda: "pillow")
    theirs = plan.apply(frames)
    limit = 0 if resampler() == "pillow" else 1 if shape[0] > 128 else 2
    assert np.abs(ours.astype(int) - theirs).max() <= limit
