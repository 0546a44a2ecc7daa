"""A fault at any file operation of a run: the same command again ends with the bytes of an undisturbed run.

Every few operations here; DIFFUSION_DATA_TEST_ALL=1 takes every one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_data.encoders import Encoders, load_encoders
from diffusion_data.errors import Reason, RowRejected, UserError
from diffusion_data.media import MediaLoader
from diffusion_data.prepare_config import PrepareConfig
from diffusion_data.prepare_energon_dataset import prepare
from diffusion_data.process_funcs import MediaSample, media_caption
from tests.disk_faults import DiskModel, Handler, Operation, fail_at, full_from, kill_at, noted, watched
from tests.small_source import prepare_config, source_rows, write_source

ALL = os.environ.get("DIFFUSION_DATA_TEST_ALL") == "1"
SECONDS_FOR_A_RUN = 120


def by_weather(row: dict[str, Any], *, media: MediaLoader, weather: str) -> MediaSample:
    """A process function whose rows depend on the network, which in a storm is down for most of them."""
    if Path(weather).read_text() == "storm" and round(row["score"] * 10) in (1, 2, 4, 5, 6, 7, 9):
        raise RowRejected(Reason.fetch_error, "no network")
    return media_caption(row, media=media)


@dataclass(frozen=True)
class Scene:
    """What a run begins with, and what it ends with if nothing disturbs it.

    start: the output folder before the run
    """

    config: Callable[[Path], PrepareConfig]
    encoders: Encoders
    start: Path
    undisturbed: dict[str, Any]
    operations: list[Operation]
    """Below `<folder>/output`, of the undisturbed run."""

    def run(self, output_dir: Path) -> None:
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
            prepare(self.config(output_dir), self.encoders)

    def copy_of_start(self, folder: Path) -> Path:
        shutil.copytree(self.start, folder / "output", symlinks=True)
        return folder / "output"


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Encoders:
    folder = tmp_path_factory.mktemp("any")
    return load_encoders(prepare_config(folder, folder), torch.device("cpu"))


@pytest.fixture(scope="module", params=["from nothing", "after an outage"])
def scene(request: pytest.FixtureRequest, encoders: Encoders, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Ten rows in three shards, a row without a caption. After an outage all shards are made again.

    One of these has no tar until then, the others other ones.
    """
    folder = tmp_path_factory.mktemp("scene")
    rows = source_rows(10)
    rows[0]["caption"] = None
    source = write_source(folder / "source.parquet", rows)
    weather = folder / "weather"

    def config(output_dir: Path) -> PrepareConfig:
        func = {"_target_": f"{__name__}.by_weather", "weather": str(weather)}
        return prepare_config(source, output_dir, process_func=func)

    start = folder / "start"
    start.mkdir()
    if request.param == "after an outage":
        weather.write_text("storm")
        prepare(config(start), encoders)
        tars = {path.name for path in start.glob("*.tar")}
        assert tars == {"shard_000000.tar", "shard_000002.tar"}
    weather.write_text("calm")
    operations: list[Operation] = []
    scene = Scene(config, encoders, start, {}, operations)
    output_dir = scene.copy_of_start(folder)
    with watched(output_dir, lambda _, operation: operations.append(operation)):
        scene.run(output_dir)
    assert len(list(output_dir.glob("*.tar"))) == 3
    scene.undisturbed.update(outcome(output_dir))
    return scene


def outcome(dataset: Path) -> dict[str, Any]:
    """Everything of a finished dataset that doesn't tell of times, or of the run that made it."""
    files = [path for path in dataset.rglob("*") if path.is_file()]
    assert not [path for path in dataset.rglob("*") if path.name.endswith((".partial", ".lock")) or path.is_symlink()]
    content: dict[str, Any] = {}
    for path in files:
        name = str(path.relative_to(dataset))
        if name.startswith("run/ledger/") or name == "run/stats.json":
            fields = json.loads(path.read_bytes())
            content[name] = {key: fields[key] for key in fields if "seconds" not in key and key != "digest"}
        elif name == "run/metadata.json":
            content[name] = sorted(json.loads(path.read_bytes()))
        elif name not in ("run/config.yaml", ".nv-meta/index.uuid", ".nv-meta/index.sqlite"):
            content[name] = path.read_bytes()
    return content


