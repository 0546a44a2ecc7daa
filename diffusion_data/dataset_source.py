"""`data.path` -> the checked dataset folders behind it, and what energon is to open.

    folder                                   one dataset
    blend.yaml                               energon's MetadatasetV2: splits, each one dataset or a blend of several
    [{path: folder, weight: 3}, ...]         a blend of train splits by weight; val and test splits one after another

Paths may be msc://profile/path. A metadataset may name datasets, weights, repetitions, subsets and subflavors, and
nothing else: energon would import and call whatever it names.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.energon import WorkerConfig
from megatron.energon.epathlib import EPath
from megatron.energon.flavors import EmptyDatasetError
from megatron.energon.metadataset import load_dataset
from megatron.energon.metadataset.loader_interface import LoadedDatasetList

from diffusion_data.dataset_folder import (
    DatasetFolder,
    check_dataset,
    check_subflavors,
    read_plain_mapping,
    read_stats,
)
from diffusion_data.errors import UserError

DataPath = str | os.PathLike[str] | Sequence[Mapping[str, Any]]

_METADATASET = {"__module__": "megatron.energon", "__class__": "MetadatasetV2"}
_PART_FIELDS = {"path", "weight", "subflavors"}
_REFERENCE_FIELDS = {"path", "split_part", "subflavors", "shuffle_over_epochs_multiplier", "subset"}
_BLENDS = {"blend": "weight", "blend_epochized": "repetitions"}
_DEEPEST = 8  # metadatasets that name metadatasets


@dataclass(frozen=True, kw_only=True)
class SplitPart:
    """A dataset's share in a split.

    size: samples of its shards.  used: the range of them that a subset leaves.  repetitions: in one pass
    """

    size: int
    used: tuple[int, int]
    repetitions: float


@dataclass(frozen=True, kw_only=True)
class DatasetSource:
    """What `data.path` names, checked."""

    name: str
    """For messages."""
    spec: EPath | dict[str, Any]
    """What energon's load_dataset takes."""
    folders: tuple[DatasetFolder, ...]
    """Each dataset once, however often a blend names it."""
    train_folders: tuple[DatasetFolder, ...]
    """Those of `folders` that the train split is made of."""
    identity: str
    """Equal for copies of the same datasets in the same blend."""

    def parts(self, split: str) -> list[SplitPart]:
        """The datasets of a split, in energon's order; an empty list if there is no such split."""
        if isinstance(self.spec, EPath) and len(self.folders) == 1 and self.spec == self.folders[0].path:
            size = self.folders[0].samples.get(split, 0)
            return [SplitPart(size=size, used=(0, size), repetitions=1)] if size else []
        loaded = self._load(split)
        return [_split_part(each) for each in loaded.datasets] if loaded else []

    def samples(self, split: str) -> int:
        """Samples of one pass over a split."""
        return sum(int((part.used[1] - part.used[0]) * part.repetitions) for part in self.parts(split))

    def latent_shapes(self) -> list[tuple[list[int], int]] | None:
        """Of the train split's datasets, (C, T, H, W) and the number of samples that have it; None where a dataset's
        writer left no stats.json.
        """
        shapes = []
        for folder in self.train_folders:
            listed = (read_stats(folder) or {}).get("latent_shapes")
            if not listed:
                return None
            shapes += [(list(shape[:4]), int(shape[4])) for shape in listed]
        return shapes

    def _load(self, split: str) -> LoadedDatasetList | None:
        loader = load_dataset(self.spec)
        if split not in loader.splits:
            return None
        config = WorkerConfig(rank=0, world_size=1, num_workers=0)
        try:
            return loader.get_datasets(training=False, split_part=split, worker_config=config)
        except EmptyDatasetError as error:
            raise UserError(f"{self.name}: a dataset of its split {split!r} has no such split ({error})") from error


def open_source(path: DataPath) -> DatasetSource:
    """Check everything that `path` names.

    Raises:
        UserError: something is missing or forbidden; the message names the dataset or file and what to do.
    """
    if not isinstance(path, str | os.PathLike):
        return _blend_of_list(path)
    if str(path).endswith(".yaml"):
        file = _epath(path)
        texts: list[str] = []
        splits = _check_metadataset(file, texts, 1)
        folders = [folder for listed in splits.values() for folder in listed]
        return DatasetSource(
            name=str(path),
            spec=file,
            folders=_each_once(folders),
            train_folders=_each_once(splits.get("train", [])),
            identity=_digest([*texts, *(folder.identity for folder in folders)]),
        )
    folder = check_dataset(path)
    return DatasetSource(
        name=str(path), spec=folder.path, folders=(folder,), train_folders=(folder,), identity=folder.identity
    )


def _each_once(folders: Sequence[DatasetFolder]) -> tuple[DatasetFolder, ...]:
    return tuple({str(folder.path): folder for folder in folders}.values())


