"""The options of `process_func` -> its arguments, the columns that they name, and the RowDecoder that calls it."""

from __future__ import annotations

import inspect
from typing import Any

from diffusion_data.captions import template_columns
from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.errors import UserError
from diffusion_data.latent_sample import RESERVED_FIELDS
from diffusion_data.prepare_config import PrepareConfig
from diffusion_data.row_decoder import RowDecoder, handed_over, resolve_process_func


def row_decoder(config: PrepareConfig, tokenizer: CosmosTokenizer) -> RowDecoder:
    """Raises UserError where the tokenizer leaves nothing of what the options ask for."""
    return RowDecoder(
        process_func=config.process_func["_target_"],
        arguments=process_func_arguments(config),
        metadata_columns=tuple(config.metadata_columns),
        media=config.media,
        temporal_compression=tokenizer.temporal_compression,
        # A DiT cuts latents into patches of 2 x 2, so sides are multiples of two latent pixels.
        size_multiple=2 * tokenizer.spatial_compression,
        empty_captions=config.empty_captions,
        seed=config.seed,
    )


def process_func_arguments(config: PrepareConfig) -> dict[str, Any]:
    """The process function's arguments, with the defaults of those that the recipe leaves out.

    Raises:
        UserError: there is no such function, or it can't be called with these.
    """
    target = config.process_func.get("_target_")
    if not isinstance(target, str):
        raise UserError("process_func._target_: name the function, e.g. my_dataset.process_row")
    function = resolve_process_func(target)
    signature = inspect.signature(function)
    given = {name: value for name, value in config.process_func.items() if name != "_target_"}
    ours = dict.fromkeys(handed_over(function))
    try:
        bound = signature.bind({}, **given, **ours)
    except TypeError as error:
        raise UserError(f"process_func: {target}{signature} can't be called: {error}") from error
    bound.apply_defaults()
    row, *_ = bound.arguments
    variadic = [name for name, each in signature.parameters.items() if each.kind is each.VAR_KEYWORD]
    named = {name: value for name, value in bound.arguments.items() if name not in (row, *ours, *variadic)}
    return named | {name: value for each in variadic for name, value in bound.arguments[each].items()}


def named_columns(config: PrepareConfig) -> dict[str, str]:
    """Columns that options name, and the option of each."""
    arguments = process_func_arguments(config)
    columns = dict.fromkeys(config.metadata_columns, "metadata_columns")
    for name, value in arguments.items():
        if name.endswith(("_column", "_columns")):
            for column in [value] if isinstance(value, str) else value or ():
                columns[column] = f"process_func.{name}"
        if name == "caption_template" and isinstance(value, str):
            for column in template_columns(value, f"process_func.{name}"):
                columns[column] = f"process_func.{name}"
    taken = RESERVED_FIELDS.intersection(config.metadata_columns)
    if taken:
        raise UserError(
            f"metadata_columns: {', '.join(sorted(taken))} would overwrite fields that every sample's json has"
        )
    return columns
