"""Show what a shard holds, without an index and without running code from it.

    python scripts/inspect_shard.py sample_dataset/shard_000000.tar
    python scripts/inspect_shard.py sample_dataset/shard_000000.tar --samples 1000 | grep circle
    python scripts/inspect_shard.py sample_dataset/shard_000000.tar --key samples/sample_000000003
    python scripts/inspect_shard.py sample_dataset/shard_000000.tar --key samples/sample_000000003 --save picture.png

A line a sample: key, latent and text embedding as they are stored, bytes, json. --key shows one of them whole; --save
writes what its latent decodes to: .png, .jpg or .webp for a picture, .mp4, .webp, .gif or .png (animated) for a clip.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.decoded_sample import decode_sample, frames_per_second, tokenizer_of
from diffusion_data.durable_file import durable_file
from diffusion_data.errors import UserError
from diffusion_data.latent_sample import LATENT_PART, METADATA_PART, TEXT_PART, LatentSample, parse_key
from diffusion_data.picture_files import encode_file
from diffusion_data.safe_decoder import decode_part
from diffusion_data.scripts.preview_dataset import positive, printable
from diffusion_data.shard_reader import read_parts

HEADINGS = ("key", "latent", "text", "bytes", "json")


def table(shard: Path, number: int) -> Iterator[str]:
    """A line a sample, under headings; of a damaged shard what can be read, before the error is raised."""
    rows: list[tuple[str, ...]] = [HEADINGS]
    damage = None
    try:
        rows.extend(cells(key, parts) for key, parts in islice(read_parts(shard), number + 1))
    except ValueError as error:
        damage = error
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS) - 1)]
    for *row, last in rows[: number + 1]:
        yield "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=True)), last])
    if len(rows) > number + 1:
        yield f"... the first {number}; --samples shows more"
    if damage is not None:
        raise damage


def cells(key: str, parts: Mapping[str, bytes]) -> tuple[str, ...]:
    told = {name.lstrip("."): described(name, raw) for name, raw in parts.items()}
    others = [f"{name}: {what}" for name, what in told.items() if name not in (LATENT_PART, TEXT_PART, METADATA_PART)]
    return (
        printable(key),
        told.get(LATENT_PART, "-"),
        told.get(TEXT_PART, "-"),
        f"{sum(map(len, parts.values())):,}",
        "; ".join([told.get(METADATA_PART, "-"), *others]),
    )


def described(name: str, raw: bytes) -> str:
    """ "bfloat16 16x1x16x16" of a tensor or array, the json itself, or why it can't be had."""
    try:
        value = decode_part(name, raw)
    except ValueError as error:
        return printable(str(error))
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"{str(value.dtype).removeprefix('torch.')} {'x'.join(map(str, value.shape))}"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return printable(json.dumps(value, ensure_ascii=False))


def details(key: str, parts: Mapping[str, bytes]) -> Iterator[str]:
    """One sample at length: statistics of its numbers, its json field by field."""
    yield printable(key)
    for name, raw in parts.items():
        value = decode_part(name, raw)
        if isinstance(value, Mapping):
            yield f"  {name}: {len(raw):,} bytes"
            yield from (
                f"    {printable(str(field))}: {printable(json.dumps(each, ensure_ascii=False))}"
                for field, each in value.items()
            )
            continue
        yield f"  {name}: {described(name, raw)}, {len(raw):,} bytes{statistics(value)}"


def statistics(value: Any) -> str:
    if not isinstance(value, torch.Tensor | np.ndarray) or 0 in value.shape:
        return ""
    values = torch.tensor(value, dtype=torch.float64) if isinstance(value, np.ndarray) else value.double()
    return (
        f", from {values.min():.3f} to {values.max():.3f}, mean {values.mean():.3f}, std {values.std(correction=0):.3f}"
    )


def sample_of(shard: Path, key: str) -> tuple[str, dict[str, bytes]]:
    """Key and parts of that sample; the number of its row, "42", is enough of a key for the row's first."""
    keys = []
    for found, parts in read_parts(shard):
        if found == key or (key.isdecimal() and row_of(found) == int(key)):
            return found, parts
        keys.append(found)
    between = f"; its keys go from {keys[0]} to {keys[-1]}" if keys else ""
    raise UserError(f"{shard} has no sample {key}{between}")


def row_of(key: str) -> int | None:
    """The number in a key, also in one of another writer, which may be all of it."""
    row, _ = parse_key(key) or (key.rpartition("_")[2], None)
    return int(row) if isinstance(row, int) or row.isdecimal() else None


def save(sample: LatentSample, tokenizer: CosmosTokenizer, file: Path) -> None:
    content = encode_file(decode_sample(sample, tokenizer), frames_per_second(sample.metadata), file.suffix)
    with durable_file(file) as written:
        written.write(content)


def tokenizer_for(shard: Path, name: str | None) -> CosmosTokenizer:
    dataset = next((folder for folder in shard.absolute().parents if (folder / "run").is_dir()), shard.parent)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return CosmosTokenizer.from_pretrained(name or tokenizer_of(dataset), device=device)


def show(arguments: argparse.Namespace) -> Iterator[str]:
    """The lines to print; --save has its own."""
    shard: Path = arguments.shard
    if not shard.is_file():
        raise UserError(f"{shard} is not a file")
    if arguments.key is None:
        if arguments.save is not None:
            raise UserError("--save needs --key, which tells the sample")
        yield from table(shard, arguments.samples)
        return
    key, parts = sample_of(shard, arguments.key)
    yield from details(key, parts)
    if arguments.save is not None:
        decoded = {part: decode_part(part, raw) for part, raw in parts.items()}
        sample = LatentSample.from_parts(key, decoded)
        save(sample, tokenizer_for(shard, arguments.tokenizer), arguments.save)
        yield f"wrote {arguments.save}"


def main(words: Sequence[str] | None = None) -> None:
    """words: the command line; None for the process's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shard", type=Path)
    parser.add_argument("--samples", type=positive, default=20, help="lines of the table; default: %(default)s")
    parser.add_argument("--key", help="show this sample only; its row's number is enough")
    parser.add_argument("--save", type=Path, help="file for what the sample of --key decodes to")
    parser.add_argument("--tokenizer", help="name or folder, for --save; default: what made the dataset")
    arguments = parser.parse_args(words)
    is_for_eyes = arguments.key is None and sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_for_eyes else None
    try:
        for line in show(arguments):
            print(line[:width])
    except (UserError, ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
