"""Finished shards -> `.nv-meta/`: energon's index, the splits, dataset.yaml.

energon's own API indexes the tars. The splits are ours, since energon cuts by cumulative ratio and leaves a
small dataset's splits empty. dataset.yaml is written last: a dataset that has it is complete.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from diffusion_data.distributed import usable_cpus
from diffusion_data.durable_file import durable_file
from diffusion_data.process_server import process_context
from diffusion_data.shard_plan import assign_splits

META_FOLDER = ".nv-meta"
_INDEXERS = 16  # processes at most: beyond, the one that fills the sqlite file is the limit

DATASET_YAML = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}


def write_energon_metadata(
    dataset: Path, file_names: Sequence[str], split_ratio: Sequence[float], seed: int
) -> dict[str, list[str]]:
    """Make `.nv-meta` from clean for the shards `file_names`; returns the files of each split.

    Raises:
        UserError: fewer shards than splits asked for.
        RuntimeError: energon could not index a shard.
    """
    splits = assign_splits(file_names, split_ratio, seed)
    folder = dataset / META_FOLDER
    if folder.exists():  # half-made metadata would make energon fail
        shutil.rmtree(folder)
    _index(dataset, file_names)
    _write_yaml(folder / "split.yaml", {"exclude": [], "split_parts": splits})
    _write_yaml(folder / "dataset.yaml", DATASET_YAML)
    return splits


def _write_yaml(path: Path, value: object) -> None:
    with durable_file(path) as file:
        file.write(yaml.safe_dump(value, sort_keys=False).encode())


def _index(dataset: Path, file_names: Sequence[str]) -> None:
    """Run energon's indexer in a process of its own.

    It forks workers, which a process with CUDA and threads must not, and it prints and exits as it likes.
    """
    with tempfile.NamedTemporaryFile("r", suffix=".log") as log:
        process = process_context().Process(target=_index_in_process, args=(str(dataset), list(file_names), log.name))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"energon could not index {dataset}: {log.read().strip()[-2000:]}")


def _index_in_process(dataset: str, file_names: list[str], log_path: str) -> None:
    log = os.open(log_path, os.O_WRONLY)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    from megatron.energon import BaseWebdatasetFactory
    from megatron.energon.epathlib import EPath

    BaseWebdatasetFactory.prepare_dataset(
        EPath(dataset),
        file_names,
        split_parts_ratio=[("train", 1.0)],  # a split file is expected; ours replaces it
        shuffle_seed=None,
        workers=min(_INDEXERS, usable_cpus(), len(file_names)),
    )
