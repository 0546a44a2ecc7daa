"""Everything that changes bytes -> fingerprint: what a resumed run must have in common with the first."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffusion_data.durable_file import sha256_of_file, write_json
from diffusion_data.errors import UserError

_HUB_BLOB = re.compile(r"[0-9a-f]{64}")


def files_digest(files: Iterable[Path]) -> str:
    """sha256 over the names and contents of weight and vocabulary files.

    Weights from the hub's cache are links to files named by their sha256, so gigabytes need no reading.
    """
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda each: each.name):
        content = file.resolve().name if file.is_symlink() else ""
        if not _HUB_BLOB.fullmatch(content):
            content = sha256_of_file(file.resolve())
        digest.update(f"{file.name} {content}\n".encode())
    return digest.hexdigest()


def module_digest(function: Callable[..., Any]) -> str | None:
    """sha256 of the file that defines `function`, with its helpers; what that file imports is not covered.

    None for functions of this package, whose format version stands for them, and where there is no file.
    """
    if (function.__module__ or "").startswith("diffusion_data."):
        return None
    try:
        file = inspect.getsourcefile(function)
    except TypeError:  # built in
        return None
    return sha256_of_file(Path(file).resolve()) if file and Path(file).is_file() else None


def library_versions() -> dict[str, str]:
    """Versions of what decodes and encodes: another one may change the low bits of a result."""
    return {name: version(name) for name in ("av", "diffusers", "pillow", "torch", "transformers")}


def fingerprint_digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def check_or_write_fingerprint(path: Path, fields: dict[str, Any]) -> None:
    """Write `fields` to `path`, or check that they are the ones already there.

    Raises:
        UserError: naming each field that differs, with both values.
    """
    fields = json.loads(json.dumps(fields))  # as they come back from a file: tuples are lists
    if not path.exists():
        write_json(path, fields)
        return
    try:
        before = dict(_flat(json.loads(path.read_text(encoding="utf-8"))))
    except ValueError as error:
        raise UserError(f"output_dir: {path} is damaged ({error}); choose another output_dir") from error
    now = dict(_flat(fields))
    differing = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
    if differing:
        changes = "; ".join(f"{name}: {before.get(name)!r} -> {now.get(name)!r}" for name in differing[:6])
        more = f"; and {len(differing) - 6} more" if len(differing) > 6 else ""
        raise UserError(
            f"output_dir: {path.parent.parent} holds a run with other settings ({changes}{more}); "
            "restore them to go on with it, or choose another output_dir"
        )


def fields_before(path: Path) -> dict[str, Any]:
    """The fields in `path`; none if there is no such file, or one that `check_or_write_fingerprint` will refuse."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, plain value) of everything in nested dicts and lists."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _flat(each, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        yield f"{name}.length", len(value)
        for index, each in enumerate(value):
            # A file is known by its name, so that a new one in front doesn't make all the others differ.
            label = each.get("name", index) if isinstance(each, dict) else index
            yield from _flat(each, f"{name}.{label}")
    else:
        yield name, value
