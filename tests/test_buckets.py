"""Aspect-ratio buckets: few sizes of about equal area, the nearest for each row, and what that crops is counted."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion_data.media import MediaConfig, MediaLoader
from diffusion_data.prepare_energon_dataset import prepare
from diffusion_data.resize import ResizePlan, bucket_sizes, plan_bucket
from tests.small_source import picture_bytes, prepare_config, write_source


@pytest.mark.parametrize(("short_side", "multiple"), [(512, 16), (512, 32), (256, 16), (720, 16), (100, 16), (48, 16)])
def test_sizes_are_multiples_of_about_equal_area(short_side: int, multiple: int) -> None:
    sizes = bucket_sizes(short_side, multiple)
    side = int(short_side / multiple + 0.5) * multiple
    assert (side, side) in sizes
    assert {(width, height) for height, width in sizes} == set(sizes)
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert max(height, width) <= 4 * min(height, width)
        assert abs(height * width / side**2 - 1) <= multiple / min(height, width)


def test_the_usual_sizes_at_512() -> None:
    assert [size for size in bucket_sizes(512, 16) if size[0] <= size[1]] == [
        (256, 1024),
        (320, 816),
        (384, 688),
        (448, 592),
        (512, 512),
    ]


def test_the_nearest_aspect_is_covered_and_cropped() -> None:
    assert plan_bucket(1080, 1920, 512, 16) == ResizePlan(cover_height=387, cover_width=688, height=384, width=688)
    assert plan_bucket(1000, 1000, 512, 16) == ResizePlan(cover_height=512, cover_width=512, height=512, width=512)
    assert plan_bucket(100, 900, 512, 16).width == 1024  # beyond 4:1 the sides are cropped
    for height, width in bucket_sizes(512, 16):
        assert plan_bucket(height, width, 512, 16).cover_height == height


def test_pictures_of_every_shape_come_in_few_shapes() -> None:
    loader = MediaLoader(MediaConfig(short_side=128, resize="buckets"), "", 4, 16)
    shapes = set()
    for width in range(100, 300, 7):
        file = io.BytesIO()
        Image.fromarray(np.zeros((120, width, 3), np.uint8)).save(file, "PNG")
        shapes.add(loader.load(file.getvalue()).pixels.shape[1:3])
    assert shapes <= set(bucket_sizes(128, 16))
    assert len(shapes) <= 6


def test_what_was_cropped_is_in_the_statistics(tmp_path: Path) -> None:
    rows = [
        {"media": {"bytes": picture_bytes(0, height, width), "path": None}, "caption": "a", "score": 0.0}
        for height, width in ((48, 48), (48, 64), (64, 48))
    ]
    source = write_source(tmp_path / "source.parquet", rows)
    media = MediaConfig(short_side=48, resize="buckets")
    prepare(prepare_config(source, tmp_path / "out", media=media))
    stats = json.loads((tmp_path / "out/run/stats.json").read_text())
    assert sum(stats["cropped_percent"].values()) == 3
    assert set(stats["resolutions"]) <= {f"{height}x{width}" for height, width in bucket_sizes(48, 16)}


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"media\.resize is short_side or buckets, got 'crop'"):
        MediaConfig(resize="crop")
    with pytest.raises(ValueError, match=r"media\.resize=buckets needs media\.short_side"):
        MediaConfig(resize="buckets", short_side=None)
