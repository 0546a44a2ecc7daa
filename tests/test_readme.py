"""README.rst's commands and code, run as they are written there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.small_source import picture_bytes

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.rst").read_text()


def command(beginning: str) -> str:
    """The one command of the README that begins so, with its continued lines."""
    joined = README.replace("\\\n", " ")
    (found,) = [line.strip() for line in joined.splitlines() if line.strip().startswith(beginning)]
    return found


def code_block(language: str, containing: str) -> str:
    blocks = re.findall(rf"\.\. code-block:: {language}\n\n((?:    .*\n|\n)+)", README)
    (found,) = [block for block in blocks if containing in block]
    return "\n".join(line[4:] for line in found.splitlines())


def run_in(folder: Path, line: str, *more: str) -> subprocess.CompletedProcess[str]:
    words = [word.replace("/path/to/scripts/", f"{REPOSITORY}/scripts/") for word in shlex.split(line)]
    words = [f"{REPOSITORY}/{word}" if word.startswith("scripts/") else word for word in words]
    launcher = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}[words[0]]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [*launcher, *words[1:], *more], capture_output=True, text=True, cwd=folder, env=environment, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    return finished


@pytest.fixture(scope="module")
def sample_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README's first command makes, without its installation."""
    folder = tmp_path_factory.mktemp("readme")
    install, prepare = command("pip install -e . &&").split(" && ")
    assert install == "pip install -e ."
    finished = run_in(folder, prepare)
    assert "56 rows = 56 written + 0 rejected" in finished.stdout
    return folder / "sample_dataset"


def test_the_first_command_makes_a_dataset(sample_dataset: Path) -> None:
    stats = json.loads((sample_dataset / "run/stats.json").read_text())
    assert (stats["rows"], stats["written"], stats["rejected"]) == (56, 56, {})
    assert (sample_dataset / ".nv-meta/dataset.yaml").exists()


@pytest.mark.parametrize("data", ["data.path=sample_dataset", "data=fake"])
def test_the_train_commands_train(sample_dataset: Path, data: str) -> None:
    run_in(sample_dataset.parent, command(f"python scripts/train.py {data}"), "trainer.max_steps=2")


def test_the_preview_command_writes_a_picture(sample_dataset: Path) -> None:
    run_in(sample_dataset.parent, command("python scripts/preview_dataset.py"))
    assert (sample_dataset.parent / "preview.png").stat().st_size > 10_000


def test_the_datamodule_lines_give_the_batch_they_describe(
    sample_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sample_dataset.parent)
    names: dict[str, dict[str, object]] = {}
    exec(code_block("python", "DiffusionDataModule"), names)
    described = set(
        re.findall(r"``(\w+)``", README[README.index("``batch`` is a dict") :].split("Both datamodules")[0])
    )
    assert set(names["batch"]) == described - {"batch"}


def test_an_own_dataset_takes_one_function_and_one_recipe(tmp_path: Path) -> None:
    (tmp_path / "my_dataset.py").write_text(code_block("python", "def pet"))
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe/my_dataset.yaml").write_text(code_block("yaml", "my_dataset.pet"))
    rows = [{"photo": picture_bytes(1), "colour": "black", "animal": "cat"}]
    rows.append({"photo": b"no picture", "colour": "brown", "animal": "dog"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pets.parquet")
    finished = run_in(tmp_path, command("torchrun --nproc_per_node=2 /path/to"))
    assert "2 rows = 1 written + 1 rejected" in finished.stdout
    (rejected,) = (tmp_path / "pets_dataset/run/rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected)["reason"] == "not_media"


def test_ci_runs_the_readmes_test_command() -> None:
    assert command("pip install -e '.[test]'") in (REPOSITORY / ".ci/run").read_text().splitlines()


def test_every_recipe_and_script_the_readme_names_exists() -> None:
    for script in re.findall(r"scripts/(\w+\.py)", README):
        assert (REPOSITORY / "scripts" / script).exists()
    for recipe in set(re.findall(r"recipe=(\w+)", README)) - {"my_dataset"}:
        assert (REPOSITORY / "configs/recipe" / f"{recipe}.yaml").exists()
