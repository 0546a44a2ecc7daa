"""Draw pictures or clips for captions from a checkpoint of train.py.

    python scripts/sample.py outputs/RUN samples --caption "a red circle" --caption "a blue star" --number 4
    python scripts/sample.py outputs/RUN sheet.png --captions captions.txt --height 128 --width 224 --guidance 5
    python scripts/sample.py outputs/RUN/checkpoints/step_010000.ckpt samples --caption "a star rises" --frames 17

A folder gets a .png or .mp4 each; a .png or .jpg shows all, a row a caption. Captions are encoded with the text
encoder, and latents decoded with the tokenizer, that made the dataset of the checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import mediapy
import numpy as np
import torch

from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.diffusion_taskencoder import PICTURE_FPS
from diffusion_data.errors import UserError
from diffusion_data.patchify import position_ids_3d, unpatchify
from diffusion_data.scripts.preview_dataset import contact_sheet, positive, strip
from diffusion_data.scripts.rectified_flow import draw
from diffusion_data.scripts.trained_model import TrainedModel, load_trained_model
from diffusion_data.t5_text_encoder import T5TextEncoder

SHEET_SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    height: int  # pixels
    width: int
    num_frames: int
    fps: float
    steps: int
    guidance: float
    seed: int
    batch_size: int  # samples drawn at a time


def draw_captions(
    trained: TrainedModel,
    tokenizer: CosmosTokenizer,
    text_encoder: T5TextEncoder,
    captions: Sequence[str],
    number: int,
    options: DrawOptions,
) -> list[list[np.ndarray]]:
    """`number` times uint8 (T, H, W, 3) for each caption. The i-th of every caption starts from the same noise."""
    texts = [torch.from_numpy(text).float() for text in text_encoder.encode([*captions, ""])]
    unconditional = texts.pop()
    latent_shape = latent_shape_of(trained, tokenizer, options)
    jobs = [(caption, start) for caption in range(len(captions)) for start in range(number)]
    frames: list[np.ndarray] = []
    for first in range(0, len(jobs), options.batch_size):
        some = jobs[first : first + options.batch_size]
        patches = _draw_batch(
            trained, [texts[caption] for caption, _ in some], unconditional, [start for _, start in some],
            latent_shape, options,
        )  # fmt: skip
        for each in patches:
            latent = unpatchify(each, latent_shape, trained.patch_spatial, trained.patch_temporal)
            frames.append(tokenizer.decode(trained.raw_latent(latent)[None])[0].cpu().numpy())
    return [frames[first : first + number] for first in range(0, len(frames), number)]


def _draw_batch(
    trained: TrainedModel,
    texts: list[torch.Tensor],
    unconditional: torch.Tensor,
    starts: list[int],
    latent_shape: tuple[int, int, int, int],
    options: DrawOptions,
) -> torch.Tensor:
    """Scaled patches (B, S, P)."""
    device, size = trained.device, len(texts)
    _, frames, height, width = latent_shape
    positions = position_ids_3d(
        frames // trained.patch_temporal, height // trained.patch_spatial, width // trained.patch_spatial
    )
    noise = [
        np.random.default_rng([options.seed, start]).standard_normal(
            (len(positions), trained.patch_channels), np.float32
        )
        for start in starts
    ]
    fps = options.fps if options.num_frames > 1 else PICTURE_FPS
    shape = {
        "position_ids": positions.expand(size, -1, -1),
        "image_size": torch.tensor([[options.height, options.width] * 2] * size, dtype=torch.float32),
        "fps": torch.full((size,), fps),
        "num_frames": torch.full((size,), float(options.num_frames)),
    }
    lengths = torch.tensor([len(text) for text in texts])
    return draw(
        trained.model,
        torch.from_numpy(np.stack(noise)).to(device),
        text=torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).to(device),
        text_mask=(torch.arange(int(lengths.max())) < lengths[:, None]).to(device),
        unconditional_text=unconditional.to(device),
        steps=options.steps,
        guidance=options.guidance,
        sigma_data=trained.sigma_data,
        shape={name: values.to(device) for name, values in shape.items()},
    )


def latent_shape_of(
    trained: TrainedModel, tokenizer: CosmosTokenizer, options: DrawOptions
) -> tuple[int, int, int, int]:
    """(C, T, H, W) of what is drawn.

    Raises:
        UserError: the tokenizer doesn't fit the model, or a size can't be cut into whole patches.
    """
    channels = trained.patch_channels // (trained.patch_spatial**2 * trained.patch_temporal)
    if channels != tokenizer.latent_channels:
        raise UserError(
            f"the model draws latents of {channels} channels, {tokenizer.name} decodes {tokenizer.latent_channels}"
        )
    multiple = tokenizer.spatial_compression * trained.patch_spatial
    for name, pixels in (("--height", options.height), ("--width", options.width)):
        if pixels % multiple:
            raise UserError(f"{name} must be a multiple of {multiple}, got {pixels}")
    latent_frames, rest = divmod(options.num_frames - 1, tokenizer.temporal_compression)
    if rest or (1 + latent_frames) % trained.patch_temporal:
        raise UserError(
            f"--frames must be 1 + k * {tokenizer.temporal_compression}, in whole patches of "
            f"{trained.patch_temporal} latent frames, got {options.num_frames}"
        )
    return (
        channels,
        1 + latent_frames,
        options.height // tokenizer.spatial_compression,
        options.width // tokenizer.spatial_compression,
    )


def write_all(drawn: list[list[np.ndarray]], output: Path, fps: float) -> list[Path]:
    """Into a folder, named by the numbers of caption and sample; or as one sheet."""
    if output.suffix.lower() in SHEET_SUFFIXES:
        output.parent.mkdir(parents=True, exist_ok=True)
        mediapy.write_image(output, contact_sheet([strip(frames) for row in drawn for frames in row], len(drawn[0])))
        return [output]
    output.mkdir(parents=True, exist_ok=True)
    paths = []
    for caption, row in enumerate(drawn):
        for number, frames in enumerate(row):
            paths.append(output / f"caption_{caption:03d}_{number:02d}.{'png' if len(frames) == 1 else 'mp4'}")
            if len(frames) == 1:
                mediapy.write_image(paths[-1], frames[0])
            else:
                write_clip(paths[-1], frames, fps)
    return paths


def write_clip(path: Path, frames: np.ndarray, fps: float) -> None:
    """uint8 (T, H, W, 3) with even sides -> H.264, which every player shows."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "12"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def read_captions(given: Sequence[str], file: Path | None) -> list[str]:
    captions = list(given)
    if file is not None:
        try:
            captions += [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--captions {file}: {error}") from error
    if not captions:
        raise UserError("no captions: give --caption TEXT, more than once for several, or --captions FILE")
    return captions


def frames_per_second(text: str) -> float:
    if not 0.001 <= float(text) <= 1000:  # what write_clip can put into a file
        raise ValueError
    return float(text)


def parse(words: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a .ckpt file, or the folder of a run, for its last one")
    parser.add_argument("output", type=Path, help="a folder, or a .png or .jpg for all in one picture")
    parser.add_argument("--caption", action="append", default=[], metavar="TEXT")
    parser.add_argument("--captions", type=Path, metavar="FILE", help="a caption a line")
    parser.add_argument("--number", type=positive, default=1, help="samples of each caption")
    parser.add_argument("--height", type=positive, help="pixels; default: the size most frequent in the dataset")
    parser.add_argument("--width", type=positive)
    parser.add_argument("--frames", type=positive, default=1, help="1: a picture; more: a clip")
    parser.add_argument("--fps", type=frames_per_second, default=24.0, help="of a clip")
    parser.add_argument("--steps", type=positive, default=50)
    parser.add_argument("--guidance", type=float, default=3.0, help="1: none, and twice as fast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=positive, default=8, help="samples drawn at a time")
    parser.add_argument("--weights", choices=("ema", "trained"), help="default: the average, if there is one")
    parser.add_argument("--tokenizer", help="name or folder; default: what made the dataset")
    parser.add_argument("--text-encoder", help="name or folder; default: what made the dataset")
    parser.add_argument("--cache-dir", help="where tokenizer and text encoder are kept; default: as for the dataset")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser, parser.parse_args(words)


def sample(arguments: argparse.Namespace) -> None:
    captions = read_captions(arguments.caption, arguments.captions)
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    trained = load_trained_model(arguments.checkpoint, arguments.weights, device)
    height, width = trained.size(arguments.height, arguments.width)
    options = DrawOptions(
        height=height,
        width=width,
        num_frames=arguments.frames,
        fps=arguments.fps,
        steps=arguments.steps,
        guidance=arguments.guidance,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
    )
    tokenizer = CosmosTokenizer.from_pretrained(
        **trained.model_arguments("tokenizer", arguments.tokenizer, arguments.cache_dir), device=device
    )
    text_encoder = T5TextEncoder.from_pretrained(
        **trained.model_arguments("text_encoder", arguments.text_encoder, arguments.cache_dir), device=device
    )
    trained.check_text_width(text_encoder.embedding_dim)
    drawn = draw_captions(trained, tokenizer, text_encoder, captions, arguments.number, options)
    paths = write_all(drawn, arguments.output, arguments.fps)
    for number, caption in enumerate(captions):
        print(f"caption_{number:03d}: {caption}")
    frames = f" x {options.num_frames} frames" if options.num_frames > 1 else ""
    print(
        f"drew {len(captions)} x {arguments.number} of {width}x{height}{frames} with the {trained.weights} weights of "
        f"step {trained.step}: {paths[0]}{f' to {paths[-1].name}' if len(paths) > 1 else ''}"
    )


def main(words: Sequence[str] | None = None) -> None:
    """words: the command line; None for the process's own."""
    parser, arguments = parse(words)
    try:
        sample(arguments)
    except (UserError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
