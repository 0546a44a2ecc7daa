"""Models of any size with random weights, and drawn rows of media with captions: what bench_prepare.py measures on."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from drawn_scenes import draw, random_scene
from make_sample_data import encode_clip
from PIL import Image

from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.encoders import Encoders
from diffusion_data.t5_text_encoder import T5TextEncoder

SMALL_COSMOS = "small-cosmos"
T5_SIZES: dict[str, dict[str, Any]] = {
    "small-t5": {"d_model": 256, "d_kv": 64, "d_ff": 1024, "num_heads": 4, "num_layers": 6},
    "t5-base": {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_heads": 12, "num_layers": 12},
    "t5-large": {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_heads": 16, "num_layers": 24},
    "t5-3b": {"d_model": 1024, "d_kv": 128, "d_ff": 16384, "num_heads": 32, "num_layers": 24},
    "t5-11b": {"d_model": 1024, "d_kv": 128, "d_ff": 65536, "num_heads": 128, "num_layers": 24},
}
_T5_VOCABULARY = 32128
_DRAWINGS = 64  # rows repeat them: drawing is slower than what is measured
_WORDS = tuple(
    re.findall(
        r"\w+",
        "a red green blue yellow orange purple bright large small round circle square triangle star cross ring "
        "standing before behind beside above below in on of the and with sea night hills striped background "
        "photograph painting watercolour illustration crowded empty gradient chequered landscape",
    )
)


@dataclass(frozen=True, kw_only=True)
class Material:
    """What to draw: pixels are of a square side; num_frames 1 is a JPEG, more an mp4; words of a caption."""

    pixels: int
    num_frames: int
    fewest_words: int
    most_words: int


def make_encoders(
    tokenizer: str, text_encoder: str, random_weights: bool, device: torch.device, dtype: torch.dtype | None
) -> Encoders:
    """By name as the job takes them, or of a named size with random weights."""
    if not random_weights:
        return Encoders(
            tokenizer=CosmosTokenizer.from_pretrained(tokenizer, device=device, dtype=dtype, decoder=False),
            text_encoder=T5TextEncoder.from_pretrained(text_encoder, device=device, dtype=dtype),
        )
    return Encoders(
        tokenizer=_random_tokenizer(tokenizer, device, dtype), text_encoder=_random_t5(text_encoder, device, dtype)
    )


def _random_tokenizer(name: str, device: torch.device, dtype: torch.dtype | None) -> CosmosTokenizer:
    from diffusers import AutoencoderKLCosmos

    if name != SMALL_COSMOS:
        return CosmosTokenizer.random_weights(name, device, dtype)
    config: dict[str, Any] = {
        "encoder_block_out_channels": (32, 64, 128, 128),
        "decode_block_out_channels": (1, 1, 1, 1),
        "latents_mean": None,
        "latents_std": None,
    }
    torch.manual_seed(0)
    return CosmosTokenizer(AutoencoderKLCosmos(**config), f"random-{name}", [], device, dtype)


def _random_t5(name: str, device: torch.device, dtype: torch.dtype | None) -> T5TextEncoder:
    from transformers import T5Config, T5EncoderModel

    feed_forward = "relu"  # of the first T5, which t5-11b is
    config = T5Config(vocab_size=_T5_VOCABULARY, feed_forward_proj=feed_forward, **T5_SIZES[name])
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32))
    try:
        with device:  # made where it will be used: t5-11b is 20 GB in float32
            model = T5EncoderModel(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    return T5TextEncoder(_word_tokenizer(), model, name=f"random-{name}", max_length=512, weight_files=[])


def _word_tokenizer() -> Any:
    """About 1.3 tokens a word, as T5's own has for English: long words are two."""
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "▁"]
    for word in _WORDS:
        pieces += [f"▁{word}"] if len(word) < 8 else [f"▁{word[:5]}", word[5:]]
    return T5Tokenizer(vocab=[(piece, -1.0) for piece in dict.fromkeys(pieces)], extra_ids=0)


def write_rows(path: Path, num_rows: int, material: Material) -> None:
    """A parquet with columns media {bytes, path} and caption."""
    rng = np.random.default_rng(0)
    drawings = [_drawing(rng, material) for _ in range(min(num_rows, _DRAWINGS))]
    schema = pa.schema({"media": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "caption": pa.string()})
    with pq.ParquetWriter(path, schema) as writer:
        for rows in _chunks(num_rows, drawings, rng, material):
            writer.write_table(pa.Table.from_pylist(rows, schema))


def _chunks(
    num_rows: int, drawings: list[bytes], rng: np.random.Generator, material: Material, size: int = 1000
) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, num_rows, size):
        yield [
            {"media": {"bytes": drawings[row % len(drawings)], "path": None}, "caption": _caption(rng, material)}
            for row in range(start, min(start + size, num_rows))
        ]


def _caption(rng: np.random.Generator, material: Material) -> str:
    return " ".join(rng.choice(_WORDS, rng.integers(material.fewest_words, material.most_words + 1)))


def _drawing(rng: np.random.Generator, material: Material) -> bytes:
    scene = random_scene(rng, num_shapes=2)
    frames = draw(scene, height=material.pixels, width=material.pixels, num_frames=material.num_frames)
    if material.num_frames > 1:
        return encode_clip(frames, fps=8)
    file = io.BytesIO()
    Image.fromarray(frames[0]).save(file, "JPEG", quality=90)
    return file.getvalue()
