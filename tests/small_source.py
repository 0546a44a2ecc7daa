"""A small parquet of pictures and clips for the tests, and the configuration to prepare it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffusion_data.batching import BatchingConfig
from diffusion_data.media import MediaConfig
from diffusion_data.prepare_config import PrepareConfig, TextEncoderConfig, TokenizerConfig
from diffusion_data.sources import SourceConfig


def picture_bytes(seed: int, height: int = 48, width: int = 64) -> bytes:
    """A PNG: what is decoded is exactly what was drawn."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.repeat(8, 0).repeat(8, 1)).save(file, "PNG")
    return file.getvalue()


def clip_bytes(seed: int, num_frames: int = 9, fps: int = 8) -> bytes:
    file = io.BytesIO()
    base = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.roll(base, number, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def source_rows(num_rows: int) -> list[dict[str, Any]]:
    """Pictures of two shapes, every seventh row a clip; captions of different lengths, some of them twice."""
    rows = []
    for number in range(num_rows):
        width = 64 if number % 3 else 48
        media = clip_bytes(number) if number % 7 == 3 else picture_bytes(number, width=width)
        caption = f"picture {'very ' * (number % 5)}nice"
        rows.append({"media": {"bytes": media, "path": None}, "caption": caption, "score": number / 10})
    return rows


def write_source(path: Path, rows: list[dict[str, Any]], row_group_size: int = 5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def prepare_config(source: Path, output_dir: Path, **options: Any) -> PrepareConfig:
    """The defaults of the tests: short side 48, four rows a shard, no worker processes."""
    defaults: dict[str, Any] = {
        "output_dir": str(output_dir),
        "source": SourceConfig(path=str(source)),
        "process_func": {"_target_": "diffusion_data.process_funcs.media_caption"},
        "metadata_columns": ("score",),
        "samples_per_shard": 4,
        "split_ratio": (1, 0, 0),
        "num_workers": 0,
        "row_timeout_seconds": None,
        "encode_threads": 0,
        "seed": 0,
        "max_reject_rate": 0.05,
        "verify": "size",
        "report": False,
        "plan": False,
        "plan_gpus": None,
        "plan_price": None,
        "empty_captions": "reject",
        "retry_rejected": None,
        "media": MediaConfig(short_side=48),
        "tokenizer": TokenizerConfig(name="tiny-cosmos"),
        "text_encoder": TextEncoderConfig(name="tiny-t5"),
        "batching": BatchingConfig(),
        "device": "cpu",
    }
    return PrepareConfig(**{**defaults, **options})
