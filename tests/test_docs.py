"""The pages of docs/: their commands and code run as they stand there."""

from __future__ import annotations

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from diffusion_data import DiffusionDataModule
from diffusion_data.latent_sample import sample_key
from diffusion_data.testing import tiny_sample, write_dataset
from tests.small_source import picture_bytes
from tests.written_commands import PREPARE_SAMPLE, run_here
from tests.written_pages import code_block, commands, text_of


@pytest.fixture(scope="module")
def folder(sample_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a copy of the sample dataset lies."""
    made = tmp_path_factory.mktemp("docs")
    shutil.copytree(sample_dataset, made / "sample_dataset")
    return made


def test_the_gallerys_report_can_be_made_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, again, elsewhere = commands("docs/gallery.rst")
    assert prepare == PREPARE_SAMPLE
    run_here(folder, again, monkeypatch, capsys)
    page = (folder / "sample_dataset/run/report/index.html").read_text()
    assert page.count("<figure>") == 24
    assert page.count("PSNR <b>") == 24

    shutil.copytree(folder / "sample_dataset", folder / "elsewhere")
    shutil.rmtree(folder / "elsewhere/run")
    elsewhere = elsewhere.replace("nvidia/Cosmos-0.1-Tokenizer-CV4x8x8", "tiny-cosmos")
    run_here(folder, elsewhere, monkeypatch, capsys)
    page = (folder / "elsewhere_report/index.html").read_text()
    assert page.count("<figure>") == 12
    assert "This dataset doesn&#x27;t tell its statistics: they are those of 56 samples" in page


def test_the_disk_formats_commands_and_code_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table, one = commands("docs/disk_format.rst")
    assert len(run_here(folder, table, monkeypatch, capsys).splitlines()) == 22
    run_here(folder, one, monkeypatch, capsys)
    assert (folder / "picture.png").stat().st_size > 1000
    names: dict[str, object] = {}
    exec(code_block("docs/disk_format.rst", "python"), names)
    assert names["caption"].startswith("a brown square")  # type: ignore[attr-defined]
    assert tuple(names["latent"].shape) == (16, 1, 16, 22)  # type: ignore[attr-defined]
    assert names["text"].shape == (20, 1024)  # type: ignore[attr-defined]


def test_every_field_of_the_format_is_described() -> None:
    from diffusion_data.latent_sample import RESERVED_FIELDS

    text = text_of("docs/disk_format.rst")
    described = {name for names in re.findall(r"^``([\w, ]+)``  ", text, re.MULTILINE) for name in names.split(", ")}
    assert described >= RESERVED_FIELDS


def test_the_plan_of_several_nodes_is_told(
    sample_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    *_, plan = commands("docs/multi_node.rst")
    assert plan.startswith("torchrun --nproc_per_node=8 ")
    said = run_here(tmp_path, plan, monkeypatch, capsys)
    assert "plan: 56 rows, 56 of them looked at; nothing is written" in said
    assert not list(tmp_path.iterdir())
    (megabytes,) = re.findall(r"disk      ([\d.]+) MB of shards", said)
    stats = json.loads((sample_dataset / "run/stats.json").read_text())
    assert float(megabytes) == pytest.approx(stats["num_bytes"] / 1e6, rel=0.1)
    assert "with 32 ranks" in said
    assert "30 of the 32 ranks would have no shard" in said
    assert "money" in said


def test_the_recipe_of_films_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "films.py").write_text(code_block("docs/recipes.rst", "python"))
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe/films.yaml").write_text(code_block("docs/recipes.rst", "yaml"))
    rows = [{"file": "a.png", "title": "A \n Film", "place": "Rome", "year": 1960, "score": 0.9}]
    rows.append({**rows[0], "score": 0.1})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "films.parquet")
    (tmp_path / "a.png").write_bytes(picture_bytes(1))
    plan, run = commands("docs/recipes.rst")
    assert "process_func_error 1 (1 seen)" in run_here(tmp_path, plan, monkeypatch, capsys)
    assert not (tmp_path / "films_dataset").exists()
    assert "2 rows = 1 written + 1 rejected" in run_here(tmp_path, run, monkeypatch, capsys)
    shown = run_here(tmp_path, "python scripts/inspect_shard.py films_dataset/shard_000000.tar", monkeypatch, capsys)
    assert '"caption": "A Film, Rome"' in shown
    assert '"score": 0.9, "year": 1960' in shown


def test_the_costs_of_scaling_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (command,) = [line for line in commands("docs/scaling.rst") if "bench_scaling" in line]
    small = re.sub(r"--(\w+) \d+", lambda match: f"--{match[1]} 5", command)
    measured = run_here(tmp_path, f"{small} --files 3", monkeypatch, capsys).splitlines()
    assert [line.partition(":")[0] for line in measured] == ["source", "plan", "ledger", "ledger", "energon", "energon"]
    assert "100,000 shards of 10,000" in measured[1]


def test_the_datamodules_lines_run_under_a_trainer_and_in_a_plain_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Keys(pl.LightningModule):
        """Trains on nothing, and knows what it has seen."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.seen: list[str] = []

        def training_step(self, batch: dict[str, Any]) -> torch.Tensor:
            self.seen += batch["__key__"]
            return self.weight * batch["loss_mask"].sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "my_dataset", [tiny_sample(row, aesthetic_score=row) for row in range(10)])
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", use_distributed_sampler=False, **quiet)  # type: ignore[arg-type]
    names: dict[str, Any] = {"trainer": trainer, "model": Keys()}
    exec(code_block("docs/training_data.rst", "python", "trainer.fit"), names)
    right = {sample_key(row) for row in range(5, 10)}  # filters={"aesthetic_score": {"min": 5}}
    assert len(names["model"].seen) == 4
    assert set(names["model"].seen) < right
    assert len(names["batch"]["__key__"]) == 4
    assert set(names["batch"]["__key__"]) < right


def test_the_bridge_to_nemo_cooks_what_nemo_expects() -> None:
    """Up to NeMo's own class, which tests/test_nemo_reference.py has where there is one."""
    text = code_block("docs/training_data.rst", "python", "Cooker")
    ours, theirs = text.split("class TaskEncoder")
    assert theirs.split() == ["(BasicDiffusionTaskEncoder):", "cookers", "=", "[Cooker(cook)]"]
    names: dict[str, Any] = {}
    exec(re.sub("^from nemo.*$", "", ours, flags=re.MULTILINE), names)
    base = {"__key__": "a", "__restore_key__": (), "__subflavors__": {}}
    for frames, axes in ((1, 2), (3, 3)):
        sample = tiny_sample(0, (4, frames, 4, 4))
        parts = {"pth": sample.latent, "pickle": sample.text_embedding, "json": sample.metadata}
        cooked = names["cook"]({**base, **parts})
        assert cooked["__key__"] == "a"
        assert cooked["pth"] is sample.latent
        assert cooked["pickle"].ndim == axes
        assert cooked["json"] == {"aesthetic_score": 0.0, **sample.metadata}


def test_the_test_of_a_model_runs(tiny_dataset: Path) -> None:
    plugin, test = (
        code_block("docs/training_data.rst", "python", part) for part in ("pytest_plugins", "def test_my_model_trains")
    )
    names: dict[str, Any] = {"DiffusionDataModule": DiffusionDataModule}
    exec(plugin + test, names)
    assert names["pytest_plugins"] == ["diffusion_data.pytest_plugin"]
    assert find_spec(names["pytest_plugins"][0]) is not None
    names["test_my_model_trains"](tiny_dataset)
