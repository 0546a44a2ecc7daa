"""A finished job tells its rate without start-up, how busy the stages were, and what ranks waited for."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from diffusion_data.prepare_energon_dataset import prepare
from diffusion_data.stage_times import StageTimes
from tests.small_source import prepare_config, source_rows, write_source


def test_the_summary_of_a_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_source(tmp_path / "source.parquet", source_rows(9))
    phases = StageTimes()
    prepare(prepare_config(source, tmp_path / "out"), phases=phases)
    said = capsys.readouterr().out
    encode = phases.seconds()["encode"]
    assert f"9 rows in {encode:.1f} s ({9 / encode:.1f} rows/s); finish" in said
    assert "busy, summed over ranks: decode 0." in said
    assert "ranks waited: for decoding 0." in said
    prepare(prepare_config(source, tmp_path / "out"), phases=(again := StageTimes()))
    assert f"0 rows in {again.seconds()['encode']:.1f} s; finish" in capsys.readouterr().out


def test_times_of_threads_add_up_and_waiting_is_no_cpu_time() -> None:
    times = StageTimes()

    def work(_: int) -> None:
        with times.busy("work"):
            time.sleep(0.05)
        with times.busy("wait_for_rows"):
            sum(range(10_000))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(8)))
    assert 0.4 <= times.seconds()["work"] < 4
    assert times.cpu_seconds()["work"] < 0.1
    assert "wait_for_rows" not in times.cpu_seconds()
    total = StageTimes()
    total.merge(times)
    assert total.seconds() == times.seconds()