def _blend_of_list(parts: Sequence[Mapping[str, Any]]) -> DatasetSource:
    if not parts or not all(isinstance(part, Mapping) and "path" in part for part in parts):
        raise UserError("data.path must be a dataset folder, a metadataset yaml, or a list of {path, weight}")
    folders, references = [], []
    for part in parts:
        if unknown := sorted(map(str, part.keys() - _PART_FIELDS)):
            raise UserError(f"data.path: a dataset of a blend takes path, weight and subflavors, not {unknown[0]}")
        folder = check_dataset(part["path"])
        subflavors = check_subflavors(part.get("subflavors"), "data.path")
        weight = _positive(part.get("weight", 1.0), "weight", f"data.path: {part['path']}")
        folders.append(folder)
        references.append({"path": str(folder.path), "weight": weight, "subflavors": subflavors})
    splits = {}
    for split in dict.fromkeys(name for folder in folders for name in folder.samples):
        # A dataset that lacks a split takes no part in it.
        blend = [part for part, folder in zip(references, folders, strict=True) if folder.samples.get(split)]
        if blend:
            splits[split] = {"blend": blend}
    identity = _digest(
        [
            [folder.identity, part["weight"], part["subflavors"]]
            for folder, part in zip(folders, references, strict=True)
        ]
    )
    return DatasetSource(
        name=" + ".join(str(part["path"]) for part in parts),
        spec={**_METADATASET, "splits": splits},
        folders=_each_once(folders),
        train_folders=_each_once([folder for folder in folders if folder.samples.get("train")]),
        identity=identity,
    )


def _check_metadataset(file: EPath, texts: list[str], depth: int) -> dict[str, list[DatasetFolder]]:
    """The dataset folders of each split of a metadataset, in the order in which it names them.

    texts: gets what stands in it, and in each metadataset that it names
    """
    if depth > _DEEPEST:
        raise UserError(f"{file}: metadatasets lie more than {_DEEPEST} deep in each other")
    if not file.is_file():
        raise UserError(f"{file} does not exist")
    fields = read_plain_mapping(file, allowed={*_METADATASET, "splits"})
    texts.append(file.read_text())
    if {name: fields.get(name) for name in _METADATASET} != _METADATASET:
        raise UserError(
            f"{file}: a metadataset has the lines `__module__: megatron.energon`, `__class__: MetadatasetV2`"
        )
    splits = fields.get("splits")
    if not isinstance(splits, dict) or not splits or not all(isinstance(split, dict) for split in splits.values()):
        raise UserError(f"{file}: splits must map train, val or test to a dataset or a blend")
    return {name: _check_split(split, name, file, texts, depth) for name, split in splits.items()}


def _check_split(split: dict[str, Any], name: str, file: EPath, texts: list[str], depth: int) -> list[DatasetFolder]:
    kinds = [kind for kind in _BLENDS if kind in split]
    if not kinds:
        return _check_reference(split, name, None, file, texts, depth)
    kind = kinds[0]
    _refuse_others(split, {kind, "subset"}, file)
    _check_subset(split.get("subset"), file)
    if not isinstance(split[kind], list) or not split[kind]:
        raise UserError(f"{file}: {kind} must be a list of datasets")
    folders: list[DatasetFolder] = []
    for reference in split[kind]:
        if not isinstance(reference, dict):
            raise UserError(f"{file}: {kind} must be a list of datasets")
        folders += _check_reference(reference, name, _BLENDS[kind], file, texts, depth)
    return folders


def _check_reference(
    reference: dict[str, Any], split: str, share: str | None, file: EPath, texts: list[str], depth: int
) -> list[DatasetFolder]:
    _refuse_others(reference, _REFERENCE_FIELDS | ({share} if share else set()), file)
    path = reference.get("path")
    if not isinstance(path, str) or not isinstance(reference.get("split_part", ""), str):
        raise UserError(f"{file}: each dataset needs a path, and split_part is a name")
    check_subflavors(reference.get("subflavors"), str(file))
    _check_subset(reference.get("subset"), file)
    multiplier = reference.get("shuffle_over_epochs_multiplier", 1)
    if not isinstance(multiplier, int | None):
        raise UserError(f"{file}: shuffle_over_epochs_multiplier must be a whole number, got {multiplier!r}")
    if share in reference:
        _positive(reference[share], share, f"{file}: {path}")
    target = file.parent / path
    if target.is_file() and str(target).endswith(".yaml"):
        return _check_metadataset(target, texts, depth + 1).get(reference.get("split_part", split), [])
    return [check_dataset(str(target))]


def _refuse_others(fields: dict[str, Any], allowed: set[str], file: EPath) -> None:
    if forbidden := sorted(map(str, fields.keys() - allowed)):
        raise UserError(
            f"{file} holds {', '.join(forbidden)}; here a metadataset may have only {', '.join(sorted(allowed))}"
        )


def _check_subset(subset: Any, file: EPath) -> None:
    if subset is None:
        return
    plain = isinstance(subset, dict) and subset.keys() == {"range"} and isinstance(subset["range"], list)
    if not plain or not all(isinstance(end, str | int) for end in subset["range"]):
        raise UserError(f"{file}: subset must be {{range: [begin, end]}}, numbers of samples or percentages")


def _positive(value: Any, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise UserError(f"{where}: {name} must be a number above 0, got {value!r}")
    return float(value)


def _split_part(loaded: Any) -> SplitPart:
    size = len(loaded.dataset)
    used = loaded.dataset._compute_subset(size, loaded.dataset.subset)
    return SplitPart(size=size, used=used, repetitions=loaded.repetitions or 1)


def _epath(path: str | os.PathLike[str]) -> EPath:
    try:
        return EPath(os.fspath(path))
    except (ValueError, AssertionError) as error:
        raise UserError(f"{path}: {error}") from error


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
