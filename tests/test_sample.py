"""scripts/sample.py, from a model that was trained, for seconds, on a dataset of two pictures and two clips."""

from __future__ import annotations

import sys
from itertools import permutations
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_data.prepare_energon_dataset import prepare
from diffusion_data.scripts import train
from diffusion_data.scripts.sample import main
from tests.media_files import encoded, write_video
from tests.small_source import prepare_config, write_source

COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200)}


def plain(colours: list[tuple[int, int, int]]) -> np.ndarray:
    """uint8 (T, 48, 64, 3)"""
    return np.tile(np.array(colours, np.uint8)[:, None, None], (1, 48, 64, 1))


def colour_of(pixels: np.ndarray) -> str:
    """The name of the colour that a picture is all over, or how far it is from any."""
    mean = pixels.mean(axis=(0, 1))
    distances = {name: np.abs(mean - colour).max() for name, colour in COLOURS.items()}
    nearest = min(distances, key=distances.__getitem__)
    return nearest if distances[nearest] < 40 else f"{mean}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on pictures of 64 x 48 that are red or blue all over, and on clips of 9 frames whose last
    four are of the other colour, as their captions say."""
    folder = tmp_path_factory.mktemp("sample")
    rows = []
    for (first, colour), (then, other) in permutations(COLOURS.items()):
        clip = write_video(folder / "clip.mp4", 9, height=48, width=64, pictures=plain([colour] * 5 + [other] * 4))
        for caption, media in (
            (f"a {first} picture", encoded(Image.fromarray(plain([colour])[0]), "PNG")),
            (f"a clip that is {first} and then {then}", clip.read_bytes()),
        ):
            rows.append({"media": {"bytes": media, "path": None}, "caption": caption, "score": 1.0})
    prepare(prepare_config(write_source(folder / "source.parquet", rows), folder / "dataset"))
    options = [f"data.path={folder / 'dataset'}", "data.num_workers=0", "data.micro_batch_size=4", "model=dit_tiny"]
    options += [
        "data.global_batch_size=4",
        "++data.max_seq_length=48",
        "++data.packing_buffer_size=8",
    ]  # a picture and a clip a sequence
    options += ["++data.task_encoder.latent_scaling=per_channel", "++data.task_encoder.text_dropout=0.1"]
    options += ["model.hidden_size=48", "model.depth=2", "model.num_heads=4", "trainer.max_steps=150"]
    options += ["trainer.accelerator=cpu", "optimizer.learning_rate=0.005", "ema.decay=0.9"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *options, f"output_dir={folder / 'run'}"])
        train.main()
    return folder / "run"


def test_pictures_follow_their_captions(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "captions.txt").write_text("a red picture\n\na blue picture\n")
    captions = ["--captions", str(tmp_path / "captions.txt")]
    main([str(run), str(tmp_path / "out"), *captions, "--number", "2", "--guidance", "1"])

    names = ["caption_000_00.png", "caption_000_01.png", "caption_001_00.png", "caption_001_01.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for name, expected in zip(names, ["red", "red", "blue", "blue"], strict=True):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.size == (64, 48)  # the dataset's, without being told
            assert colour_of(np.asarray(picture)) == expected
    assert "drew 2 x 2 of 64x48 with the ema weights of step 150" in capsys.readouterr().out


def test_clips_change_as_their_captions_say(run: Path, tmp_path: Path) -> None:
    captions = ["a clip that is red and then blue", "a clip that is blue and then red"]
    words = [word for caption in captions for word in ("--caption", caption)]
    main([str(run), str(tmp_path / "out"), *words, "--frames", "9", "--guidance", "1"])

    for number, (first, then) in enumerate(permutations(COLOURS)):
        with av.open(str(tmp_path / "out" / f"caption_{number:03d}_00.mp4")) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        colours = [colour_of(frame) for frame in frames]
        assert colours[:5] + colours[7:] == [first] * 5 + [then] * 2  # in between the tokenizer itself mixes them


def test_the_same_seed_draws_the_same_whatever_is_drawn_beside_it(run: Path, tmp_path: Path) -> None:
    few = ["--steps", "2", "--height", "32", "--width", "16"]
    main([str(run), str(tmp_path / "a"), "--caption", "a red picture", "--caption", "b", "--number", "2", *few])
    main([str(run), str(tmp_path / "b"), "--caption", "a red picture", "--number", "2", "--batch-size", "1", *few])
    main([str(run), str(tmp_path / "c"), "--caption", "a red picture", "--seed", "1", *few])

    def pixels(folder: str, name: str) -> np.ndarray:
        with Image.open(tmp_path / folder / f"caption_000_{name}.png") as picture:
            return np.asarray(picture).astype(int)

    for number in ("00", "01"):
        assert np.abs(pixels("a", number) - pixels("b", number)).max() <= 1
    assert np.abs(pixels("a", "00") - pixels("a", "01")).max() > 10
    assert np.abs(pixels("a", "00") - pixels("c", "00")).max() > 10


def test_clips_are_video_files_and_sheets_show_three_frames(run: Path, tmp_path: Path) -> None:
    few = ["--caption", "a red picture", "--frames", "9", "--fps", "12.5", "--steps", "1", "--weights", "trained"]
    few += ["--height", "32", "--width", "48"]
    main([str(run), str(tmp_path / "clips"), *few])
    with av.open(str(tmp_path / "clips" / "caption_000_00.mp4")) as container:
        (stream,) = container.streams
        assert (stream.width, stream.height, float(stream.average_rate)) == (48, 32, 12.5)  # type: ignore[arg-type]
        assert len(list(container.decode(video=0))) == 9

    main([str(run), str(tmp_path / "sheet.png"), *few])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (3 * (48 + 8), 32 + 8)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{run}", "out"], "no captions: give --caption TEXT"),
        (["{run}/nothing.ckpt", "out", "--caption", "a"], "nothing.ckpt"),
        (["{run}/config.yaml", "out", "--caption", "a"], "config.yaml is damaged, or no checkpoint"),
        (["{run}", "out", "--caption", "a", "--height", "40"], "--height must be a multiple of 16, got 40"),
        (["{run}", "out", "--caption", "a", "--frames", "4"], "--frames must be 1 + k * 4"),
        (["{run}", "out", "--caption", "a", "--tokenizer", "./nothing"], "./nothing"),
        (["{run}", "out", "--captions", "nothing.txt"], "nothing.txt"),
    ],
)
def test_a_mistake_is_told_in_a_line(
    run: Path, words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([word.format(run=run) for word in words])

    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in told
    assert told.count("\n") == 1, told


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "inf", "0.0001"])
def test_a_rate_that_no_clip_can_have_is_refused(
    run: Path, rate: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(run), str(tmp_path / "clips"), "--caption", "a", "--frames", "9", "--fps", rate])

    assert ended.value.code == 2
    assert f"argument --fps: invalid frames_per_second value: '{rate}'" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_tell_its_models_asks_for_them(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    unknown = {"tokenizer": None, "text_encoder": None, "usual_size": None}
    checkpoint["provenance"] |= unknown  # as after training on a dataset made elsewhere
    torch.save(checkpoint, tmp_path / "elsewhere.ckpt")
    words = [str(tmp_path / "elsewhere.ckpt"), str(tmp_path / "out"), "--caption", "a red picture", "--steps", "1"]
    given: list[str] = []
    for said, more in (
        ("give --height and --width", ["--height", "16", "--width", "16"]),
        ("doesn't tell its dataset's tokenizer: give --tokenizer", ["--tokenizer", "tiny-cosmos"]),
        ("doesn't tell its dataset's text_encoder: give --text-encoder", ["--text-encoder", "tiny-t5"]),
    ):
        with pytest.raises(SystemExit):
            main([*words, *given])
        assert said in capsys.readouterr().err
        given += more
    main([*words, *given])

    assert (tmp_path / "out" / "caption_000_00.png").exists()
