"""docs/rows.rst names every reason and every limit as they are, and only tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from diffusion_data.errors import Reason

REPOSITORY = Path(__file__).parent.parent
TEXT = (REPOSITORY / "docs/rows.rst").read_text()


def test_the_table_of_reasons_is_complete() -> None:
    table = re.findall(r"^``(\w+)`` +(.*)$", TEXT.partition("Trying again")[0], re.MULTILINE)
    assert {name: "*retryable*" in text for name, text in table} == {each.value: each.retryable for each in Reason}


def test_the_tests_that_it_names_exist() -> None:
    named = set(re.findall(r"\btest_\w+", TEXT))
    there = {
        name
        for path in (REPOSITORY / "tests").glob("test_*.py")
        for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert len(named) > 30
    assert named <= there


def test_the_limits_that_it_names_are_options() -> None:
    options = yaml.safe_load((REPOSITORY / "configs/prepare.yaml").read_text())
    for name in re.findall(r"``(media\.\w+|text_encoder\.\w+|\w+_seconds)``", TEXT):
        group, _, field = name.rpartition(".")
        assert field in (options[group] if group else options), name
