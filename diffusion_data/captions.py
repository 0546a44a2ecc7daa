"""The captions of a row -> the one that a sample gets: drawn among several, put into a template.

A template is text with names of columns in braces; {caption} is the caption. Nothing else of str.format is known
here, so a template can neither reach into a value nor ask a value to format itself.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_data.errors import Reason, RowRejected, UserError

CAPTION = "caption"  # the name in a template that stands for the caption


def captions_of(row: Mapping[str, Any], columns: str | Sequence[str]) -> list[Any]:
    """What the columns hold, in their order; a cell that is a list counts as its elements. Not checked yet."""
    cells = [row[column] for column in ([columns] if isinstance(columns, str) else columns)]
    return [each for cell in cells for each in (cell if isinstance(cell, list) else [cell])]


def is_blank(caption: object) -> bool:
    """Null, or nothing but white space."""
    return caption is None or (isinstance(caption, str) and not caption.strip())


def template_columns(template: str, option: str) -> list[str]:
    """The columns that a template names.

    Raises:
        UserError: it is no such template; option names where it stands.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"{option}: {template!r} is no template: {error}") from error
    names = []
    for _, name, specification, conversion in parts:
        if name is None:
            continue
        if not name or any(each in name for each in ".[]") or specification or conversion:
            raise UserError(
                f"{option}: {template!r} may have names of columns in braces and nothing else, as {{title}}"
            )
        names.append(name)
    if CAPTION not in names:
        raise UserError(f"{option}: {template!r} has no {{{CAPTION}}}, the place for the caption")
    return [name for name in dict.fromkeys(names) if name != CAPTION]


def fill_template(template: str, caption: str, row: Mapping[str, Any]) -> str:
    """The template with the caption and the row's values in it; a null value is an empty text.

    Raises:
        RowRejected: caption_not_text: a value is neither text nor a number.
    """
    parts = []
    for text, name, _, _ in string.Formatter().parse(template):
        parts.append(text)
        if name is not None:
            parts.append(caption if name == CAPTION else _as_text(row[name], name))
    return "".join(parts)


def _as_text(value: Any, column: str) -> str:
    if value is None:
        return ""
    if isinstance(value, (str, int, float)) or hasattr(value, "isoformat"):  # dates and times
        return str(value)
    raise RowRejected(
        Reason.caption_not_text, f"{column} holds {type(value).__name__}, expected text or a number for the template"
    )
