"""docs/options.rst is what the configs and classes say, and names exactly the options that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from diffusion_data.command_line import config_folder
from diffusion_data.prepare_config import PrepareConfig
from diffusion_data.scripts.make_options_page import PAGE, comments, main, options_of


def named(section_from: str, section_to: str | None = None) -> set[str]:
    text = PAGE.read_text()
    start = text.index(f"\n{section_from}\n")
    stop = len(text) if section_to is None else text.index(f"\n{section_to}\n")
    return set(re.findall(r"^   \* - ``([\w.]+)``$", text[start:stop], re.MULTILINE))


def existing(config_name: str, *overrides: str) -> set[str]:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = OmegaConf.to_container(compose(config_name, overrides=list(overrides)))
    assert isinstance(config, dict)
    return set(_leaves(config, ""))


def _leaves(values: dict[Any, Any], prefix: str) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_the_page_is_current() -> None:
    main(["--check"])


def test_it_names_exactly_the_options_of_prepare() -> None:
    names = ("media_column", "caption_column", "caption_template", "keep_captions")
    arguments = {f"process_func.{name}" for name in names}  # the recipe's
    assert named("scripts/prepare_energon_dataset.py", "scripts/train.py") == (
        existing("prepare", "recipe=media_caption") - arguments
    )


@pytest.mark.parametrize(("data", "until"), [("energon", "data=fake"), ("fake", "model=")])
def test_it_names_exactly_the_options_of_train(data: str, until: str) -> None:
    told = named("scripts/train.py", "data=energon") | named(f"data={data}", until)
    exist = {name for name in existing("train", f"data={data}") if not name.endswith("_target_")}
    assert told == {name for name in exist if not name.startswith("model.")}


def test_an_option_that_nothing_tells_of_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prepare.yaml").write_text("seed: 0\nriddle: 3\n")
    with pytest.raises(SystemExit, match="neither a comment nor a docstring tells what riddle means"):
        options_of(tmp_path / "prepare.yaml", PrepareConfig)


def test_comments_are_found_by_the_place_of_their_option() -> None:
    text = "a: 1  # one\nb:\n  a: '#'  # two\n  c:\n    a: [1, 2]  # three\n  d: 4\ne: 5 # no comment\n"
    assert comments(text) == {"a": "one", "b.a": "two", "b.c.a": "three", "e": "no comment"}
