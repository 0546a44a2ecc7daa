"""README.rst and docs/*.rst -> their literal blocks, commands, options and links."""

from __future__ import annotations

import re
import shlex
from itertools import dropwhile
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
PAGES = ["README.rst", *sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.rst"))]
PROGRAMS = ("python", "torchrun", "sbatch", "pip", "pytest", "aws")

_BLOCK = re.compile(
    r"^( *)(?:(?!\.\. ).*::|\.\. code-block:: *(?P<language>\w+))\n\n(?P<body>(?:\1 +.*\n|\n)+)", re.MULTILINE
)
_ENVIRONMENT = re.compile(r"[A-Z]\w*=\S*")
_OPTION = re.compile(r"[+~]*[a-z_]+(\.\w+)+=.*")


def text_of(page: str) -> str:
    return (REPOSITORY / page).read_text()


def code_blocks(page: str, language: str) -> list[str]:
    return [_dedented(block["body"]) for block in _BLOCK.finditer(text_of(page)) if block["language"] == language]


def code_block(page: str, language: str, containing: str = "") -> str:
    (found,) = [block for block in code_blocks(page, language) if containing in block]
    return found


def literal_lines(page: str) -> list[str]:
    """The lines of the blocks that name no language, with their continued lines, without the shell's comments."""
    blocks = [block["body"].replace("\\\n", " ") for block in _BLOCK.finditer(text_of(page)) if not block["language"]]
    lines = [re.sub(r"\s+# .*", "", line).strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def commands(page: str) -> list[str]:
    """The literal blocks' lines that start a program, however deep, also with the environment's variables before it."""
    return [line for line in literal_lines(page) if is_command(line)]


def inline_commands(page: str) -> list[str]:
    """Those in running text that name a script, module or package: ``python scripts/x.py A``, ``scripts/x.py A``."""
    found = []
    for text in _inline(page):
        first, *more = _words(text)
        if more and re.fullmatch(r"\S+\.py", first):
            found.append(f"python {text}")
        elif first == "pip" or (first in PROGRAMS and any(re.fullmatch(r"-m|\S+\.(py|sbatch)", word) for word in more)):
            found.append(text)
    return found


def options(page: str) -> list[str]:
    """Lines of literal blocks, and literals in running text, that are words of a command: group.option=value ..."""
    found = dict.fromkeys([*literal_lines(page), *_inline(page)])
    return [text for text in found if are_options(text) and "..." not in text]


def links(page: str) -> list[str]:
    return re.findall(r"`[^`<]+<([^>`]+)>`_", text_of(page))


def split_commands(line: str) -> list[list[str]]:
    """Words of each command of a line, without variables of the environment before it."""
    found = map(shlex.split, line.split(" && "))
    return [list(dropwhile(_ENVIRONMENT.fullmatch, words)) for words in found]


def is_command(line: str) -> bool:
    return all(words and words[0] in PROGRAMS for words in split_commands(line))


def are_options(text: str) -> bool:
    return all(map(_OPTION.fullmatch, _words(text)))


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # prose: a quotation mark without its fellow
        return [text]


def _inline(page: str) -> list[str]:
    outside = _BLOCK.sub(lambda block: block[0].removesuffix(block["body"]), text_of(page))
    return [" ".join(text.split()) for text in re.findall(r"(?<!`)``([^`]+)``(?!`)", outside)]


def _dedented(body: str) -> str:
    lines = body.splitlines()
    depth = min(len(line) - len(line.lstrip()) for line in lines if line)
    return "\n".join(line[depth:] for line in lines) + "\n"
