"""References of every kind become conforming frames; every option of MediaConfig does what it says."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion_data.errors import Reason, RowRejected
from diffusion_data.media import Frames, MediaConfig, MediaLoader
from tests.media_files import encoded, frame_numbers, gradient, write_video

RGB = gradient(64, 96)
PNG = encoded(Image.fromarray(RGB), "PNG")


def loader(root: Path | str = "/nowhere", *, temporal_compression: int = 4, **options: Any) -> MediaLoader:
    options = {"short_side": 64, **options}
    return MediaLoader(MediaConfig(**options), str(root), temporal_compression, 16)


def reason(reference: Any, root: Path | str = "/nowhere", **options: Any) -> Reason:
    with pytest.raises(RowRejected) as rejected:
        loader(root, **options).load(reference)
    return rejected.value.reason


def frames(pixels: np.ndarray, fps: float | None = None) -> Frames:
    return Frames(pixels=pixels, fps=fps, source_height=pixels.shape[1], source_width=pixels.shape[2])


# References


@pytest.mark.parametrize(
    "reference",
    [
        PNG,
        bytearray(PNG),
        memoryview(PNG),
        {"bytes": PNG, "path": None},
        {"bytes": PNG, "path": "no such file.png"},
        {"bytes": None, "path": "a.png"},
        "a.png",
        Path("a.png"),
        Image.fromarray(RGB),
        RGB,
        RGB[None],
    ],
)
def test_every_kind_of_reference_gives_the_same_frames(tmp_path: Path, reference: Any) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    loaded = loader(tmp_path).load(reference)
    np.testing.assert_array_equal(loaded.pixels, RGB[None])
    assert loaded.fps is None
    assert (loaded.source_height, loaded.source_width) == (64, 96)
    assert (loaded.num_frames, loaded.height, loaded.width) == (1, 64, 96)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        (None, Reason.null_media),
        (float("nan"), Reason.null_media),
        ({"bytes": None, "path": None}, Reason.null_media),
        (b"", Reason.empty),
        ("", Reason.empty),
        ({"bytes": b"", "path": "a.png"}, Reason.empty),
        (b"just text", Reason.not_media),
        (17, Reason.not_media),
        ({"url": "x"}, Reason.not_media),
        (np.zeros((64, 64, 3), np.float32), Reason.not_media),
        (np.zeros((64, 64), np.uint8), Reason.not_media),
        (b"%!PS-Adobe-3.0 EPSF-3.0", Reason.unsupported_format),
        (b"%PDF-1.7", Reason.unsupported_format),
        (b"<?xml version='1.0'?>\n<svg width='10'></svg>", Reason.unsupported_format),
        (b"#EXTM3U\n/etc/passwd", Reason.unsupported_format),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", Reason.unsupported_format),
        (PNG[: len(PNG) // 2], Reason.truncated),
        (PNG[:12] + b"XXXX" + PNG[16:], Reason.decode_error),
        ("no.png", Reason.not_found),
        ("../a.png", Reason.forbidden_path),
        ("http://127.0.0.1/a.png", Reason.forbidden_url),
    ],
)
def test_reject_reasons_are_exact(tmp_path: Path, reference: Any, expected: Reason) -> None:
    assert reason(reference, tmp_path) == expected


@pytest.mark.parametrize("start", ["", "\n", "\ufeff", "ID3\0"])
def test_what_names_other_files_or_urls_opens_none(tmp_path: Path, server: Any, start: str) -> None:
    video = write_video(tmp_path / "secret.ts", 3)
    for target in (
        str(video),
        video.as_uri(),
        f"{server.url}/ok",
        "pipe:0",
        f"concat:{video}|{video}",
        f"subfile,,:{video}",
    ):
        for text in (
            f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n",
            f"ffconcat version 1.0\nfile '{target}'\n",
            f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{target}</BaseURL></MPD>',
            f"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\na=control:{target}\r\nm=video 5004 RTP/AVP 96\r\n",
            f'<smil><body><video src="{target}"/></body></smil>',
        ):
            assert reason((start + text).encode(), tmp_path) in (Reason.not_media, Reason.unsupported_format)
    assert server.requests == []


def test_no_content_starts_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: started.append(args))
    monkeypatch.setattr(os, "system", started.append)
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
    binary = b"\xc5\xd0\xd3\xc6" + (32).to_bytes(4, "little") + len(postscript).to_bytes(4, "little") + bytes(20)
    for data in (postscript, binary + postscript, b"%PDF-1.4\n" + postscript, b"\n\n" + postscript):
        assert reason(data) in (Reason.unsupported_format, Reason.not_media)
    assert started == []


def test_content_decides_what_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "picture.mp4").write_bytes(PNG)
    write_video(tmp_path / "video.mp4", 5)
    (tmp_path / "video.mp4").rename(tmp_path / "video.png")
    assert loader(tmp_path).load("picture.mp4").fps is None
    video = loader(tmp_path).load("video.png")
    assert (video.num_frames, video.fps) == (5, 10.0)
    from_bytes = loader(tmp_path).load((tmp_path / "video.png").read_bytes())
    np.testing.assert_array_equal(from_bytes.pixels, video.pixels)


def test_picture_of_a_user_function_is_turned_upright_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(RGB)))
    opened = Image.open(io.BytesIO(encoded(stored, "PNG", exif=exif)))
    np.testing.assert_array_equal(loader().load(opened).pixels, RGB[None])


def test_loader_pickles_and_gives_the_same() -> None:
    copy = pickle.loads(pickle.dumps(loader()))
    np.testing.assert_array_equal(copy.load(PNG).pixels, loader().load(PNG).pixels)


def test_import_loads_neither_torch_nor_av() -> None:
    code = "import sys, diffusion_data.media; print(sorted({'torch', 'av', 'fsspec'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


# Sizes and frame counts


def test_short_side_is_resized_to_and_both_sides_are_multiples(tmp_path: Path) -> None:
    pixels = loader(short_side=32).load(encoded(Image.fromarray(gradient(100, 151)), "PNG")).pixels
    assert pixels.shape == (1, 32, 48, 3)
    assert loader(short_side=40).load(PNG).pixels.shape == (1, 48, 80, 3)  # 40 is rounded to 48
    write_video(tmp_path / "a.mp4", 5, height=100, width=150)
    assert loader(tmp_path, short_side=32).load("a.mp4").pixels.shape == (5, 32, 48, 3)


def test_no_short_side_keeps_the_pixels_and_crops_to_multiples() -> None:
    picture = gradient(70, 101)
    loaded = loader(short_side=None).load(picture)
    np.testing.assert_array_equal(loaded.pixels, picture[None, 3:67, 2:98])
    assert (loaded.source_height, loaded.source_width) == (70, 101)


@pytest.mark.parametrize(
    ("num_frames", "temporal_compression", "expected"),
    [(None, 4, 9), (None, 8, 9), (9, 4, 9), (8, 4, 5), (5, 8, 1), (1, 4, 1), (1000, 4, 9), (11, 1, 11)],
)
def test_num_frames_is_snapped_down_to_what_the_tokenizer_takes(
    tmp_path: Path, num_frames: int | None, temporal_compression: int, expected: int
) -> None:
    write_video(tmp_path / "a.mp4", 12)
    media = loader(tmp_path, num_frames=num_frames, temporal_compression=temporal_compression)
    assert frame_numbers(media.load("a.mp4").pixels) == list(range(expected))


def test_fps_resamples_by_time(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 18, fps=10)
    loaded = loader(tmp_path, fps=5.0).load("a.mp4")
    assert frame_numbers(loaded.pixels) == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    assert loaded.fps == 5.0
    assert loader(tmp_path, fps=5.0).load(PNG).fps is None


def test_max_frames_rejects_instead_of_filling_the_memory(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 12)
    for temporal_compression in (1, 4, 8):
        options = {"temporal_compression": temporal_compression, "max_frames": 11}
        assert reason("a.mp4", tmp_path, **options) == Reason.too_large
    assert loader(tmp_path, max_frames=12).load("a.mp4").num_frames == 9
    assert loader(tmp_path, max_frames=11, num_frames=5).load("a.mp4").num_frames == 5


def test_clips_shorter_than_asked_for_are_rejected_and_pictures_are_not(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 10)  # 9 after cutting to 1 + 4 k
    assert loader(tmp_path, min_frames=9).load("a.mp4").num_frames == 9
    assert reason("a.mp4", tmp_path, min_frames=10) == Reason.too_few_frames
    assert reason("a.mp4", tmp_path, min_frames=9, fps=5) == Reason.too_few_frames  # counted after resampling
    assert loader(min_frames=9).load(PNG).num_frames == 1
    pixels = np.zeros((8, 64, 64, 3), np.uint8)
    for clip in (frames(pixels, 8.0), frames(pixels), frames(pixels[:1], 8.0)):  # with a rate or several frames
        with pytest.raises(
            RowRejected, match=r"too_few_frames: [18] frames, cut to [15], less than media\.min_frames=9"
        ):
            loader(min_frames=9).conform(clip)
    assert loader(min_frames=9).conform(frames(pixels[:1])).num_frames == 1


def test_too_small_and_bad_aspect_are_judged_on_the_source(tmp_path: Path) -> None:
    small, wide = gradient(15, 40), gradient(20, 210)
    for picture in (small, encoded(Image.fromarray(small), "PNG")):
        assert reason(picture) == Reason.too_small
        assert loader(min_side=15).load(picture).pixels.shape == (1, 64, 176, 3)
    for picture in (wide, encoded(Image.fromarray(wide), "PNG")):
        assert reason(picture) == Reason.bad_aspect
        assert loader(max_aspect_ratio=10.5).load(picture).pixels.shape == (1, 64, 672, 3)
    write_video(tmp_path / "a.mp4", 1, height=16, width=192)
    assert reason("a.mp4", tmp_path) == Reason.bad_aspect
    assert reason("a.mp4", tmp_path, min_side=17) == Reason.too_small


def test_max_pixels_holds_for_pictures_and_videos(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 1)
    for reference in (PNG, "a.mp4"):
        assert reason(reference, tmp_path, max_pixels=64 * 96 - 1) == Reason.too_large


def test_video_without_pictures_has_no_frames(tmp_path: Path) -> None:
    for suffix, codec in (("mkv", "libx264"), ("mp4", "libx264"), ("avi", "mpeg4")):
        write_video(tmp_path / f"a.{suffix}", 0, codec=codec)
        assert reason(f"a.{suffix}", tmp_path) == Reason.no_frames


# Frames that a user's own function made


def test_conform_resizes_trims_and_resamples() -> None:
    pixels = np.stack([np.full((128, 192, 3), 20 + 6 * number, np.uint8) for number in range(20)])
    media = loader(fps=5.0, num_frames=8)
    conformed = media.conform(frames(pixels, fps=10.0))
    assert conformed.pixels.shape == (5, 64, 96, 3)
    assert frame_numbers(conformed.pixels) == [0, 2, 4, 6, 8]
    assert conformed.fps == 5.0
    assert (conformed.source_height, conformed.source_width) == (128, 192)


def test_array_of_frames_is_taken_to_be_at_the_wanted_rate() -> None:
    loaded = loader(fps=12.0).load(np.zeros((6, 64, 96, 3), np.uint8))
    assert (loaded.num_frames, loaded.fps) == (5, 12.0)


@pytest.mark.parametrize("short_side", [None, 64, 70])
@pytest.mark.parametrize("shape", [(100, 151), (16, 160), (33, 329), (500, 51), (64, 96)])
def test_conform_leaves_what_is_right_alone(short_side: int | None, shape: tuple[int, int]) -> None:
    media = loader(short_side=short_side, num_frames=7, fps=8.0, min_side=16)
    once = media.load(np.repeat(gradient(*shape)[None], 9, axis=0))
    twice = media.conform(once)
    np.testing.assert_array_equal(twice.pixels, once.pixels)
    assert (twice.fps, twice.source_height, twice.source_width) == (once.fps, *shape)


def test_frames_validate_themselves() -> None:
    for pixels in (
        np.zeros((64, 64, 3), np.uint8),
        np.zeros((1, 64, 64, 3), np.float32),
        np.zeros((0, 8, 8, 3), np.uint8),
    ):
        with pytest.raises(ValueError, match="expected uint8"):
            Frames(pixels=pixels, fps=None, source_height=1, source_width=1)
    with pytest.raises(ValueError, match="fps"):
        frames(RGB[None], fps=0.0)


# Options


def test_lists_from_yaml_become_tuples() -> None:
    options: dict[str, Any] = {"allowed_roots": ["/a"], "allowed_hosts": ["b"]}
    config = MediaConfig(**options)
    assert (config.allowed_roots, config.allowed_hosts) == (("/a",), ("b",))


@pytest.mark.parametrize(
    "options",
    [
        {"short_side": 0},
        {"fps": -1.0},
        {"num_frames": 0},
        {"allowed_roots": "/a"},
        {"fetch_timeout_seconds": 0},
        {"fetch_retries": -1},
        {"max_fetch_bytes": 0},
        {"max_pixels": 10**9},
        {"max_frames": 0},
        {"max_aspect_ratio": 0.5},
        {"min_side": 0},
    ],
)
def test_impossible_options_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"media.{next(iter(options))}"):
        MediaConfig(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_frames": 18, "num_frames": 17}, r"media\.min_frames=18 is more than media\.num_frames=17"),
        ({"min_frames": 18, "max_frames": 17}, r"media\.min_frames=18 is more than media\.max_frames=17"),
        ({"min_frames": 0}, r"media\.min_frames must be above 0"),
        ({"max_redirects": -1}, r"media\.max_redirects must be 0 or more"),
        ({"max_connections_per_host": 0}, r"media\.max_connections_per_host must be above 0"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MediaConfig(**options)


def test_jpeg_draft_is_off_unless_asked_for() -> None:
    """Off: the pixels are those of Pillow's full decode; on: they differ a little."""
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG", quality=90)
    exact = np.array(Image.open(file))
    full, draft = (
        MediaLoader(MediaConfig(short_side=64, jpeg_draft=on), ".", 4, 16).load(file.getvalue()).pixels
        for on in (False, True)
    )
    resized = MediaLoader(MediaConfig(short_side=64), ".", 4, 16).load(exact).pixels
    np.testing.assert_array_equal(full, resized)
    assert not np.array_equal(full, draft)
