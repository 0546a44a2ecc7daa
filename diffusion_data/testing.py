"""A tiny real dataset on disk, in some tens of milliseconds, for tests of what trains on one.

    path = write_dataset(tmp_path / "dataset", tiny_samples(8), split={"train": 6, "val": 1, "test": 1})
    DiffusionDataModule(path, ...)

It goes through energon's own preparation; only the tokenizer and the text encoder have no part in it. The same as
pytest fixtures: `diffusion_data.pytest_plugin`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from megatron.energon.epathlib import EPath
from megatron.energon.flavors import BaseWebdatasetFactory

from diffusion_data.latent_sample import EMPTY_CAPTION_FILE, LatentSample, build_metadata, sample_key

DATASET_YAML = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
LATENT_SHAPES = ((4, 1, 4, 4), (4, 1, 4, 8), (4, 3, 4, 4))
EMPTY_CAPTION_VALUE = -1.0

_SPATIAL_COMPRESSION, _TEMPORAL_COMPRESSION = 8, 4


def tiny_sample(
    row: int,
    latent_shape: Sequence[int] = LATENT_SHAPES[0],
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
            image_height=height * _SPATIAL_COMPRESSION + 1,
            image_width=width * _SPATIAL_COMPRESSION + 1,
            height=height * _SPATIAL_COMPRESSION,
            width=width * _SPATIAL_COMPRESSION,
            num_frames=1 + _TEMPORAL_COMPRESSION * (frames - 1),
            framerate=framerate,
            num_text_tokens=tokens,
            source_file="sample.parquet",
            source_row=row,
            extra=extra,
        ),
    )


def tiny_samples(number: int, latent_shapes: Sequence[Sequence[int]] = LATENT_SHAPES) -> list[LatentSample]:
    """Samples of these shapes by turns, with texts of 1 to 4 tokens."""
    samples = []
    for row in range(number):
        shape = latent_shapes[row % len(latent_shapes)]
        samples.append(tiny_sample(row, shape, tokens=1 + row % 4, framerate=None if shape[1] == 1 else 12.0))
    return samples


def write_dataset(
    folder: Path,
    samples: Sequence[LatentSample],
    per_shard: int = 4,
    split: Mapping[str, float] | None = None,
    with_stats: bool = True,
) -> Path:
    """A prepared dataset of `samples`; `split`: name -> share of the shards. Returns `folder`, which must be new."""
    write_raw_dataset(folder, {s.key: s.to_parts() for s in samples}, per_shard, split)
    if with_stats:
        (folder / "run").mkdir()
        (folder / "run" / "stats.json").write_text(json.dumps(_stats(samples)))
        empty = np.full((1, samples[0].text_embedding.shape[1]), EMPTY_CAPTION_VALUE, np.float16)
        (folder / EMPTY_CAPTION_FILE).write_bytes(pickle.dumps(empty, protocol=5))
    return folder


def write_raw_dataset(
    folder: Path,
    parts_of: Mapping[str, Mapping[str, bytes]],
    per_shard: int = 4,
    split: Mapping[str, float] | None = None,
) -> Path:
    """A prepared dataset of whatever bytes: key -> part name -> content."""
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


def _stats(samples: Sequence[LatentSample]) -> dict[str, Any]:
    """As much of run/stats.json as training reads."""
    shapes = Counter(tuple(sample.latent.shape) for sample in samples)
    stats: dict[str, Any] = {"latent_shapes": [[*shape, count] for shape, count in shapes.items()]}
    if len({shape[0] for shape in shapes}) == 1:
        positions = torch.cat([sample.latent.double().flatten(1) for sample in samples], dim=1)
        stats["latent_mean"] = positions.mean(1).tolist()
        stats["latent_std"] = positions.std(1, correction=0).tolist()
    return stats
