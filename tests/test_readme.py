"""README.rst's commands and code, run as they are written there."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.small_source import picture_bytes
from tests.written_commands import PREPARE_SAMPLE, run_here, run_in
from tests.written_pages import REPOSITORY, code_block, text_of

README = text_of("README.rst")


def command(beginning: str) -> str:
    """The one command of the README that begins so, with its continued lines."""
    joined = README.replace("\\\n", " ")
    (found,) = [line.strip() for line in joined.splitlines() if line.strip().startswith(beginning)]
    return found


def test_the_first_command_makes_a_dataset(sample_dataset: Path) -> None:
    """Which `sample_dataset` ran, but for the installation."""
    assert command("pip install -e . &&") == f"pip install -e . && {PREPARE_SAMPLE}"
    stats = json.loads((sample_dataset / "run/stats.json").read_text())
    assert (stats["rows"], stats["written"], stats["rejected"]) == (56, 56, {})
    assert (sample_dataset / ".nv-meta/dataset.yaml").exists()
    assert (sample_dataset / "run/report/index.html").exists()


def test_the_train_command_trains(sample_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(sample_dataset, tmp_path / "sample_dataset")
    run_in(tmp_path, command("python scripts/train.py data.path=sample_dataset"), "trainer.max_steps=2")


def test_the_command_for_random_data_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_torch_thread: None
) -> None:
    line = command("python scripts/train.py data=fake")
    run_here(tmp_path, line, monkeypatch, capsys, "trainer.max_steps=2", "trainer.accelerator=cpu")
    assert list(tmp_path.rglob("*.ckpt"))


def test_the_preview_command_writes_a_picture(
    sample_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sample_dataset").symlink_to(sample_dataset)
    run_here(tmp_path, command("python scripts/preview_dataset.py"), monkeypatch, capsys)
    assert (tmp_path / "preview.png").stat().st_size > 10_000


def test_the_datamodule_lines_give_the_batch_they_describe(
    sample_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sample_dataset.parent)
    names: dict[str, dict[str, object]] = {}
    exec(code_block("README.rst", "python", "DiffusionDataModule"), names)
    described = set(
        re.findall(r"``(\w+)``", README[README.index("``batch`` is a dict") :].split("Both datamodules")[0])
    )
    assert set(names["batch"]) == described - {"batch"}


def test_an_own_dataset_takes_one_function_and_one_recipe(tmp_path: Path) -> None:
    (tmp_path / "my_dataset.py").write_text(code_block("README.rst", "python", "def pet"))
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe/my_dataset.yaml").write_text(code_block("README.rst", "yaml", "my_dataset.pet"))
    rows = [{"photo": picture_bytes(1), "colour": "black", "animal": "cat"}]
    rows.append({"photo": b"no picture", "colour": "brown", "animal": "dog"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pets.parquet")
    finished = run_in(tmp_path, command("torchrun --nproc_per_node=2 /path/to"))
    assert "2 rows = 1 written + 1 rejected" in finished.stdout
    (rejected,) = (tmp_path / "pets_dataset/run/rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected)["reason"] == "not_media"


def test_ci_runs_the_readmes_test_command() -> None:
    assert command("pip install -e '.[test]'") in (REPOSITORY / ".ci/run").read_text().splitlines()
