"""README.rst and docs/: every command and option is one that there is, and every link leads somewhere.

Also those that nobody can wait for, or that take several machines: scripts parse their words, and no more.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from importlib import import_module
from importlib.metadata import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from diffusion_data import prepare_energon_dataset
from diffusion_data.media import MediaLoader
from diffusion_data.process_func_options import named_columns
from tests.written_pages import (
    PAGES,
    REPOSITORY,
    are_options,
    code_block,
    commands,
    inline_commands,
    is_command,
    links,
    literal_lines,
    options,
    split_commands,
    text_of,
)

TRAIN_GROUPS = ("data", "ema", "loss", "model", "optimizer", "trainer")
PLACEHOLDERS = {"configs/recipe/NAME.yaml"}
OWN_RECIPES = {"README.rst": "my_dataset", "docs/recipes.rst": "films"}


class Understood(Exception):
    """A script has parsed its words."""


@pytest.fixture(autouse=True)
def folder_of_the_reader(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the recipe lies that the page shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(REPOSITORY / "scripts"), *sys.path])  # scripts import each other by name
    page = getattr(request.node, "callspec", None) and request.node.callspec.params["page"]
    if page in OWN_RECIPES:
        (tmp_path / "recipe").mkdir()
        (tmp_path / f"recipe/{OWN_RECIPES[page]}.yaml").write_text(code_block(page, "yaml"))


def compose_prepare(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks besides whether the process function takes its options; one of the reader's own isn't there."""
    composed: list[Any] = []
    monkeypatch.setattr(sys, "argv", ["prepare", *words])
    prepare_energon_dataset.main(composed.append)
    (config,) = composed
    if "--config-dir" not in words:
        named_columns(config)


def compose_train(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    composed: list[Any] = []
    train = import_module("diffusion_data.scripts.train")
    monkeypatch.setattr(train, "train", composed.append)
    monkeypatch.setattr(sys, "argv", ["train", *words])
    train.main()
    assert len(composed) == 1


def parse(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    original = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, *given: Any) -> None:
        original(parser, *given)
        raise Understood

    main = import_module(f"diffusion_data.scripts.{module}").main
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [module, *words])
        with pytest.raises(Understood):
            main()


def check_script(script: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(script).parent.name == "scripts"
    if script.endswith("prepare_energon_dataset.py"):
        compose_prepare(words, monkeypatch)
    elif script.endswith("train.py"):
        compose_train(words, monkeypatch)
    else:
        parse(Path(script).stem, words, monkeypatch)


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = words
    if program == "torchrun":
        parsed = get_args_parser().parse_args(words)
        check_script(parsed.training_script, parsed.training_script_args, monkeypatch)
    elif program == "sbatch":
        script = next(place for place, word in enumerate(words) if word.endswith(".sbatch"))
        text = (REPOSITORY / words[script]).read_text()
        for option in words[:script]:
            assert f"#SBATCH {option.partition('=')[0]}=" in text, option
        compose_prepare(words[script + 1 :], monkeypatch)
    elif program == "python" and words[0] == "-m":
        assert find_spec(words[1]), words[1]
    elif program == "python":
        check_script(words[0], words[1:], monkeypatch)
    elif program == "pip" and (extra := re.search(r"\.\[(\w+)\]", " ".join(words))):
        assert extra[1] in (metadata("diffusion_data").get_all("Provides-Extra") or ())


def check_line(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in split_commands(re.sub(r"\$\w+", "00", line)):  # a shell's variable may be anything
        check_command(words, monkeypatch)


def check_options(line: str, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line)
    option = words[0].lstrip("+~").partition("=")[0]
    group, _, name = option.partition(".")
    if group in TRAIN_GROUPS:
        compose_train(["data.path=any", *words], monkeypatch)
    elif page in OWN_RECIPES and f"{name}:" in code_block(page, "yaml"):
        compose_prepare(["--config-dir", ".", f"recipe={OWN_RECIPES[page]}", *words], monkeypatch)
    else:
        compose_prepare(["recipe=media_caption", "output_dir=any", "source.path=any", *words], monkeypatch)


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_are_understood(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in [*commands(page), *inline_commands(page)]:
        check_line(line, monkeypatch)


@pytest.mark.parametrize("page", sorted({*PAGES} - {"docs/options.rst"}))  # which is made from the options
def test_the_options_of_a_page_are_understood(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in options(page):
        check_options(line, page, monkeypatch)


@pytest.mark.parametrize("page", PAGES)
def test_no_line_of_a_literal_block_is_left_unchecked(page: str) -> None:
    for line in literal_lines(page):
        is_drawing, is_loop = re.search("[─│]", line), re.fullmatch("for .*; do|done", line)
        assert is_command(line) or are_options(line) or is_drawing or is_loop, line


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page: str) -> None:
    for link in links(page):
        target, _, heading = link.partition("#")
        path = (REPOSITORY / page).parent / target
        assert path.exists(), link
        headings = re.findall(r"^(.+)\n[=-]{3,}$", path.read_text(), re.MULTILINE)
        assert not heading or heading in [re.sub(r"\W+", "-", each.lower()).strip("-") for each in headings], link


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page: str) -> None:
    text = text_of(page)
    folders = "scripts|tests|diffusion_data|configs|docs"
    for file in set(re.findall(rf"(?<![\w./])(?:{folders})/[\w/]+\.(?:py|sbatch|yaml|rst)", text)) - PLACEHOLDERS:
        assert (REPOSITORY / file).exists(), file
    for picture in re.findall(r"image:: (\S+)", text):
        assert ((REPOSITORY / page).parent / picture).exists(), picture
    for recipe in set(re.findall(r"recipe=([a-z]\w*)", text)) - {OWN_RECIPES.get(page)}:
        assert (REPOSITORY / "configs/recipe" / f"{recipe}.yaml").exists(), recipe
    named = set(re.findall(r"``([a-z_]+\.[a-z_]+)(?:=[^`]*)?``", text))
    known = text_of("docs/options.rst")
    for option in named:
        if option.partition(".")[0] in ("media", "tokenizer", "text_encoder", "batching", "trainer"):
            is_group = f"``{option}." in known
            is_method = option.startswith("media.") and hasattr(MediaLoader, option.partition(".")[2])
            assert f"``{option}``" in known or is_group or is_method, option


PAGE = """
An inline ``python scripts/inspect_shard.py SHARD --kye 3`` and `a link
<docs/nowhere.rst>`_.

- In a list::

      for part in 0 1; do
          VAR=1 OTHER=a python scripts/train.py data=fake \\
              data.micro_batchsize=3
      done

Options, as ``python scripts/train.py data=fak``::

    media.shortside=4  # too few words
"""


def test_commands_are_seen_wherever_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = str(tmp_path / "page.rst")
    Path(page).write_text(PAGE)
    (command,) = commands(page)
    assert split_commands(command) == [["python", "scripts/train.py", "data=fake", "data.micro_batchsize=3"]]
    assert inline_commands(page) == [
        "python scripts/inspect_shard.py SHARD --kye 3",
        "python scripts/train.py data=fak",
    ]
    assert options(page) == ["media.shortside=4"]
    assert links(page) == ["docs/nowhere.rst"]
    for line in [command, *inline_commands(page)]:
        with pytest.raises(SystemExit):
            check_line(line, monkeypatch)
    with pytest.raises(SystemExit):
        check_options("media.shortside=4", page, monkeypatch)
    with pytest.raises(AssertionError, match=r"nowhere\.rst"):
        test_the_links_of_a_page_lead_somewhere(page)
