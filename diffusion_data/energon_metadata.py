"""Finished shards -> `.nv-meta/` and `shard_000000.tar.idx`: energon's index, the splits, dataset.yaml.

energon's own API indexes the tars. The splits are ours, since energon cuts by cumulative ratio and leaves a
small dataset's splits empty.

It works in a folder of its own, of links to the shards, and what it made is moved to its place when it is complete
and on disk: a dataset that has `.nv-meta` is complete, and an indexer that outlives a killed run disturbs nobody.
`run/metadata.json` lists the files, and the shards that they tell of, with their checksums, so that a later start can
tell whether they still hold.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from pathlib import Path

import yaml

from diffusion_data.distributed import usable_cpus
from diffusion_data.durable_file import (
    durable_file,
    flush_file,
    flush_folder,
    partial_name,
    read_plain_file,
    remove_file,
    remove_folder,
    sha256_of_file,
    size_of_plain_file,
    write_json,
)
from diffusion_data.process_server import process_context
from diffusion_data.shard_plan import assign_splits

META_FOLDER = ".nv-meta"
_INDEX_SUFFIX = ".idx"
_INDEXERS = 16  # processes at most: beyond, the one that fills the sqlite file is the limit

_FLUSHERS = 16  # files at a time: a flush is all waiting

DATASET_YAML = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}


def write_energon_metadata(
    dataset: Path,
    file_names: Sequence[str],
    split_ratio: Sequence[float],
    seed: int,
    written: Mapping[str, int] | None = None,
) -> dict[str, list[str]]:
    """Make `.nv-meta` from clean for the shards `file_names`; returns the files of each split.

    written: samples that each shard should have

    Raises:
        UserError: fewer shards than splits asked for.
        RuntimeError: energon could not index a shard, or found another number of samples in it.
    """
    splits = assign_splits(file_names, split_ratio, seed)
    remove_energon_metadata(dataset)
    workshop = partial_name(dataset / META_FOLDER)
    workshop.mkdir()
    try:
        for name in file_names:
            (workshop / name).symlink_to(Path("..", name))
        _index(workshop, file_names)
        if written is not None:
            _compare_counts(workshop / META_FOLDER, written)
        # Energon 5.2, which NeMo 2.7 asks for, looks for this name. JSON is YAML.
        shutil.copyfile(workshop / META_FOLDER / ".info.json", workshop / META_FOLDER / ".info.yaml")
        _write_yaml(workshop / META_FOLDER / "split.yaml", {"exclude": [], "split_parts": splits})
        _write_yaml(workshop / META_FOLDER / "dataset.yaml", DATASET_YAML)
        _move_into_place(workshop, dataset, file_names)
    except BaseException:  # raised again; the next start clears what can't be removed now
        shutil.rmtree(workshop, ignore_errors=True)
        raise
    shutil.rmtree(workshop)
    return splits


def remove_energon_metadata(dataset: Path) -> None:
    """Before a shard changes, and before the metadata is made anew: what is there must not be taken for complete."""
    remove_file(_record_path(dataset))
    remove_folder(dataset / META_FOLDER)
    for index in dataset.glob(f"shard_*.tar{_INDEX_SUFFIX}"):
        index.unlink()


def record_metadata(dataset: Path, shards: Mapping[str, str]) -> None:
    """List what `write_energon_metadata` made in `run/metadata.json`. shards: sha256 of each, as in the ledger."""
    made = [*(f"{META_FOLDER}/{name}" for name in os.listdir(dataset / META_FOLDER)), *map(_index_name, shards)]
    with ThreadPoolExecutor(_FLUSHERS) as readers:
        digests = readers.map(lambda name: sha256_of_file(dataset / name), made)
        sha256 = {**shards, **dict(zip(made, digests, strict=True))}
    files = {name: {"num_bytes": size_of_plain_file(dataset / name), "sha256": sha256[name]} for name in sorted(sha256)}
    write_json(_record_path(dataset), files)


def metadata_faults(dataset: Path, shards: Mapping[str, str], full: bool) -> list[str] | None:
    """What of the metadata isn't as it was recorded, each a line; None if there is no record of just these shards.

    shards: sha256 of each, as in the ledger: that their files have it is not looked at here
    full: compare checksums too, not only sizes
    """
    if size_of_plain_file(_record_path(dataset)) is None:
        return None
    try:
        recorded = json.loads(read_plain_file(_record_path(dataset)))
        expected = {name: (file["num_bytes"], file["sha256"]) for name, file in recorded.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    beside = {name: digest for name, (_, digest) in expected.items() if not name.startswith(META_FOLDER)}
    if set(beside) != {*shards, *map(_index_name, shards)} or any(beside[name] != shards[name] for name in shards):
        return None
    folder = dataset / META_FOLDER
    if folder.is_symlink() or not folder.is_dir():
        return [f"{META_FOLDER}: missing, or not a folder"]
    faults = []
    for name in sorted({*expected, *(f"{META_FOLDER}/{each}" for each in os.listdir(folder))} - set(shards)):
        size = size_of_plain_file(dataset / name)
        if name not in expected:
            faults.append(f"{name}: not of this dataset's metadata")
        elif size is None:
            faults.append(f"{name}: missing, or not a plain file")
        elif size != expected[name][0]:
            faults.append(f"{name}: {size} bytes, {expected[name][0]} were written")
        elif full and sha256_of_file(dataset / name) != expected[name][1]:
            faults.append(f"{name}: other bytes than were written")
    return faults


def _record_path(dataset: Path) -> Path:
    return dataset / "run" / "metadata.json"


def _index_name(file_name: str) -> str:
    return file_name + _INDEX_SUFFIX


def _write_yaml(path: Path, value: object) -> None:
    with durable_file(path) as file:
        file.write(yaml.safe_dump(value, sort_keys=False).encode())


def _compare_counts(folder: Path, written: Mapping[str, int]) -> None:
    """energon takes a torn tar for a shorter one, without a word."""
    found = json.loads((folder / ".info.json").read_text())["shard_counts"]
    differing = [
        f"{name}: {found.get(name)} samples, {count} were written"
        for name, count in written.items()
        if found.get(name) != count
    ]
    if differing:
        raise RuntimeError("; ".join(differing[:6]))


def _move_into_place(workshop: Path, dataset: Path, file_names: Iterable[str]) -> None:
    metadata = workshop / META_FOLDER
    indices = [workshop / _index_name(name) for name in file_names]
    with ThreadPoolExecutor(_FLUSHERS) as flushers:
        for _ in flushers.map(flush_file, [*metadata.iterdir(), *indices]):
            pass
    flush_folder(metadata)
    for index in indices:
        index.replace(dataset / index.name)
    flush_folder(dataset)
    metadata.rename(dataset / META_FOLDER)
    flush_folder(dataset)


def _index(dataset: Path, file_names: Sequence[str]) -> None:
    """Run energon's indexer in a process of its own.

    It forks workers, which a process with CUDA and threads must not, and it prints and exits as it likes.
    """
    end_of_starter, starter = process_context().Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("r", suffix=".log") as log:
        arguments = (str(dataset), list(file_names), log.name, end_of_starter)
        process = process_context().Process(target=_index_in_process, args=arguments)
        with starter:  # closed, it ends the process, should this thread be interrupted
            with end_of_starter:
                process.start()
            process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"energon could not index {dataset}: {log.read().strip()[-2000:]}")


def _index_in_process(dataset: str, file_names: list[str], log_path: str, end_of_starter: Connection) -> None:
    os.setsid()  # a group of its own, with the workers that energon forks
    threading.Thread(target=_end_with_starter, args=(end_of_starter,), daemon=True).start()
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


def _end_with_starter(end_of_starter: Connection) -> None:
    """Wait until the other end of the pipe is closed, at the latest by its process's death."""
    wait([end_of_starter])
    os.killpg(0, signal.SIGKILL)
