"""Finished shards are a dataset that energon itself takes, also prepared by hand with its command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from diffusion_data.diffusion_energon_datamodule import DiffusionDataModule
from diffusion_data.energon_metadata import _index_in_process, write_energon_metadata
from diffusion_data.prepare_energon_dataset import prepare
from diffusion_data.process_server import process_context
from tests.small_source import prepare_config, source_rows, write_source


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    source = write_source(folder / "source.parquet", source_rows(12))
    prepare(prepare_config(source, folder / "dataset"))
    return folder / "dataset"


@pytest.fixture
def shards(prepared: Path, tmp_path: Path) -> Path:
    """The tars alone, without energon's metadata."""
    for tar in prepared.glob("*.tar"):
        shutil.copy(tar, tmp_path)
    return tmp_path


def keys(dataset: Path) -> list[str]:
    datamodule = DiffusionDataModule(
        dataset, seq_length=64, micro_batch_size=1, global_batch_size=1, num_workers=0, use_train_split_for_val=True
    )
    return sorted(key for batch in datamodule.val_dataloader() for key in batch["__key__"])


def energon_prepare(folder: Path, *options: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from megatron.energon.cli.main import main; main()", "prepare", str(folder)]
    return subprocess.run([*command, *options], input=typed, capture_output=True, text=True, timeout=120)


def test_energons_command_line_prepares_the_shards_without_questions(shards: Path) -> None:
    options = ["--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset", "--no-progress"]
    finished = energon_prepare(shards, *options, "--num-workers", "2")
    assert finished.returncode == 0, finished.stdout
    assert keys(shards) == [f"samples/sample_{row:09d}" for row in range(12)]


def test_energons_dialog_prepares_the_shards_too(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "copy")
    asked = energon_prepare(tmp_path / "copy", "--no-progress", typed="1,0,0\nY\n")  # until it asks for a class
    found = re.search(r"(\d+)\. Crude sample", asked.stdout)
    assert found, asked.stdout
    shutil.rmtree(tmp_path / "copy")
    finished = energon_prepare(shards, "--no-progress", typed=f"1,0,0\nY\n{found[1]}\n")
    assert finished.returncode == 0, finished.stdout
    assert keys(shards) == [f"samples/sample_{row:09d}" for row in range(12)]


def test_metadata_is_made_from_clean(shards: Path) -> None:
    (shards / ".nv-meta").mkdir()
    (shards / ".nv-meta/index.sqlite").write_text("half made")
    files = sorted(path.name for path in shards.glob("*.tar"))
    splits = write_energon_metadata(shards, files, (2, 1, 0), seed=0)
    assert {name: len(each) for name, each in splits.items()} == {"train": 2, "val": 1, "test": 0}
    assert yaml.safe_load((shards / ".nv-meta/split.yaml").read_text())["split_parts"] == splits
    counts = json.loads((shards / ".nv-meta/.info.json").read_text())["shard_counts"]
    assert counts == dict.fromkeys(files, 4)
    assert yaml.safe_load((shards / ".nv-meta/.info.yaml").read_text())["shard_counts"] == counts  # for energon 5


def test_a_shard_that_energon_cannot_index_is_an_error_with_its_words(shards: Path) -> None:
    (shards / "shard_000000.tar").write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"(?s)energon could not index .*has no samples"):
        write_energon_metadata(shards, sorted(path.name for path in shards.glob("*.tar")), (1, 0, 0), seed=0)


def test_a_shard_with_another_number_of_samples_than_were_written_is_not_indexed(shards: Path) -> None:
    files = sorted(path.name for path in shards.glob("*.tar"))
    with pytest.raises(RuntimeError, match=r"^shard_000001\.tar: 4 samples, 5 were written$"):
        write_energon_metadata(shards, files, (1, 0, 0), seed=0, written={**dict.fromkeys(files, 4), files[1]: 5})
    assert sorted(os.listdir(shards)) == files


def test_an_indexer_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """Here one whose shard never comes: a pipe that nobody writes to."""
    os.mkfifo(tmp_path / "shard_000000.tar")
    (tmp_path / "log").touch()
    end_of_starter, starter = process_context().Pipe(duplex=False)
    arguments = (str(tmp_path), ["shard_000000.tar"], str(tmp_path / "log"), end_of_starter)
    indexer = process_context().Process(target=_index_in_process, args=arguments)
    indexer.start()
    end_of_starter.close()
    indexer.join(3)
    assert indexer.is_alive()
    starter.close()  # as its process's death does
    indexer.join(60)
    assert indexer.exitcode == -signal.SIGKILL
