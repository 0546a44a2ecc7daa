"""What made a prepared dataset: the options that its run left in `run/config.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from diffusion_data.errors import UserError

if TYPE_CHECKING:
    from megatron.energon.epathlib import EPath


def made_with(dataset: Path | EPath) -> dict[str, Any]:
    """`tokenizer`, `text_encoder` and the other groups of options; empty if there is no such file, or it is broken."""
    try:
        return options_of_run(dataset)
    except UserError:
        return {}


def options_of_run(dataset: Path | EPath) -> dict[str, Any]:
    """As `made_with`.

    Raises:
        UserError: there is no such file, or it is broken.
    """
    file = dataset / "run" / "config.yaml"
    if not file.is_file():
        raise UserError(f"{file} is not there")
    try:
        options = yaml.safe_load(file.read_text())
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file} can't be used: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict):
        raise UserError(f"{file} can't be used: it holds no options")
    return options
