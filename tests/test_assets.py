"""What ships in diffusion_data/assets is complete, small, readable, and what its scripts make."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps

from diffusion_data.assets import SAMPLE_PARQUET, bundled, bundled_names

REPOSITORY = Path(__file__).resolve().parents[1]
ASSETS = SAMPLE_PARQUET.parents[1]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return pq.read_table(SAMPLE_PARQUET).to_pylist()


@pytest.fixture
def scripts_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))


def is_clip(row: dict) -> bool:
    return row["media"]["path"].endswith(".mp4")


def decode_clip(content: bytes) -> np.ndarray:
    with av.open(io.BytesIO(content)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_bundled_names_are_folders_with_a_config_and_weights() -> None:
    for name in bundled_names():
        folder = bundled(name)
        assert folder is not None
        assert json.loads((folder / "config.json").read_text())
        assert len(list(folder.glob("*.safetensors"))) == 1
    assert bundled("google-t5/t5-11b") is None


def test_assets_are_small_and_readable_by_everyone() -> None:
    models = [file for name in bundled_names() for file in (ASSETS / bundled(name)).iterdir()]
    assert sum(file.stat().st_size for file in models) < 4_000_000
    assert SAMPLE_PARQUET.stat().st_size < 2_000_000
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in [*models, SAMPLE_PARQUET])


def test_looking_up_a_name_imports_nothing_heavy() -> None:
    code = (
        "import sys, diffusion_data.assets as a; a.bundled('tiny-t5'); "
        "print(sorted({'torch', 'transformers', 'diffusers', 'av', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "[]"


def test_sample_mixes_pictures_and_clips_over_several_row_groups(rows: list[dict]) -> None:
    clips = [index for index, row in enumerate(rows) if is_clip(row)]
    assert len(rows) == 56
    assert len(clips) == 8
    assert clips != list(range(clips[0], clips[0] + 8))
    assert pq.ParquetFile(SAMPLE_PARQUET).num_row_groups == 4
    assert [row["id"] for row in rows] == [f"scene-{index:03d}" for index in range(56)]
    assert all(isinstance(row["aesthetic_score"], float) for row in rows)


def test_sample_pictures_have_many_modes_and_shapes(rows: list[dict]) -> None:
    pictures = [Image.open(io.BytesIO(row["media"]["bytes"])) for row in rows if not is_clip(row)]
    for picture in pictures:
        picture.load()
    assert {picture.mode for picture in pictures} == {"RGB", "RGBA", "P", "L", "I;16", "CMYK"}
    assert {picture.format for picture in pictures} == {"PNG", "JPEG", "WEBP"}
    assert len({picture.size for picture in pictures}) >= 6
    assert any(picture.getexif().get(0x0112) == 6 for picture in pictures)


def test_sample_clips_decode_to_moving_pictures(rows: list[dict]) -> None:
    lengths = set()
    for row in filter(is_clip, rows):
        frames = decode_clip(row["media"]["bytes"])
        lengths.add(len(frames))
        assert frames.shape[1] % 16 == 0
        assert frames.shape[2] % 16 == 0
        assert np.abs(frames[0].astype(int) - frames[-1]).max() > 50
    assert min(lengths) == 9
    assert max(lengths) == 33


def test_sample_caption_names_the_colour_that_is_in_the_place(rows: list[dict]) -> None:
    row = next(row for row in rows if row["id"] == "scene-001")
    assert row["caption"] == ("a purple circle in the bottom left corner on a background that fades from red to blue")
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(row["media"]["bytes"])))
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    height, width, _ = pixels.shape
    np.testing.assert_allclose(pixels[int(height * 0.8), int(width * 0.2)], (124, 58, 170), atol=8)
    np.testing.assert_allclose(pixels[10, 4], (214, 40, 40), atol=16)
    np.testing.assert_allclose(pixels[10, -5], (38, 84, 204), atol=16)


@pytest.mark.usefixtures("scripts_on_path")
def test_sample_script_makes_the_same_scenes_and_captions(rows: list[dict]) -> None:
    from make_sample_data import make_clip, make_picture, make_rows

    for make in (make_picture, make_clip):
        assert make(5, np.random.default_rng(1)) == make(5, np.random.default_rng(1))
    for ours, shipped in zip(make_rows(seed=0), rows, strict=True):
        # Not the media's bytes: they may change with the version of an encoder.
        assert {**ours, "media": ours["media"]["path"]} == {**shipped, "media": shipped["media"]["path"]}


@pytest.mark.usefixtures("scripts_on_path")
def test_t5_script_makes_the_shipped_weights_and_vocabulary(tmp_path: Path) -> None:
    from make_tiny_t5 import make
    from safetensors.torch import load_file

    make(tmp_path / "once", seed=0)
    make(tmp_path / "again", seed=0)
    names = sorted(file.name for file in (tmp_path / "once").iterdir())
    for name in names:
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()

    folder = bundled("tiny-t5")
    assert folder is not None
    assert sorted(file.name for file in folder.iterdir()) == names
    shipped, made = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "once"))
    assert shipped.keys() == made.keys()
    assert all(torch.equal(shipped[key], made[key]) for key in shipped)
    vocabularies = [json.loads((path / "tokenizer.json").read_text())["model"] for path in (folder, tmp_path / "once")]
    assert vocabularies[0] == vocabularies[1]


@pytest.mark.usefixtures("scripts_on_path")
def test_cosmos_script_starts_better_than_the_library_and_learns() -> None:
    import make_tiny_cosmos as maker

    torch.manual_seed(0)
    clips = maker.SyntheticClips(seed=0, num_scenes=4)
    target = clips.batch(4, 1)
    network = maker.build_network()

    def error() -> float:
        with torch.inference_mode():
            return float((network(target).sample - target).square().mean())

    untouched = error()
    maker.initialise(network, target)
    initialised = error()
    maker.train(network, clips, steps=5, peak=1e-2)
    assert initialised < 0.8 * untouched
    assert error() < initialised


def test_tiny_cosmos_gives_a_drawn_picture_back(rows: list[dict]) -> None:
    from diffusers import AutoencoderKLCosmos

    network = AutoencoderKLCosmos.from_pretrained(bundled("tiny-cosmos"), low_cpu_mem_usage=False).float()
    row = next(row for row in rows if row["id"] == "scene-001")
    pixels = np.asarray(Image.open(io.BytesIO(row["media"]["bytes"])).convert("RGB"))
    frames = torch.from_numpy(pixels.copy()).float().div(127.5).sub(1).permute(2, 0, 1)[None, :, None]
    with torch.inference_mode():
        latent = network.encode(frames).latent_dist.mode()
        decoded = network.decode(latent).sample.clamp(-1, 1)
    assert latent.shape == (1, 16, 1, 20, 20)
    assert 0.3 < latent.std() < 3
    assert (decoded - frames).square().mean() < 4 / 10**2.5  # 25 dB
