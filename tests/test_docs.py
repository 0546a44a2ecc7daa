"""The pages of docs/: their commands and code run as they stand there, and what they name exists."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffusion_data.command_line import run
from diffusion_data.media import MediaLoader
from tests.small_source import picture_bytes
from tests.written_commands import PREPARE_SAMPLE, REPOSITORY, run_here

DOCS = REPOSITORY / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.rst"))


def commands(page: str) -> list[str]:
    """The literal blocks' lines that start a program, with their continued lines."""
    joined = (DOCS / page).read_text().replace("\\\n", " ")
    return re.findall(r"^    ((?:python|torchrun|sbatch) .*)$", joined, re.MULTILINE)


def code_block(page: str, language: str) -> str:
    (found,) = re.findall(rf"\.\. code-block:: {language}\n\n((?:    .*\n|\n)+)", (DOCS / page).read_text())
    return "\n".join(line[4:] for line in found.splitlines())


@pytest.fixture(scope="module")
def folder(sample_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a copy of the sample dataset lies."""
    made = tmp_path_factory.mktemp("docs")
    shutil.copytree(sample_dataset, made / "sample_dataset")
    return made


def test_the_gallerys_report_can_be_made_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, again, elsewhere = commands("gallery.rst")
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
    table, one = commands("disk_format.rst")
    assert len(run_here(folder, table, monkeypatch, capsys).splitlines()) == 22
    run_here(folder, one, monkeypatch, capsys)
    assert (folder / "picture.png").stat().st_size > 1000
    names: dict[str, object] = {}
    exec(code_block("disk_format.rst", "python"), names)
    assert names["caption"].startswith("a brown square")  # type: ignore[attr-defined]
    assert tuple(names["latent"].shape) == (16, 1, 16, 22)  # type: ignore[attr-defined]
    assert names["text"].shape == (20, 1024)  # type: ignore[attr-defined]


def test_every_field_of_the_format_is_described() -> None:
    from diffusion_data.latent_sample import RESERVED_FIELDS

    text = (DOCS / "disk_format.rst").read_text()
    described = {name for names in re.findall(r"^``([\w, ]+)``  ", text, re.MULTILINE) for name in names.split(", ")}
    assert described >= RESERVED_FIELDS


def test_the_plan_of_several_nodes_is_told(
    sample_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    *_, plan = commands("multi_node.rst")
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
    (tmp_path / "films.py").write_text(code_block("recipes.rst", "python"))
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe/films.yaml").write_text(code_block("recipes.rst", "yaml"))
    rows = [{"file": "a.png", "title": "A \n Film", "place": "Rome", "year": 1960, "score": 0.9}]
    rows.append({**rows[0], "score": 0.1})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "films.parquet")
    (tmp_path / "a.png").write_bytes(picture_bytes(1))
    plan, run = commands("recipes.rst")
    assert "process_func_error 1 (1 seen)" in run_here(tmp_path, plan, monkeypatch, capsys)
    assert not (tmp_path / "films_dataset").exists()
    assert "2 rows = 1 written + 1 rejected" in run_here(tmp_path, run, monkeypatch, capsys)
    shown = run_here(tmp_path, "python scripts/inspect_shard.py films_dataset/shard_000000.tar", monkeypatch, capsys)
    assert '"caption": "A Film, Rome"' in shown
    assert '"score": 0.9, "year": 1960' in shown


def test_the_costs_of_scaling_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (command,) = [line for line in commands("scaling.rst") if "bench_scaling" in line]
    small = re.sub(r"--(\w+) \d+", lambda match: f"--{match[1]} 5", command)
    measured = run_here(tmp_path, f"{small} --files 3", monkeypatch, capsys).splitlines()
    assert [line.partition(":")[0] for line in measured] == ["source", "plan", "ledger", "ledger", "energon", "energon"]
    assert "100,000 shards of 10,000" in measured[1]


def test_the_slurm_script_starts_a_job_and_hands_its_words_on(tmp_path: Path) -> None:
    """Without Slurm: stand-ins for its two programs do what they do on one node."""
    script = REPOSITORY / "scripts/prepare.sbatch"
    for name, body in {
        "srun": 'shift; exec "$@"',
        "scontrol": "echo localhost",
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "PREPARE": str(REPOSITORY / "scripts/prepare_energon_dataset.py"),
        "PROCESSES": "1",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
    }
    (line,) = [line for line in commands("multi_node.rst") if line.startswith("sbatch")]
    words = shlex.split(line)[3:]
    assert words[0] == "recipe=media_caption"
    pq.write_table(pa.table({"media": [picture_bytes(1)], "caption": ["a picture"]}), tmp_path / "rows.parquet")
    words = [word.replace("rows/", "rows.parquet").replace("/shared/", "") for word in words]
    finished = subprocess.run(
        ["bash", script, *words, "media.short_side=48", "report=false"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    assert "dataset: 1 rows = 1 written + 0 rejected" in finished.stdout
    assert json.loads((tmp_path / "dataset/run/stats.json").read_text())["written"] == 1


CONFIGS = {"prepare_energon_dataset.py": "prepare", "train.py": "train"}


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_give_options_that_there_are(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that nobody can wait for, or that take several machines."""
    for words in map(shlex.split, commands(page)):
        place, script = next((place, Path(word).name) for place, word in enumerate(words) if "scripts/" in word)
        options = words[place + 1 :]
        if script in CONFIGS and "--config-dir" not in options:
            composed: list[object] = []
            monkeypatch.setattr(sys, "argv", [script, *options])
            run(composed.append, CONFIGS[script])
            assert composed
        elif script.endswith(".py"):
            source = (REPOSITORY / "scripts" / script).read_text()
            for option in (word for word in options if word.startswith("--") and word != "--config-dir"):
                assert f'"{option}"' in source or f'"{option.replace("--no-", "--")}"' in source, (script, option)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page: str) -> None:
    text = (DOCS / page).read_text()
    for script in re.findall(r"scripts/(\w+\.(?:py|sbatch))", text):
        assert (REPOSITORY / "scripts" / script).exists(), script
    for test in re.findall(r"tests/(\w+\.py)", text):
        assert (REPOSITORY / "tests" / test).exists(), test
    for link in re.findall(r"<(\w+\.rst)>`_", text):
        assert (DOCS / link).exists() or link == "rows.rst", link
    for picture in re.findall(r"image:: (\S+)", text):
        assert (DOCS / picture).exists(), picture
    for recipe in set(re.findall(r"recipe=([a-z]\w*)", text)) - {"films"}:
        assert (REPOSITORY / "configs/recipe" / f"{recipe}.yaml").exists(), recipe
    options = set(re.findall(r"``([a-z_]+\.[a-z_]+)(?:=[^`]*)?``", text))
    known = (DOCS / "options.rst").read_text()
    for option in options:
        if option.partition(".")[0] in ("media", "tokenizer", "text_encoder", "batching", "trainer"):
            is_group = f"``{option}." in known
            is_method = option.startswith("media.") and hasattr(MediaLoader, option.partition(".")[2])
            assert f"``{option}``" in known or is_group or is_method, option