def numbers(scene: Scene, fewest: int) -> range:
    """Of the operations at which to do harm: all, or every few, `fewest` at least."""
    count = len(scene.operations)
    return range(count) if ALL else range(count // fewest // 2, count, max(1, count // fewest))


def test_everything_that_is_written_is_flushed_and_renamed_first(scene: Scene) -> None:
    """What guards the other tests: no operation that they don't count, and none on a final name but by renaming."""
    kinds = {"create", "write", "flush", "rename", "flush folder", "remove", "make folder", "remove folder", "link"}
    assert {each.kind for each in scene.operations} == kinds
    assert len(scene.operations) > 100
    for operation in scene.operations:
        if operation.kind in ("create", "write", "link", "make folder"):
            in_workshop = any(part.endswith(".partial") for part in operation.path.parts)
            assert in_workshop or operation.kind == "make folder", operation
    made = {each.path for each in scene.operations if each.kind == "create"}
    for position, operation in enumerate(scene.operations):
        if operation.kind == "rename" and operation.path in made and operation.path.name.count(".lock") == 0:
            before, after = scene.operations[:position], scene.operations[position + 1]
            assert [each.kind for each in before if each.path == operation.path][-1] == "flush", operation
            assert after.kind == "flush folder"


def dies(scene: Scene, output_dir: Path, handler: Handler) -> None:
    """Run in a child process, which a signal ends."""
    child = os.fork()
    if child == 0:
        try:
            # It runs, but is not this process's child.
            forkserver.ensure_running = forkserver._forkserver.ensure_running = lambda: None
            with watched(output_dir, handler):
                scene.run(output_dir)
        except BaseException:  # noqa: BLE001 - this process must not go on with the tests
            traceback.print_exc()
        finally:
            os._exit(1)
    deadline = time.monotonic() + SECONDS_FOR_A_RUN
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        assert time.monotonic() < deadline, "a run that should have died goes on"
        time.sleep(0.005)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9


def test_a_run_killed_at_any_operation_is_finished_by_the_next(scene: Scene, tmp_path: Path) -> None:
    for number in numbers(scene, 5):
        output_dir = scene.copy_of_start(tmp_path / str(number))
        dies(scene, output_dir, kill_at(number))
        scene.run(output_dir)
        assert outcome(output_dir) == scene.undisturbed, scene.operations[number]
        shutil.rmtree(output_dir)


@pytest.mark.parametrize("fault", [fail_at, full_from])
def test_a_fault_at_any_operation_is_an_error_that_says_what_to_do(
    scene: Scene, tmp_path: Path, fault: Callable[[int], Handler]
) -> None:
    """Also none that is no UserError, which would end with a traceback."""
    for number in numbers(scene, 5):
        output_dir = scene.copy_of_start(tmp_path / str(number))
        failed: list[Operation] = []
        told = None
        try:
            with watched(output_dir, noted(fault(number), failed)):
                scene.run(output_dir)
        except UserError as error:
            told = str(error)
        if told is None:  # nothing failed, or a lock was not removed: the next start clears it
            assert [each for each in failed if each.kind != "remove" or each.path.suffix != ".lock"] == []
        else:
            assert "run the same command again" in told
            assert "Input/output error" in told or "No space left" in told
        scene.run(output_dir)
        assert outcome(output_dir) == scene.undisturbed, scene.operations[number]
        shutil.rmtree(output_dir)


LEFT = {
    "what was flushed": {"names": "flushed", "data": "gone"},
    "all names, no data": {"names": "all", "data": "gone"},
    "all names, torn data": {"names": "all", "data": "torn"},
    "some names": {"names": "some", "data": "torn"},
}


@pytest.mark.parametrize("left", LEFT)
def test_a_power_cut_at_any_operation_is_made_good_by_the_next_run(scene: Scene, tmp_path: Path, left: str) -> None:
    first = scene.copy_of_start(tmp_path / "first")
    model = DiskModel(first)
    chosen = numbers(scene, 4)
    cut = tmp_path / "cut"
    recorded: list[Operation] = []
    with watched(first, lambda _, operation: recorded.append(operation)):
        scene.run(first)
    assert sorted(each.kind for each in recorded) == sorted(each.kind for each in scene.operations)
    for number, operation in enumerate(recorded):
        if number in chosen:
            model.materialise(cut, seed=number, **LEFT[left])
            scene.run(cut)
            assert outcome(cut) == scene.undisturbed, operation
            shutil.rmtree(cut)
        model.apply(operation)
