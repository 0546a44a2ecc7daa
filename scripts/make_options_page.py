"""Write docs/options.rst: every option of prepare and train, from the configs and the classes that take them.

    python scripts/make_options_page.py
    python scripts/make_options_page.py --check

What an option means is told by the docstring of the dataclass or class that takes it, else by its comment in the YAML.
An option that neither tells of is an error. --check only compares: exit code 1 if the page is not current.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from diffusion_data.command_line import locate
from diffusion_data.prepare_config import PrepareConfig
from diffusion_data.scripts.train import TrainOptions

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs" / "options.rst"
CONFIGS = REPOSITORY / "configs"

HEAD = """\
Options
=======

Made by ``python scripts/make_options_page.py`` from ``configs/`` and the classes that take the options: edit those.

Options are given as ``name=value`` on the command line, in a recipe (``configs/recipe/``, or a folder of yours with
``--config-dir``), or in the YAML files themselves; the command line has the last word. ``null`` means: not set. An
unknown or missing option, or one of the wrong type, is an error that names it. ``--cfg job`` prints what a command
line would run with.
"""


@dataclass(frozen=True)
class Option:
    """name: from its group on; default: as the YAML has it"""

    name: str
    default: str
    meaning: str


def options_of(file: Path, owner: type | None, prefix: str = "", group: str = "") -> list[tuple[str, list[Option]]]:
    """(group, its options) of a YAML file, in its order. owner: the class that takes the top level."""
    text = file.read_text()
    return list(_walk(yaml.safe_load(text), comments(text), owner, prefix, group, file))


def _walk(
    values: dict[str, Any], told: dict[str, str], owner: Any, prefix: str, path: str, file: Path
) -> Iterator[tuple[str, list[Option]]]:
    if "_target_" in values and values["_target_"] != "???":
        owner = locate(values["_target_"], f"{file.name}: {path}._target_")
    meanings = {} if owner is None else meanings_of(owner)
    own: list[Option] = []
    groups = []
    for name, value in values.items():
        if name in ("defaults", "hydra"):
            continue
        if isinstance(value, dict):
            groups.append((name, value))
        elif name != "_target_" or value == "???":
            place = f"{path}.{name}".strip(".")
            meaning = meanings.get(name) or told.get(place)
            if meaning is None:
                raise SystemExit(f"{file}: neither a comment nor a docstring tells what {place} means")
            own.append(Option(f"{prefix}{place}", _default(value), meaning))
    yield f"{prefix}{path}", own
    hints = get_type_hints(owner) if is_dataclass(owner) else {}
    for name, value in groups:
        kinds = [each for each in (hints.get(name), *get_args(hints.get(name))) if is_dataclass(each)]
        yield from _walk(value, told, kinds[0] if kinds else None, prefix, f"{path}.{name}".strip("."), file)


def comments(text: str) -> dict[str, str]:
    """Dotted name -> the comment behind its value."""
    found, path = {}, list[tuple[int, str]]()
    for line in text.splitlines():
        match = re.match(r"( *)(\w+):(?: +(?!#)\S.*?)??(?: +# (.*))?$", line)
        if match is None:
            continue
        indent, name, comment = len(match[1]), match[2], match[3]
        path = [*((depth, parent) for depth, parent in path if depth < indent), (indent, name)]
        if comment:
            found[".".join(part for _, part in path)] = comment
    return found


def meanings_of(owner: Any) -> dict[str, str]:
    """Option -> what the class tells: "name: text" in its docstring, or a string below the field."""
    meanings: dict[str, str] = {}
    for kind in reversed(inspect.getmro(owner) if inspect.isclass(owner) else (owner,)):
        if kind is object or not getattr(kind, "__module__", "").startswith("diffusion_data"):
            continue
        meanings.update(_in_docstring(inspect.cleandoc(kind.__doc__ or "")))
        if inspect.isclass(kind):
            meanings.update(_below_fields(kind))
    return {name: " ".join(text.split()) for name, text in meanings.items()}


def _in_docstring(text: str) -> Iterator[tuple[str, str]]:
    for match in re.finditer(r"^(\w+(?:, \w+)*): (.+(?:\n +\S.*)*)", text, re.MULTILINE):
        for name in match[1].split(", "):
            yield name, match[2]


def _below_fields(kind: type) -> Iterator[tuple[str, str]]:
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    for field, below in zip(body.body, body.body[1:], strict=False):
        is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            yield field.target.id, str(below.value.value)  # type: ignore[attr-defined]


def _default(value: Any) -> str:
    if value == "???":
        return "required"
    written = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return f"``{written.partition(chr(10))[0]}``"


def _rst(text: str) -> str:
    """Prose of a docstring or comment as rst; Python's None is YAML's null."""
    code = re.compile(r"`+([^`]+)`+")
    parts = re.split(r"(`+[^`]+`+)", re.sub(r"\bNone\b", "null", text))
    return "".join(
        f"``{found[1]}``" if (found := code.fullmatch(part)) else re.sub(r"([\\*|])|_(?!\w)", _escaped, part)
        for part in parts
    )


def _escaped(match: re.Match[str]) -> str:
    return f"\\{match[0]}"


def table(options: Sequence[Option]) -> str:
    lines = [".. list-table::", "   :header-rows: 1", "   :widths: 25 15 60", "", "   * - Option", "     - Default"]
    lines.append("     - Meaning")
    for option in options:
        lines += [f"   * - ``{option.name}``", f"     - {option.default}", f"     - {_rst(option.meaning)}"]
    return "\n".join(lines)


def section(title: str, line: str) -> str:
    return f"{title}\n{line * len(title)}"


def page() -> str:
    """The whole page."""
    parts = [HEAD, section("scripts/prepare_energon_dataset.py", "-")]
    parts += _tables(options_of(CONFIGS / "prepare.yaml", PrepareConfig))
    parts.append(
        "``recipe=`` chooses what sets ``source``, ``process_func`` and whatever else a dataset needs: "
        f"{_choices('recipe')}. Further options of ``process_func`` are the arguments of the function that its "
        "``_target_`` names: ``media_caption`` takes ``media_column`` and ``caption_column``."
    )
    parts.append(section("scripts/train.py", "-"))
    parts += _tables(options_of(CONFIGS / "train.yaml", TrainOptions))
    for file in sorted((CONFIGS / "data").glob("*.yaml")):
        parts += [section(f"data={file.stem}", "~"), _rst(_head(file))]
        parts += _tables(options_of(file, None, prefix="data."), headings=False)
    parts += [section("model=", "~"), presets("model", "size")]
    parts += [section("experiment=", "~"), presets("experiment", "what it is for")]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _tables(groups: list[tuple[str, list[Option]]], headings: bool = True) -> Iterator[str]:
    for name, options in groups:
        if not options:
            continue
        if headings:
            yield section(name.strip(".") or "Top level", "~")
        yield table(options)


def presets(group: str, column: str) -> str:
    """One table for all configs of a group that differ in little else than numbers. column: what their heads tell."""
    lines = [".. list-table::", "   :header-rows: 1", "", f"   * - {group}", f"     - {column}", "     - options"]
    for file in sorted((CONFIGS / group).glob("*.yaml")):
        told = [f"``{name}={value}``" for name, value in _flat(yaml.safe_load(file.read_text()))]
        lines += [f"   * - ``{file.stem}``", f"     - {_rst(_head(file))}", f"     - {', '.join(told)}"]
    return "\n".join(lines)


def _flat(options: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif name != "_target_":
            yield f"{prefix}{name}", value


def _head(file: Path) -> str:
    """The comment that a config begins with."""
    lines = file.read_text().splitlines()
    return " ".join(line.removeprefix("# ") for line in lines if line.startswith("# ") and "@package" not in line)


def _choices(group: str) -> str:
    return ", ".join(f"``{file.stem}``" for file in sorted((CONFIGS / group).glob("*.yaml")))


def main(words: Sequence[str] | None = None) -> None:
    """words: the command line; None for the process's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is not current")
    arguments = parser.parse_args(words)
    made = page()
    if not arguments.check:
        PAGE.write_text(made)
    elif not PAGE.exists() or PAGE.read_text() != made:
        parser.exit(1, f"{PAGE} is not current: run python scripts/make_options_page.py\n")


if __name__ == "__main__":
    main()
