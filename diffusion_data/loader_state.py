"""energon's loader state <-> lists, dicts, numbers, bytes and tensors, as a weights-only checkpoint allows.

{"class": name, "fields": {...}}   one of energon's state classes
{"array": int64 tensor, "dtype"}   numpy array (torch has no full set of unsigned types)
{"items": [[key, value], ...]}     dict, or energon's FlexState
{"tuple": [...]}  [...]            tuple, list
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.rng import SystemRngState
from megatron.energon.savable_loader import (
    SavableDataLoaderState,
    SavableDatasetCheckpoint,
    SavableDatasetState,
)
from megatron.energon.state import FlexState

from diffusion_data.errors import UserError

DATASET_NAME = "dataset_name"
"""The setting that says where `dataset`, an identity, lay; it may change."""

_CLASSES: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        SavableDataLoaderState,
        SavableDatasetCheckpoint,
        SavableDatasetState,
        SliceState,
        SystemRngState,
    )
}


def to_plain(state: Any) -> Any:
    """The state in plain containers."""
    if state is None or isinstance(state, bool | int | float | str | bytes | torch.Tensor):
        return state
    if type(state).__name__ in _CLASSES and dataclasses.is_dataclass(state):
        fields = {field.name: to_plain(getattr(state, field.name)) for field in dataclasses.fields(state)}
        return {"class": type(state).__name__, "fields": fields}
    if isinstance(state, np.generic):
        return state.item()
    if isinstance(state, np.ndarray) and state.dtype.kind in "iu":
        return {"array": torch.from_numpy(state.astype(np.int64)), "dtype": str(state.dtype)}
    if isinstance(state, dict):
        kind = "flex" if isinstance(state, FlexState) else "dict"
        return {"items": [[to_plain(key), to_plain(value)] for key, value in state.items()], "kind": kind}
    if isinstance(state, tuple):
        return {"tuple": [to_plain(value) for value in state]}
    if isinstance(state, list):
        return [to_plain(value) for value in state]
    raise TypeError(f"energon's loader state holds a {type(state)}, which this version can't save")


def from_plain(plain: Any) -> Any:
    """Undo `to_plain`."""
    if isinstance(plain, list):
        return [from_plain(value) for value in plain]
    if not isinstance(plain, dict):
        return plain
    if "class" in plain:
        return _CLASSES[plain["class"]](**{name: from_plain(value) for name, value in plain["fields"].items()})
    if "array" in plain:
        return plain["array"].numpy().astype(plain["dtype"])
    if "tuple" in plain:
        return tuple(from_plain(value) for value in plain["tuple"])
    items = ((from_plain(key), from_plain(value)) for key, value in plain["items"])
    return FlexState(items) if plain["kind"] == "flex" else dict(items)


def _told(settings: dict[str, Any], name: str) -> str:
    if name == "dataset" and DATASET_NAME in settings:
        return f"{settings[DATASET_NAME]} ({settings[name][:12]})"
    return repr(settings.get(name))


def refuse_changes(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Stop where a state would be restored into another stream of samples than it was saved from.

    Raises:
        UserError: naming each setting that differs.
    """
    differing = [
        f"{name} was {_told(saved, name)}, now {_told(now, name)}"
        for name in sorted((saved.keys() | now.keys()) - {DATASET_NAME})
        if saved.get(name) != now.get(name)
    ]
    if differing:
        raise UserError(
            f"the checkpoint's place in the dataset fits only the settings it was saved with: "
            f"{'; '.join(differing)}. Restore them, or start from the weights alone. (Ranks and workers a rank may "
            "change if their product, at least 1, stays the same)"
        )
