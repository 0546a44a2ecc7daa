"""What a shard holds, as a table, one sample at length, and as a picture or clip."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.decoded_sample import decode_sample
from diffusion_data.prepare_energon_dataset import prepare
from diffusion_data.scripts.inspect_shard import main
from diffusion_data.shard_reader import read_shard
from tests.small_source import prepare_config, source_rows, write_source


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, and a clip of 9 frames at 3; the second caption would clear the screen."""
    folder = tmp_path_factory.mktemp("inspect")
    rows = source_rows(4)
    rows[1]["caption"] = "red\x1b[2Jcircle\u202e"
    prepare(prepare_config(write_source(folder / "source.parquet", rows), folder / "dataset"))
    return folder / "dataset/shard_000000.tar"


def test_a_line_a_sample(shard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(shard)])
    headings, first, second, _, clip = capsys.readouterr().out.splitlines()
    assert headings.split() == ["key", "latent", "text", "bytes", "json"]
    samples = list(read_shard(shard))
    assert first.split()[:5] == [
        "samples/sample_000000000",
        "bfloat16",
        "16x1x6x6",
        "float16",
        f"{len(samples[0].text_embedding)}x1024",
    ]
    assert '"caption": "picture nice"' in first
    assert "bfloat16 16x3x6x8" in clip
    assert "red\\u001b[2Jcircle\\u202e" in second


def test_as_many_lines_as_are_asked_for(shard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(shard), "--samples", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[-1] == "... the first 3; --samples shows more"


@pytest.mark.parametrize("key", ["3", "samples/sample_000000003"])
def test_one_sample_at_length(shard: Path, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(shard), "--key", key])
    said = capsys.readouterr().out
    clip = list(read_shard(shard))[3]
    assert said.startswith("samples/sample_000000003\n")
    assert "    num_frames: 9\n    framerate: 8.0\n" in said
    mean = clip.latent.double().mean()
    assert "pth: bfloat16 16x3x6x8, " in said
    assert f"mean {mean:.3f}" in said


def test_saves_a_picture_and_a_clip(shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = CosmosTokenizer.from_pretrained("tiny-cosmos")
    picture, _, _, clip = (decode_sample(sample, tokenizer) for sample in read_shard(shard))
    main([str(shard), "--key", "0", "--save", str(tmp_path / "picture.png")])
    with Image.open(tmp_path / "picture.png") as saved:
        np.testing.assert_array_equal(np.asarray(saved), picture[0])
    main([str(shard), "--key", "3", "--save", str(tmp_path / "clip.png")])
    with Image.open(tmp_path / "clip.png") as saved:
        assert getattr(saved, "n_frames", 1) == 9
        saved.seek(8)
        np.testing.assert_array_equal(np.asarray(saved.convert("RGB")), clip[8])
    main([str(shard), "--key", "3", "--save", str(tmp_path / "clip.mp4")])
    with av.open(str(tmp_path / "clip.mp4")) as saved_clip:
        assert saved_clip.streams.video[0].average_rate == 8
        frames = [frame.to_ndarray(format="rgb24") for frame in saved_clip.decode(video=0)]
    assert len(frames) == 9
    assert np.abs(np.stack(frames).astype(int) - clip).mean() < 12


def test_a_damaged_shard_shows_what_is_left_of_it(
    shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = shard.read_bytes()
    (tmp_path / "cut.tar").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(SystemExit):
        main([str(tmp_path / "cut.tar")])
    said = capsys.readouterr()
    assert "samples/sample_000000000  bfloat16 16x1x6x6" in said.out
    assert "cut.tar" in said.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--key", "9"], "has no sample 9; its keys go from samples/sample_000000000 to samples/sample_000000003"),
        (["--key", "3", "--save", "clip.jpg"], ".jpg: a clip is written as .png, .webp, .gif, .mp4"),
        (["--save", "picture.png"], "--save needs --key"),
        (["--key", "3", "--save", "nowhere/c.mp4"], "error: [Errno 2] No such file or directory: 'nowhere/c.mp4'\n"),
    ],
)
def test_a_mistake_is_told_in_a_line(
    shard: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(shard), *words])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
