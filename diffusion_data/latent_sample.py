"""LatentSample <-> the parts of one WebDataset sample: the disk contract, and the only place that knows it.

    samples/sample_000000042.pth     torch.save of the latent: bfloat16 (C, T, H, W), raw tokenizer output
    samples/sample_000000042.pickle  pickled numpy float16 (S, D): T5 embedding of the S real tokens
    samples/sample_000000042.json    metadata, the fields of `build_metadata`

The number in the key is the global row index, so a key is unique and points back to its row. The samples of a row
that became several are samples/sample_000000042_000, _001 and so on.

Reading also accepts what NeMo's and DFM's scripts write: part names with a leading dot, a batch axis on
the latent, a padded torch tensor in the pickle, missing metadata (`LatentSample.from_parts`).
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

LATENT_PART = "pth"
TEXT_PART = "pickle"
METADATA_PART = "json"
PARTS = (LATENT_PART, TEXT_PART, METADATA_PART)

EMPTY_CAPTION_FILE = "run/empty_caption.pickle"  # of the dataset; as a text part

FORMAT_VERSION = 1  # part of the fingerprint: raise it when the bytes of a part change

_KEY = re.compile(r"samples/sample_(?P<row>[0-9]{9,})(_(?P<number>[0-9]{3,}))?")

# Protocol 5 is read by every supported Python and stores an array's buffer without a detour.
_PICKLE_PROTOCOL = 5


def sample_key(row: int, number: int = 0, count: int = 1) -> str:
    """WebDataset key of sample `number` of the `count` that global row `row` became."""
    return f"samples/sample_{row:09d}" if count == 1 else f"samples/sample_{row:09d}_{number:03d}"


def parse_key(key: str) -> tuple[int, int | None] | None:
    """(row, number of the sample among several of the row, else None); None if `sample_key` didn't make the key."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    row, number = int(match["row"]), None if match["number"] is None else int(match["number"])
    made = sample_key(row) if number is None else sample_key(row, number, number + 2)
    return (row, number) if made == key else None


@dataclass(frozen=True, kw_only=True)
class LatentSample:
    """One encoded sample.

    latent: bfloat16 (C, T, H, W), raw tokenizer output, not normalised
    text_embedding: float16 (S, D), one vector for each real token, no padding
    metadata: the fields of `build_metadata`, plus the metadata columns that the recipe keeps
    """

    key: str
    latent: torch.Tensor
    text_embedding: np.ndarray
    metadata: dict[str, Any]

    def __post_init__(self) -> None:
        if self.latent.dtype != torch.bfloat16 or self.latent.ndim != 4:
            raise ValueError(
                f"{self.key}: expected a bfloat16 latent (C, T, H, W), "
                f"got {self.latent.dtype} {tuple(self.latent.shape)}"
            )
        if self.text_embedding.dtype != np.float16 or self.text_embedding.ndim != 2:
            raise ValueError(
                f"{self.key}: expected a float16 text embedding (S, D), "
                f"got {self.text_embedding.dtype} {self.text_embedding.shape}"
            )

    def to_parts(self) -> dict[str, bytes]:
        """The bytes of each part. Equal samples give equal bytes."""
        latent_file = io.BytesIO()
        # A view would drag its whole storage (the batch it was cut from) into the file.
        torch.save(self.latent.clone(memory_format=torch.contiguous_format), latent_file)
        return {
            LATENT_PART: latent_file.getvalue(),
            TEXT_PART: pickle.dumps(np.ascontiguousarray(self.text_embedding), _PICKLE_PROTOCOL),
            METADATA_PART: json.dumps(self.metadata, ensure_ascii=False, allow_nan=False).encode(),
        }

    @classmethod
    def from_parts(cls, key: str, parts: Mapping[str, Any]) -> LatentSample:
        """The sample of *decoded* parts: tensor or array, array or tensor, dict.

        Accepts the layouts of other writers, see the module's docstring. Missing metadata is derived
        from the latent as far as it can be (see `derived_metadata`).

        Raises:
            ValueError: a part is missing or has an impossible shape, or the key is none; the message names the key.
        """
        if key.startswith("/") or ".." in key.split("/"):
            raise ValueError(f"{key}: a key can't lead out of a folder")
        latent = torch.as_tensor(_part(parts, LATENT_PART, key)).to(torch.bfloat16)
        if latent.ndim == 5 and latent.shape[0] == 1:
            latent = latent[0]
        text = _real_tokens(_part(parts, TEXT_PART, key), key)
        metadata = _part(parts, METADATA_PART, key, default={})
        if not isinstance(metadata, Mapping):
            raise ValueError(f"{key}: expected a json object, got {type(metadata).__name__}")
        metadata = dict(metadata)
        if latent.ndim == 4:
            for name, value in derived_metadata(latent, text).items():
                if metadata.get(name) is None:  # also of what is there, but null
                    metadata[name] = value
        return cls(key=key, latent=latent, text_embedding=text, metadata=metadata)


