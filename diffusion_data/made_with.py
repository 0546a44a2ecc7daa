"""What made a prepared dataset: the options that its run left in `run/config.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from megatron.energon.epathlib import EPath


def made_with(dataset: Path | EPath) -> dict[str, Any]:
    """`tokenizer`, `text_encoder` and the other groups of options; empty if there is no such file, or it is broken."""
    file = dataset / "run" / "config.yaml"
    try:
        options = yaml.safe_load(file.read_text()) if file.is_file() else None
    except (UnicodeDecodeError, yaml.YAMLError):
        options = None
    return options if isinstance(options, dict) else {}
