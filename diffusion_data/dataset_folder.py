"""A dataset folder -> how many samples each split has, checked before energon opens it.

energon builds whatever class `.nv-meta/dataset.yaml` names, with whatever arguments, python files among
them. So its files may hold only what a dataset of latents needs; anything else is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import braceexpand
import yaml
from megatron.energon.epathlib import EPath
from megatron.energon.eyaml import load_yaml

from diffusion_data.errors import UserError

_META = ".nv-meta"
_HOW_TO_MAKE_ONE = "make one with scripts/prepare_energon_dataset.py, or run `energon prepare` on its shards"
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?[0-9]{1,18}|[A-Za-z])\.\.(-?[0-9]{1,18}|[A-Za-z])(?:\.\.-?([0-9]{1,18}))?")
_MOST_VALUES = 1 << 31  # of a latent: 4 GB
_DATASET_FIELDS = {"__module__", "__class__", "subflavors"}
_INFO_FIELDS = {"energon_version", "shard_counts"}
_SPLIT_FIELDS = {"split_parts", "exclude"}


@dataclass(frozen=True, kw_only=True)
class DatasetFolder:
    """What a checked dataset holds."""

    path: EPath
    shards: dict[str, dict[str, int]]
    """Samples of each shard of each split."""
    identity: str
    """Equal for a copy of the dataset elsewhere, different for another dataset."""

    @property
    def samples(self) -> dict[str, int]:
        """Samples of each split."""
        return {name: sum(counts.values()) for name, counts in self.shards.items()}


def check_dataset(path: str | os.PathLike[str]) -> DatasetFolder:
    """Check that `path` is a dataset folder that is complete and safe to open.

    Raises:
        UserError: it is not; the message says what is missing or forbidden, and what to do.
    """
    text = str(path)
    if "://" in text and not text.startswith("msc://"):
        raise UserError(f"{text}: remote datasets are read as msc://profile/path, not as {text.split(':')[0]}://")
    root = EPath(text)
    if root.is_local() and not root.is_dir():
        what = "is a file" if root.is_file() else "does not exist"
        raise UserError(f"{text} {what}; data.path must be a dataset folder: {_HOW_TO_MAKE_ONE}")
    _check_class(root)
    info = _read(root, ".info.json", ".info.yaml", allowed=_INFO_FIELDS)
    split = _read(root, "split.yaml", "split.json", allowed=_SPLIT_FIELDS)
    counts = _mapping(info.get("shard_counts"), root, "shard_counts")
    parts = _mapping(split.get("split_parts"), root, "split_parts")
    excluded = set(_expand(split.get("exclude") or [], root, len(counts)))
    shards = {
        name: [shard for shard in _expand(listed or [], root, len(counts)) if shard not in excluded]
        for name, listed in parts.items()
    }
    _check_shards(root, shards, counts)
    return DatasetFolder(
        path=root,
        shards={name: {shard: counts[shard] for shard in listed} for name, listed in shards.items()},
        identity=_identity(root, shards, counts),
    )


def read_stats(folder: DatasetFolder) -> dict[str, Any] | None:
    """`run/stats.json` of the dataset; None where its writer left none.

    Raises:
        UserError: it holds something else.
    """
    file = folder.path / "run" / "stats.json"
    if not file.is_file():
        return None
    try:
        stats = json.loads(file.read_text())
        if all(map(_is_counted_shape, stats.get("latent_shapes", []))):
            return stats
    except (ValueError, TypeError, AttributeError):  # torn, or not a mapping with a list of lists
        pass
    raise UserError(f"{file} is damaged, or none of this tool's: remove it, or run prepare again with the same command")


def _is_counted_shape(fields: Any) -> bool:
    """[C, T, H, W, samples that have this shape], of a size that batches can be made of."""
    whole = len(fields) == 5 and all(type(number) is int and number > 0 for number in fields)
    return whole and math.prod(fields[:4]) <= _MOST_VALUES


def _check_class(root: EPath) -> None:
    fields = _read(root, "dataset.yaml", allowed=_DATASET_FIELDS)
    named = (fields.get("__module__"), fields.get("__class__"))
    if named != ("megatron.energon", "CrudeWebdataset"):
        raise UserError(
            f"{root}/{_META}/dataset.yaml names the class {named[0]}.{named[1]}; only "
            f"megatron.energon.CrudeWebdataset is opened. Prepare the dataset again with that sample type"
        )
    check_subflavors(fields.get("subflavors"), f"{root}/{_META}/dataset.yaml")


def check_subflavors(subflavors: Any, where: str) -> dict[str, Any]:
    """The subflavors as a dict; energon builds what a value of theirs names, so it may only be plain.

    Raises:
        UserError: they hold more; the message begins with `where`.
    """
    subflavors = subflavors or {}
    if not isinstance(subflavors, Mapping) or any(
        str(name).startswith("__") or not isinstance(value, str | int | float | bool | None)
        for name, value in subflavors.items()
    ):
        raise UserError(f"{where}: subflavors may hold only names and plain values")
    return dict(subflavors)


def _read(root: EPath, *names: str, allowed: set[str]) -> dict[str, Any]:
    """The first of the files `names` that is there."""
    for name in names:
        file = root / _META / name
        if file.is_file():
            break
    else:
        raise UserError(f"{root} is not a dataset: it has no {_META}/{names[0]}; {_HOW_TO_MAKE_ONE}")
    return read_plain_mapping(file, allowed)


def read_plain_mapping(file: EPath, allowed: set[str]) -> dict[str, Any]:
    """A json or yaml file that holds a mapping with no other names than those.

    Raises:
        UserError: it holds anything else, or can be read in more than one way.
    """
    raw = file.read_bytes()
    try:
        # energon's parser and the usual one may read a crafted file differently: both must agree.
        readings = [json.loads(raw)] if file.name.endswith(".json") else [_safe_yaml(raw), load_yaml(raw)]
    except Exception as error:  # the parsers have no common error class
        raise UserError(f"{file} can't be read ({type(error).__name__}); {_HOW_TO_MAKE_ONE}") from error
    for fields in readings:
        if not isinstance(fields, dict):
            raise UserError(f"{file} should hold a mapping; {_HOW_TO_MAKE_ONE}")
        if forbidden := sorted(map(str, fields.keys() - allowed)):
            raise UserError(
                f"{file} holds {', '.join(forbidden)}, which could run code; only {', '.join(sorted(allowed))} "
                "are allowed. If you trust the dataset, delete these lines"
            )
    if any(fields != readings[0] for fields in readings):
        raise UserError(f"{file} can be read in more than one way; {_HOW_TO_MAKE_ONE}")
    return readings[0]


def _safe_yaml(raw: bytes) -> Any:
    return yaml.load(raw, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _mapping(value: Any, root: EPath, field: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise UserError(f"{root} is not a dataset: {field} is missing in {_META}; {_HOW_TO_MAKE_ONE}")
    return value


def _expand(patterns: Any, root: EPath, num_shards: int) -> list[str]:
    """Names that patterns (shard_{000000..000009}.tar) mean; counted first, as a few bytes may name billions."""
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise UserError(f"{root}/{_META}: splits should be lists of shard names; {_HOW_TO_MAKE_ONE}")
    if sum(map(_num_names, patterns)) > num_shards:
        raise UserError(f"{root}/{_META}: splits name more than the {num_shards} shards there are; {_HOW_TO_MAKE_ONE}")
    return [name for pattern in patterns for name in braceexpand.braceexpand(pattern)]


def _num_names(pattern: str) -> float:
    """How many names a pattern stands for; infinite for one that no writer makes."""
    if re.search(r"[{}]", _BRACES.sub("", pattern)) or re.search("[0-9]{19}", pattern):
        return math.inf
    number = 1
    for inner in _BRACES.findall(pattern):
        ends = _RANGE.fullmatch(inner)
        if ends is None:
            number *= inner.count(",") + 1
        else:
            first, last = (ord(end) if end.isalpha() else int(end) for end in ends.groups()[:2])
            number *= abs(first - last) // max(1, int(ends[3] or 1)) + 1
    return number


def _check_shards(root: EPath, shards: dict[str, list[str]], counts: dict[str, Any]) -> None:
    names = [name for listed in shards.values() for name in listed]
    for name in names:
        if "://" in name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"{root}/{_META}: the shard {name!r} lies outside the dataset")
        if type(counts.get(name)) is not int or counts[name] < 0:
            raise UserError(f"{root}/{_META}: the shard {name!r} has no sample count; {_HOW_TO_MAKE_ONE}")
    if not root.is_local():
        return
    present: dict[str, set[str]] = {}  # one listing a folder: asking for each of 100,000 files takes minutes
    for name in names:
        folder, _, base = name.rpartition("/")
        if folder not in present:
            directory = root.local_path() / folder
            present[folder] = set(os.listdir(directory)) if directory.is_dir() else set()
        if base not in present[folder]:
            raise UserError(f"{root}: the shard {name} is missing; copy the dataset again, or prepare it again")


def _identity(root: EPath, shards: dict[str, list[str]], counts: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps([shards, counts], sort_keys=True).encode())
    # What this tool made says what of; of another's, energon's index has a number of its own.
    for file in (root / "run" / "fingerprint.json", root / _META / "index.uuid"):
        if file.is_file():
            digest.update(file.read_bytes())
            break
    return digest.hexdigest()
