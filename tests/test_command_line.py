"""Entry points: mistakes end as one line that names the option, everything else keeps its traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from diffusion_data import command_line
from diffusion_data.command_line import build_target, options_to_dataclass, run
from diffusion_data.errors import UserError


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "TORCHELASTIC_ERROR_FILE", "DIFFUSION_DATA_DEBUG", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[DictConfig]]:
    """call("a=1", job=...) runs `job` as `tool.py a=1` would, in an empty folder; returns the configs it was given."""
    monkeypatch.chdir(tmp_path)

    def call_tool(*arguments: str, job: Callable[[DictConfig], Any] | None = None) -> list[DictConfig]:
        given: list[DictConfig] = []
        monkeypatch.setattr(sys, "argv", ["tool.py", *arguments])
        run(job or given.append, "train", hints={"data.path": "a dataset"}, open_options=["data.task_encoder.filters"])
        return given

    return call_tool


def fail_with(error: BaseException) -> Callable[[DictConfig], None]:
    def job(config: DictConfig) -> None:
        raise error

    return job


def test_options_reach_the_job_and_no_files_appear(call: Callable, tmp_path: Path) -> None:
    (config,) = call("data.path=somewhere", "seed=3")

    assert config.data.path == "somewhere"
    assert config.data.seed == 3  # ${seed}, resolved
    assert list(tmp_path.iterdir()) == []


def test_an_open_option_takes_keys_of_the_users_own(call: Callable) -> None:
    bounds = [f"data.task_encoder.filters.{bound}" for bound in ("aesthetic_score.min=5", "clip_score.missing=keep")]
    (config,) = call("data.path=somewhere", *bounds)

    assert config.data.task_encoder.filters == {"aesthetic_score": {"min": 5}, "clip_score": {"missing": "keep"}}
    assert sys.argv[2:] == bounds


@pytest.mark.parametrize(
    ("given", "filters"),
    [
        ("={aesthetic_score:{min:5}}", {"aesthetic_score": {"min": 5}}),
        ("={}", {}),
        ("=null", None),
        (".num_frames={min:2}", {"num_frames": {"min": 2}}),
        (".aesthetic_score.min=5", {"num_frames": {"max": 1}, "aesthetic_score": {"min": 5}}),
    ],
)
def test_an_open_option_replaces_what_an_experiment_has_there(
    call: Callable, given: str, filters: dict[str, Any] | None
) -> None:
    (config,) = call("experiment=sample", f"data.task_encoder.filters{given}")

    assert config.data.task_encoder.filters == filters


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "missing option data.path (a dataset): add data.path=VALUE"),
        (["data.pth=x"], "unknown option data.pth: did you mean data.path? (data has: path, seq_length,"),
        (["colour=red"], "unknown option colour; there are: seed, output_dir,"),
        (["data=energy"], "no data=energy; there are: energon, fake (--config-dir adds a folder of yours)"),
        (["data.path=${nowhere}"], "Interpolation key 'nowhere' not found"),
        (["data.path=["], "no viable alternative at input '['"),
        (["--config-dir=nowhere"], "Additional config directory"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    call: Callable, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(*arguments)

    written = capsys.readouterr()
    assert stopped.value.code == 2
    assert written.out == ""
    assert written.err.startswith(f"tool.py: error: {line}")
    assert written.err.count("\n") == 1


def test_own_config_folder_adds_choices(call: Callable, tmp_path: Path) -> None:
    (tmp_path / "mine/model").mkdir(parents=True)
    (tmp_path / "mine/model/own.yaml").write_text("depth: 7\n")

    (config,) = call("--config-dir=mine", "model=own", "data=fake", "optimizer.learning_rate=1")

    assert config.model.depth == 7


def test_user_error_of_the_job_is_one_line(call: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        call("data=fake", job=fail_with(UserError("no column 'a';\nthere are: b")))

    assert stopped.value.code == 2
    assert capsys.readouterr().err == "tool.py: error: no column 'a'; there are: b\n"


def test_user_error_from_a_loader_worker_is_its_last_line(call: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    wrapped = "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  ...\n"
    with pytest.raises(SystemExit):
        call("data=fake", job=fail_with(UserError(f"{wrapped}diffusion_data.errors.UserError: bad shard\n")))

    assert capsys.readouterr().err == "tool.py: error: bad shard\n"


def test_unexpected_error_keeps_its_traceback(call: Callable) -> None:
    with pytest.raises(ZeroDivisionError):
        call("data=fake", job=lambda config: 1 / 0)


def test_debug_variable_keeps_the_traceback_of_a_user_error(call: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSION_DATA_DEBUG", "1")
    with pytest.raises(UserError):
        call("data.pth=x")


def test_interrupt_ends_quietly(call: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        call("data=fake", job=fail_with(KeyboardInterrupt()))

    assert stopped.value.code == 130
    assert capsys.readouterr().err == "tool.py: interrupted\n"


def test_other_ranks_leave_rank_0_time_to_tell_and_name_themselves(
    call: Callable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(command_line.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit):
        call("data=fake", job=fail_with(UserError("disk full")))

    assert waited == [5.0]
    assert capsys.readouterr().err == "tool.py: rank 3: error: disk full\n"
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "disk full"


def test_torchrun_tells_a_mistake_once_and_quotes_it_in_its_summary(tmp_path: Path) -> None:
    tool = tmp_path / "tool.py"
    tool.write_text("from diffusion_data.command_line import run\nrun(print, 'train')\n")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(tool), "data.pth=x"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )

    assert done.returncode != 0
    assert done.stderr.count("tool.py: error: unknown option data.pth") == 1
    assert "rank 1: error" not in done.stderr
    assert "KeyboardInterrupt" not in done.stderr  # by which torchrun ends the rank that waits
    assert "traceback : unknown option data.pth: did you mean data.path?" in done.stderr


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")


@dataclass(frozen=True, kw_only=True)
class Outer:
    path: str
    inner: Inner
    limit: float | None = None
    columns: list[str] = field(default_factory=list)


def test_dataclass_is_filled_with_its_declared_types() -> None:
    config = OmegaConf.create({"path": "p", "inner": {"size": "3", "names": ["a", "b"]}, "limit": 2})

    assert options_to_dataclass(Outer, config, "") == Outer(path="p", inner=Inner(size=3, names=("a", "b")), limit=2.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pth": "p"}, "unknown option job.pth: did you mean job.path?"),
        ({"path": "???"}, "missing option job.path: add job.path=VALUE"),
        ({"inner": {}}, "missing option job.inner.size: add job.inner.size=VALUE"),
        ({"inner": {"size": "many"}}, "job.inner.size=many: Value 'many' of type 'str' could not be converted"),
        ({"inner": {"size": 0}}, "job.inner: size must be at least 1, got 0"),
        ({"inner": 3}, "job.inner=3: give the options in it: job.inner.OPTION=VALUE"),
        ({"inner": {"size": 1, "colour": 2}}, "unknown option job.inner.colour; job.inner has: size, names"),
        ({"columns": 3}, "job.columns=3: "),
    ],
)
def test_wrong_options_of_a_dataclass_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        options_to_dataclass(Outer, {"path": "p", "inner": {"size": 1}, **changes}, "job")

    assert str(error.value).startswith(message)


def test_targets_are_built_inside_out() -> None:
    here = __name__
    built = build_target(
        {"_target_": f"{here}.Outer", "path": "p", "inner": {"_target_": f"{here}.Inner", "size": 2}}, "job"
    )

    assert built == Outer(path="p", inner=Inner(size=2))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_target_": "no.such.thing"}, "job._target_=no.such.thing: no such function or class"),
        ({"_target_": "math.pi"}, "job._target_=math.pi is not a function or class"),
        ({"_target_": f"{__name__}.Inner", "sise": 1}, "unknown option job.sise: did you mean job.size?"),
        ({"_target_": f"{__name__}.Inner"}, "missing option job.size: add job.size=VALUE"),
        ({"_target_": f"{__name__}.Inner", "size": -1}, "job: size must be at least 1, got -1"),
    ],
)
def test_wrong_options_of_a_target_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        build_target(config, "job")

    assert str(error.value).startswith(message)
