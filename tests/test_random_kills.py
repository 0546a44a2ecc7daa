"""kill -9 of a rank, of torchrun, of a decode worker, of whatever has been forked, at random moments: the same bytes.

One kill here; DIFFUSION_DATA_TEST_ALL=1 takes 50. DIFFUSION_DATA_TEST_SEED=N repeats the run that said so.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffusion_data.errors import UserError
from diffusion_data.media import MediaLoader
from diffusion_data.prepare_energon_dataset import prepare
from diffusion_data.process_funcs import MediaSample, media_caption
from diffusion_data.verify_dataset import verify_dataset
from tests.small_source import prepare_config, source_rows, write_source
from tests.test_prepare import tar_bytes

KILLS = 50 if os.environ.get("DIFFUSION_DATA_TEST_ALL") == "1" else 1
REPOSITORY = Path(__file__).parent.parent
SCRIPT = str(REPOSITORY / "scripts" / "prepare_energon_dataset.py")
FIRST = ["rank", "torchrun"]  # what is killed first
MARK = "DIFFUSION_DATA_TEST_JOB"
NUM_ROWS = 120
SECONDS_FOR_A_START = 300


def slowly(row: dict[str, Any], *, media: MediaLoader) -> MediaSample:
    """A process function that leaves time for a kill."""
    time.sleep(0.03)
    return media_caption(row, media=media)


def until_told(row: dict[str, Any], *, media: MediaLoader, folder: str) -> MediaSample:
    """A process function that waits at the last rows, after it has told that it is there."""
    if row["score"] >= 1.2:
        Path(folder, f"waits{os.getpid()}").touch()
        while not Path(folder, "go on").exists():
            time.sleep(0.02)
    return media_caption(row, media=media)


class Job:
    """torchrun with its ranks and all that they start, found by a variable that they inherit."""

    def __init__(self, num_processes: int, *options: str, log: Path) -> None:
        self._mark = f"{MARK}={uuid.uuid4().hex}".encode()
        self._log = log
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
        fixed = ["recipe=media_caption", "metadata_columns=[score]", "samples_per_shard=4", "media.short_side=48"]
        options_of_media_caption = ("media_column", "caption_column", "caption_template", "keep_captions")
        fixed += [f"~process_func.{option}" for option in options_of_media_caption]
        name, value = self._mark.decode().split("=")
        with log.open("wb") as said:
            self.torchrun = subprocess.Popen(
                [*command, SCRIPT, *fixed, *options],
                stdout=said,
                stderr=said,
                cwd=log.parent,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), name: value},
            )

    @property
    def said(self) -> str:
        return self._log.read_text()

    def processes(self) -> dict[str, list[int]]:
        """Those that live, by kind."""
        found: dict[str, list[int]] = {"torchrun": [], "rank": [], "forked": []}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                if self._mark not in (folder / "environ").read_bytes().split(b"\0"):
                    continue
                command = (folder / "cmdline").read_bytes()
            except OSError:  # it has just ended
                continue
            if b"multiprocessing." in command:
                found["forked"].append(int(folder.name))
            elif SCRIPT.encode() in command:
                found["torchrun" if b"torch.distributed.run" in command else "rank"].append(int(folder.name))
        return found

    def wait(self) -> int:
        return self.torchrun.wait(SECONDS_FOR_A_START)

    def wait_for(self, what: Callable[[], bool]) -> bool:
        """False if it ends before that."""
        deadline = time.monotonic() + SECONDS_FOR_A_START
        while not what():
            if self.torchrun.poll() is not None:
                return False
            assert time.monotonic() < deadline, self.said
            time.sleep(0.005)
        return True

    def end(self) -> None:
        for pids in self.processes().values():
            for pid in pids:
                kill(pid)
        self.torchrun.wait()


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself since it was looked up
        os.kill(pid, signal.SIGKILL)


def moment(output_dir: Path, chance: random.Random) -> Callable[[], bool]:
    """When to kill: after so many seconds, after so many more shards, or while the metadata is made."""
    chosen = chance.choice(["seconds", "shards", "shards", "metadata"])
    until = time.monotonic() + chance.uniform(0, 12)
    ledger = output_dir / "run" / "ledger"
    shards = len(list(ledger.glob("*.json"))) + chance.randrange(NUM_ROWS // 8)
    if chosen == "shards":
        return lambda: len(list(ledger.glob("*.json"))) >= shards
    if chosen == "metadata":
        return lambda: any(output_dir.glob(".*nv-meta*"))
    return lambda: time.monotonic() > until


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")
def test_random_kills_change_no_byte(tmp_path: Path) -> None:
    seed = int(os.environ.get("DIFFUSION_DATA_TEST_SEED", random.randrange(10**6)))
    print(f"DIFFUSION_DATA_TEST_SEED={seed}")
    chance = random.Random(seed)
    source = write_source(tmp_path / "source.parquet", source_rows(NUM_ROWS))
    func = f"{__name__}.slowly"
    config = prepare_config(source, tmp_path / "undisturbed", process_func={"_target_": func})
    prepare(config)
    undisturbed = tar_bytes(tmp_path / "undisturbed")
    count: Counter[str] = Counter()
    jobs: list[Job] = []
    output_dir = tmp_path / "out0"
    while True:
        processes = chance.choice([1, 2, 3, 4]) if count["starts"] else 3
        options = [f"process_func._target_={func}", f"source.path={source}", f"output_dir={output_dir}"]
        job = Job(processes, *options, f"num_workers={chance.choice([0, 1])}", log=tmp_path / "log")
        count["starts"] += 1
        kills_before = count["kills"]
        try:
            if count["kills"] < KILLS and job.wait_for(moment(output_dir, chance)):
                alive = {kind: pids for kind, pids in job.processes().items() if pids}
                first = [kind for kind in FIRST[count["kills"] :][:1] if kind in alive]
                kind = chance.choice(first or list(alive))
                kill(chance.choice(alive[kind]))
                count["kills"] += 1
                count[f"of a {kind}"] += 1
                print(dict(count), flush=True)
            ended = job.wait()  # but not for its ranks: what they do is no hindrance, or refuses the next start
        finally:
            jobs.append(job)
            if count["kills"] == KILLS:
                for each in jobs:
                    each.end()
        if "a run is at work in" in job.said:
            count["refused"] += 1
        else:
            assert ended == 0 or count["kills"] > kills_before, job.said
        if ended == 0:
            assert tar_bytes(output_dir) == undisturbed
            assert verify_dataset(output_dir).faults == []
            if count["kills"] == KILLS:
                break
            count["finished"] += 1
            output_dir = tmp_path / f"out{count['finished']}"
    print(dict(count))


def times(folder: Path) -> dict[Path, int]:
    """When each file and folder was changed, but for the locks, in which hearts beat."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix != ".lock"}


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")
def test_while_an_orphan_of_a_killed_torchrun_works_a_second_run_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source.parquet", source_rows(14))
    func = {"_target_": f"{__name__}.until_told", "folder": str(tmp_path)}
    options = [f"process_func._target_={func['_target_']}", f"+process_func.folder={tmp_path}"]
    options += [f"source.path={source}", f"output_dir={tmp_path / 'out'}", "num_workers=1"]
    job = Job(2, *options, log=tmp_path / "log")
    config = prepare_config(source, tmp_path / "out", process_func=func)
    try:
        assert job.wait_for(lambda: any(tmp_path.glob("waits*")) and any((tmp_path / "out").glob("*.tar"))), job.said
        kill(job.torchrun.pid)
        job.wait()
        deadline = time.monotonic() + 60
        while len(orphans := job.processes()["rank"]) > 1:  # the one with nothing to do finds the store gone
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1)  # the other has written what it had before the row that keeps it
        assert job.processes()["rank"] == orphans != []
        before = times(tmp_path / "out")
        with pytest.raises(UserError, match=r"a run is at work in .*rank \d, process \d+ on .*since") as refused:
            prepare(config)
        assert any(f"kill {pid})" in str(refused.value) for pid in orphans)
        assert times(tmp_path / "out") == before
        (tmp_path / "go on").touch()
        deadline = time.monotonic() + 60
        while job.processes()["rank"]:
            assert time.monotonic() < deadline, "a rank without its torchrun should end by itself"
            time.sleep(0.05)
        assert "torchrun, or the node that keeps its store, is gone; what is finished is kept" in job.said
        assert "Traceback" not in job.said
    finally:
        job.end()
    prepare(config)
    prepare(prepare_config(source, tmp_path / "undisturbed", process_func=func))
    assert tar_bytes(tmp_path / "out") == tar_bytes(tmp_path / "undisturbed")
