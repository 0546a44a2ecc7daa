"""Decode a dataset's latents back to pictures, to see what training will see.

    python scripts/preview_dataset.py sample_dataset preview.png
    python scripts/preview_dataset.py elsewhere preview.png --tokenizer nvidia/Cosmos-0.1-Tokenizer-CV4x8x8

One row a sample: a picture, or the first, middle and last frame of a clip. Captions go to the terminal.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path

import mediapy
import numpy as np
import torch

from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.dataset_folder import check_dataset
from diffusion_data.decoded_sample import decode_sample, tokenizer_of
from diffusion_data.errors import UserError
from diffusion_data.shard_reader import read_shard

GAP = 8  # white pixels between pictures


def decode_rows(dataset: Path, tokenizer: CosmosTokenizer, num_samples: int) -> list[np.ndarray]:
    """One uint8 (H, W, 3) strip for each of the first samples."""
    samples = chain.from_iterable(read_shard(path) for path in sorted(dataset.glob("*.tar")))
    strips = []
    for sample in islice(samples, num_samples):
        strips.append(strip(decode_sample(sample, tokenizer)))
        caption = printable(str(sample.metadata.get("caption", "no caption")))
        print(f"{printable(sample.key)} {tuple(sample.latent.shape)}: {caption}")
    return strips


def strip(frames: np.ndarray) -> np.ndarray:
    """uint8 (T, H, W, 3) -> the picture, or a clip's first, middle and last, side by side."""
    chosen = sorted({0, len(frames) // 2, len(frames) - 1})
    return np.concatenate([pad(frames[number], GAP) for number in chosen], axis=1)


def pad(picture: np.ndarray, right: int, bottom: int = GAP) -> np.ndarray:
    return np.pad(picture, ((0, bottom), (0, right), (0, 0)), constant_values=255)


def contact_sheet(strips: list[np.ndarray], columns: int) -> np.ndarray:
    """Strips in rows of `columns`, each row as high as its highest."""
    rows = []
    for start in range(0, len(strips), columns):
        row = strips[start : start + columns]
        height = max(len(strip) for strip in row)
        rows.append(np.concatenate([pad(strip, 0, height - len(strip)) for strip in row], axis=1))
    width = max(row.shape[1] for row in rows)
    return np.concatenate([pad(row, width - row.shape[1], 0) for row in rows])


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def printable(text: str) -> str:
    """Captions are data: none of their characters may steer a terminal."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def main(words: Sequence[str] | None = None) -> None:
    """words: the command line; None for the process's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("picture", type=Path, help="the contact sheet to write, .png or .jpg")
    parser.add_argument("--samples", type=positive, default=24)
    parser.add_argument("--columns", type=positive, default=4)
    parser.add_argument("--tokenizer", help="name or folder; default: what made the dataset")
    arguments = parser.parse_args(words)
    try:
        check_dataset(arguments.dataset)
        tokenizer = CosmosTokenizer.from_pretrained(
            arguments.tokenizer or tokenizer_of(arguments.dataset),
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        strips = decode_rows(arguments.dataset, tokenizer, arguments.samples)
    except (UserError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    mediapy.write_image(arguments.picture, contact_sheet(strips, arguments.columns))
    print(f"wrote {arguments.picture}")


if __name__ == "__main__":
    main()