def build_metadata(
    *,
    caption: str,
    image_height: int,
    image_width: int,
    height: int,
    width: int,
    num_frames: int,
    framerate: float | None,
    num_text_tokens: int,
    source_file: str,
    source_row: int,
    extra: Mapping[str, Any],
    start_seconds: float | None = None,
    end_seconds: float | None = None,
    mirrored: bool | None = None,
) -> dict[str, Any]:
    """The json part of a sample.

    Args:
        caption: as the process function gave it, also where its tokens were cut.
        image_height, image_width: pixels of the source, before it was resized.
        height, width: pixels of the frames that were encoded.
        num_frames: frames that were encoded; 1 for a picture.
        framerate: frames per second of the encoded frames; None for a picture.
        num_text_tokens: rows of the text embedding.
        source_file, source_row: where the row stood: parquet file, row within it.
        extra: the metadata columns that the recipe keeps.
        start_seconds, end_seconds: where in its video the clip begins and ends, from the video's first frame; left
            out where None, as of a sample that is no clip of several.
        mirrored: whether the frames were mirrored, left to right; left out where None, as in runs without mirrored
            copies.
    """
    optional = {"start_seconds": start_seconds, "end_seconds": end_seconds, "mirrored": mirrored}
    return {
        "caption": caption,
        "image_height": image_height,
        "image_width": image_width,
        "height": height,
        "width": width,
        "aspect_ratio": round(width / height, 6),
        "resolution": f"{width}x{height}",
        "num_frames": num_frames,
        "framerate": framerate,
        "num_text_tokens": num_text_tokens,
        "source_file": source_file,
        "source_row": source_row,
        **{name: value for name, value in optional.items() if value is not None},
        **extra,
    }


RESERVED_FIELDS = frozenset(
    build_metadata(
        caption="",
        image_height=1,
        image_width=1,
        height=1,
        width=1,
        num_frames=1,
        framerate=None,
        num_text_tokens=1,
        source_file="",
        source_row=0,
        extra={},
        start_seconds=0.0,
        end_seconds=0.0,
        mirrored=False,
    )
)
"""Metadata fields that a column of the user's can't take."""


def derived_metadata(latent: torch.Tensor, text_embedding: np.ndarray) -> dict[str, Any]:
    """What a latent alone tells of its source, for datasets written without metadata.

    Assumes the compression that DiT recipes use most: 8 in space. The number of pixel frames can't be
    told from a latent (4 and 8 are both in use), so only a picture's, 1, is given.
    """
    _, frames, height, width = latent.shape
    derived: dict[str, Any] = {
        "image_height": height * 8,
        "image_width": width * 8,
        "height": height * 8,
        "width": width * 8,
        "num_text_tokens": len(text_embedding),
    }
    return derived | {"num_frames": 1} if frames == 1 else derived


_REQUIRED = object()


def _part(parts: Mapping[str, Any], name: str, key: str, default: Any = _REQUIRED) -> Any:
    for candidate in (name, f".{name}"):
        if candidate in parts:
            return parts[candidate]
    if default is _REQUIRED:
        present = sorted(part for part in parts if not part.startswith("__"))
        raise ValueError(f"{key}: no part {name!r}, only {present}")
    return default


def _real_tokens(embedding: Any, key: str) -> np.ndarray:
    """float16 (S, D) without the zero rows that other writers pad with."""
    if isinstance(embedding, torch.Tensor):
        embedding = embedding.float().numpy()
    embedding = np.asarray(embedding)
    if embedding.ndim == 3 and embedding.shape[0] == 1:
        embedding = embedding[0]
    if embedding.ndim != 2 or embedding.dtype.kind != "f":
        raise ValueError(f"{key}: expected a text embedding (S, D) of floats, got {embedding.dtype} {embedding.shape}")
    embedding = embedding.astype(np.float16, copy=False)
    # A real token's embedding is never all zero, padding always is; only the tail is cut.
    tail = len(embedding)
    while tail > 0 and not embedding[tail - 1].any():
        tail -= 1
    return embedding[:tail]


def all_finite(values: torch.Tensor | np.ndarray) -> bool:
    """True if nothing is NaN or infinite: either spoils the largest magnitude."""
    return math.isfinite(largest_magnitude(values))


def largest_magnitude(values: torch.Tensor | np.ndarray) -> float:
    """The largest absolute value; infinite or NaN if any value is; 0 where there are none.

    The bits of floats are ordered as their magnitudes are, and comparing whole numbers of 16 bits is several times
    faster than anything that computes with halves.
    """
    if values.dtype not in _HALVES or (isinstance(values, torch.Tensor) and values.device.type != "cpu"):
        tensor = torch.as_tensor(values)
        return tensor.abs().max().item() if tensor.numel() else 0.0
    bits = values.detach().view(torch.int16).numpy() if isinstance(values, torch.Tensor) else values.view(np.int16)
    if bits.size == 0:
        return 0.0
    # With a sign bit that counts, the largest number is the largest positive value; with one that is the
    # highest bit, it is the negative value that is farthest from 0.
    maximum = np.maximum.reduce  # what bits.max() calls, which takes twice as long for a picture's latent
    positive, negative = int(maximum(bits, None)), int(maximum(bits.view(np.uint16), None)) & 0x7FFF
    largest = max(positive, negative)
    if values.dtype == torch.bfloat16:
        return struct.unpack("<f", struct.pack("<I", largest << 16))[0]
    return struct.unpack("<e", struct.pack("<H", largest))[0]


_HALVES = (torch.bfloat16, torch.float16, np.dtype(np.float16))
