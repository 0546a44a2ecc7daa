"""Name of a T5 -> the folder that holds it, and the files there that decide its embeddings."""

from __future__ import annotations

import json
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from diffusion_data.assets import bundled, bundled_names
from diffusion_data.errors import UserError
from diffusion_data.hub_files import WantedFiles, model_folder

CONFIG = "config.json"
TOKENIZERS = ("tokenizer.json", "spiece.model")
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
"""Older repositories (t5-11b is one) have only these; transformers reads them without running code."""

_ALTERNATIVES = ((CONFIG,), TOKENIZERS, (*_SAFETENSORS, *_PICKLES))
"""A model has one of each at least; of weights, the first there is."""

_LEGACY_NAMES = ("t5-small", "t5-base", "t5-large", "t5-3b", "t5-11b")
"""As they were called before the hub had owners; they are google-t5's."""


def find_t5(name: str, cache_dir: str | Path | None) -> Path:
    """The folder of a bundled model, of a path, or of a Hugging Face repository, which is fetched if need be.

    Raises:
        UserError: there is none of that name.
    """
    ours = bundled(name)
    if ours is not None:
        return ours
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name in _LEGACY_NAMES:
        name = f"google-t5/{name}"
    if folder.is_absolute() or name.startswith(("~", ".")) or name.count("/") != 1:
        raise UserError(
            f"no text encoder {name!r}: it is not a folder here, not one of the bundled models "
            f"({', '.join(bundled_names())}), and not a Hugging Face name such as google-t5/t5-11b"
        )
    # an older cache may lack a shard that the index names, so completeness is what loading will check
    wanted = WantedFiles(
        kind="text encoder", looked_for=_looked_for(), choose=_choose, is_complete=lambda found: not _lacks(found)
    )
    return model_folder(name, wanted, cache_dir)


def files_of_t5(name: str, folder: Path) -> list[Path]:
    """Tokenizer, config and weights, sorted.

    Raises:
        UserError: the folder lacks some.
    """
    if lacks := _lacks(folder):
        raise UserError(f"text encoder {name!r}: {lacks}")
    names = {file for file in (CONFIG, *TOKENIZERS, *_TOKENIZER_SETTINGS) if (folder / file).is_file()}
    return [folder / file for file in sorted(names | {_weights_in(folder)} | (_shards(folder) or set()))]


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError where the file holds no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def _looked_for() -> str:
    return f"looked for {', and '.join(' or '.join(files) for files in _ALTERNATIVES)}"


def _choose(names: Collection[str]) -> list[str]:
    """Of two formats of the same weights, only safetensors."""
    safetensors = any(name in names for name in _SAFETENSORS)
    weights = (*_SAFETENSORS, "model-*-of-*.safetensors") if safetensors else (*_PICKLES, "pytorch_model-*-of-*.bin")
    patterns = (CONFIG, *TOKENIZERS, *_TOKENIZER_SETTINGS, *weights)
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def _lacks(folder: Path) -> str:
    """What isn't there of the files that decide the embeddings, in words; empty when nothing."""
    found = [any((folder / file).is_file() for file in files) for files in _ALTERNATIVES]
    missing = [" or ".join(files) for files, present in zip(_ALTERNATIVES, found, strict=True) if not present]
    if missing:
        return f"{folder} has no {'; no '.join(missing)}"
    shards = _shards(folder)
    absent = sorted(shard for shard in shards or () if not (folder / shard).is_file())
    if absent or shards == set():
        return f"{_weights_in(folder)} in {folder} lacks {', '.join(absent) or 'weight_map'}"
    return ""


def _weights_in(folder: Path) -> str:
    return next(file for file in _ALTERNATIVES[-1] if (folder / file).is_file())


def _shards(folder: Path) -> set[str] | None:
    """The files that the index names; None where the weights are in one file."""
    weights = _weights_in(folder)
    return set(read_json(folder / weights).get("weight_map", {}).values()) if weights.endswith(".index.json") else None
