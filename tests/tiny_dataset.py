"""A tiny dataset on disk, made with energon's own preparation; the offline half has no part in it."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from megatron.energon.epathlib import EPath
from megatron.energon.flavors import BaseWebdatasetFactory

from diffusion_data.latent_sample import LatentSample, build_metadata, sample_key

DATASET_YAML = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"


def tiny_sample(
    row: int,
    latent_shape: Sequence[int] = (4, 1, 4, 4),
    tokens: int = 3,
    text_dim: int = 8,
    framerate: float | None = None,
    **extra: Any,
) -> LatentSample:
    """A sample whose values can be computed: latent counts up from `row`, text is row + 1 everywhere."""
    _, frames, height, width = latent_shape
    count = int(np.prod(latent_shape))
    return LatentSample(
        key=sample_key(row),
        latent=(torch.arange(count) % 64 + row).reshape(*latent_shape).to(torch.bfloat16),
        text_embedding=np.full((tokens, text_dim), row + 1, dtype=np.float16),
        metadata=build_metadata(
            caption=f"caption {row}",
            image_height=height * 8 + 1,
            image_width=width * 8 + 1,
            height=height * 8,
            width=width * 8,
            num_frames=1 + 4 * (frames - 1),
            framerate=framerate,
            num_text_tokens=tokens,
            source_file="sample.parquet",
            source_row=row,
            extra=extra,
        ),
    )


def write_dataset(
    folder: Path,
    samples: Sequence[LatentSample],
    per_shard: int = 4,
    split: Mapping[str, float] | None = None,
    with_stats: bool = True,
) -> Path:
    """A prepared dataset of `samples`."""
    write_raw_dataset(folder, {s.key: s.to_parts() for s in samples}, per_shard, split)
    if with_stats:
        shapes: dict[tuple[int, ...], int] = {}
        for sample in samples:
            shapes[tuple(sample.latent.shape)] = shapes.get(tuple(sample.latent.shape), 0) + 1
        (folder / "run").mkdir()
        stats = {"latent_shapes": [[*shape, count] for shape, count in shapes.items()]}
        (folder / "run" / "stats.json").write_text(json.dumps(stats))
    return folder


def write_raw_dataset(
    folder: Path,
    parts_of: Mapping[str, Mapping[str, bytes]],
    per_shard: int = 4,
    split: Mapping[str, float] | None = None,
) -> Path:
    """A prepared dataset of whatever bytes."""
    folder.mkdir(parents=True)
    keys = list(parts_of)
    shards = []
    for first in range(0, len(keys), per_shard):
        shards.append(f"shard_{first // per_shard:06d}.tar")
        with webdataset.TarWriter(str(folder / shards[-1]), mtime=0, encoder=False) as tar:
            for key in keys[first : first + per_shard]:
                tar.write({"__key__": key, **parts_of[key]})
    ratio = split or {"train": 1.0, "val": 0.0, "test": 0.0}
    with (
        contextlib.redirect_stdout(io.StringIO()),
        open(os.devnull, "w") as quiet,
        contextlib.redirect_stderr(quiet),
    ):
        BaseWebdatasetFactory.prepare_dataset(
            EPath(str(folder)), shards, split_parts_ratio=list(ratio.items()), shuffle_seed=None, workers=1
        )
    (folder / ".nv-meta" / "dataset.yaml").write_text(DATASET_YAML)
    return folder
