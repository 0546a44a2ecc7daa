"""As long as a rank lives, no other start gets its output folder; once it is gone, the next one does."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore, TCPStore

from diffusion_data import run_lock as module
from diffusion_data.distributed import Ranks
from diffusion_data.errors import Reason, RowRejected, UserError
from diffusion_data.media import MediaLoader
from diffusion_data.prepare_energon_dataset import prepare
from diffusion_data.process_funcs import MediaSample, media_caption
from diffusion_data.run_lock import lock_folder, run_lock
from tests.small_source import prepare_config, source_rows, write_source


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SECONDS_OF_PATIENCE", 0.2)
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_BEATS", 0.1)
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LOOKS", 0.1)
    monkeypatch.setattr(module, "_LOOKS", 10)


def alone() -> Ranks:
    return Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, store=HashStore())


def tree(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def try_to_lock(folder: Path) -> None:
    with run_lock(folder, alone()):
        pass


@contextmanager
def other_process(target: Callable[..., None], *arguments: Any) -> Iterator[Any]:
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def hold(folder: Path) -> None:
    with run_lock(folder, alone()):
        time.sleep(300)


def wait_for_lock(folder: Path) -> Path:
    deadline = time.monotonic() + 60
    while not (files := list(lock_folder(folder).glob("[!.]*.lock"))):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return files[0]


def test_a_second_start_is_refused_with_who_holds_it_and_touches_nothing(tmp_path: Path) -> None:
    with other_process(hold, tmp_path) as process:
        wait_for_lock(tmp_path)
        before = tree(tmp_path)
        with pytest.raises(UserError) as refused:
            try_to_lock(tmp_path)
        assert str(refused.value).startswith(
            f"output_dir: a run is at work in {tmp_path} (rank 0, process {process.pid}"
        )
        assert f"on {os.uname().nodename}: kill {process.pid}" in str(refused.value)
        after = tree(tmp_path)
        assert {name: after[name] for name in after if not name.endswith(".lock")} == {
            name: before[name] for name in before if not name.endswith(".lock")
        }


def test_the_lock_of_a_killed_process_is_cleared(tmp_path: Path) -> None:
    with other_process(hold, tmp_path) as process:
        stale = wait_for_lock(tmp_path)
        process.kill()
        process.join()
        with run_lock(tmp_path, alone()):
            assert not stale.exists()
            assert len(list(lock_folder(tmp_path).iterdir())) == 1
    assert not list(lock_folder(tmp_path).iterdir())


def test_a_stopped_process_still_holds_its_lock(tmp_path: Path) -> None:
    with other_process(hold, tmp_path) as process:
        wait_for_lock(tmp_path)
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(1.5)  # longer than it is watched for
        with pytest.raises(UserError, match="a run is at work"):
            try_to_lock(tmp_path)


def test_one_that_ends_within_the_patience_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SECONDS_OF_PATIENCE", 30.0)
    with other_process(hold, tmp_path) as process:
        wait_for_lock(tmp_path)
        threading.Timer(0.5, process.kill).start()
        try_to_lock(tmp_path)


def contend(folder: Path, barrier: Any, log: Path) -> None:
    barrier.wait()
    try:
        with run_lock(folder, alone()):
            with log.open("a") as file:
                file.write("begin\n")
            time.sleep(0.4)
            with log.open("a") as file:
                file.write("end\n")
    except UserError:
        pass


def test_of_starts_at_the_same_moment_at_most_one_goes_on(tmp_path: Path) -> None:
    went_on = 0
    for attempt in range(4):
        log = tmp_path / f"log{attempt}"
        log.touch()
        context = multiprocessing.get_context("fork")
        barrier = context.Barrier(3)
        processes = [context.Process(target=contend, args=(tmp_path, barrier, log)) for _ in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        lines = log.read_text().split()
        assert lines == ["begin", "end"] * (len(lines) // 2)  # never two at a time
        went_on += len(lines) // 2
    assert went_on


def no_locks(*arguments: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_without_locks_a_heart_that_beats_refuses_and_one_that_does_not_is_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module.fcntl, "flock", no_locks)
    with other_process(hold, tmp_path) as process:
        stale = wait_for_lock(tmp_path)
        with pytest.raises(UserError, match=rf"a run is at work .*process {process.pid}"):
            try_to_lock(tmp_path)
        assert "for a sign of life of 1 ranks of an earlier run" in capsys.readouterr().err
        process.kill()
        process.join()
        with run_lock(tmp_path, alone()):
            assert not stale.exists()


def move_to_another_machine(lock: Path) -> None:
    """As a file system shows it that doesn't share locks between machines."""
    beat, _, holder = lock.read_text().partition("\n")
    lock.write_text(f"{beat}\n{json.dumps({**json.loads(holder), 'host': 'node7', 'boot': 'another'})}")


def test_the_free_lock_of_another_machine_counts_while_its_heart_beats(tmp_path: Path) -> None:
    with other_process(hold, tmp_path) as process:
        lock = wait_for_lock(tmp_path)
        process.kill()
        process.join()
        move_to_another_machine(lock)
        content = lock.read_text()
        stop = threading.Event()

        def beat() -> None:
            number = 0
            while not stop.wait(0.1):
                number += 1
                lock.write_text(f"{number:020}{content[20:]}")

        beating = threading.Thread(target=beat)
        beating.start()
        with pytest.raises(UserError, match="node7: kill"):
            try_to_lock(tmp_path)
        stop.set()
        beating.join()
        assert lock.exists()
        try_to_lock(tmp_path)
        assert not lock.exists()


def test_a_damaged_lock_file_is_watched_and_cleared(tmp_path: Path) -> None:
    lock_folder(tmp_path).mkdir(parents=True)
    (lock_folder(tmp_path) / "x.0.lock").write_text("")
    try_to_lock(tmp_path)
    assert not list(lock_folder(tmp_path).iterdir())


def test_a_link_under_a_lock_s_name_is_refused_by_name(tmp_path: Path) -> None:
    lock_folder(tmp_path).mkdir(parents=True)
    (tmp_path / "precious").write_text("1")
    (lock_folder(tmp_path) / "x.0.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"x\.0\.lock can't be looked at"):
        try_to_lock(tmp_path)
    assert (tmp_path / "precious").read_text() == "1"


def test_every_rank_holds_a_lock_before_any_goes_on(tmp_path: Path) -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    stores = [server, TCPStore("127.0.0.1", server.port, is_master=False)]
    seen: dict[int, int] = {}
    entered = threading.Barrier(2)

    def run(rank: int) -> None:
        ranks = Ranks(rank=rank, world_size=2, local_rank=rank, local_world_size=2, store=stores[rank])
        with ranks, run_lock(tmp_path, ranks):
            if rank == 0:
                seen[rank] = len(list(lock_folder(tmp_path).glob("[!.]*.lock")))
            entered.wait(60)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == {0: 2}
    assert not list(lock_folder(tmp_path).iterdir())


def steal_lock(row: dict[str, Any], *, media: MediaLoader, output_dir: str) -> MediaSample:
    """A process function during which another start takes this one for dead."""
    for lock in lock_folder(Path(output_dir)).glob("*.lock"):
        lock.unlink()
    return media_caption(row, media=media)


def test_a_rank_that_was_taken_for_dead_writes_no_more(tmp_path: Path) -> None:
    source, output_dir = write_source(tmp_path / "source.parquet", source_rows(4)), tmp_path / "out"
    func = {"_target_": f"{__name__}.steal_lock", "output_dir": str(output_dir)}
    with pytest.raises(UserError, match="another run has taken over"):
        prepare(prepare_config(source, output_dir, process_func=func))
    assert not list(output_dir.glob("*.tar"))


def look_for_lock(row: dict[str, Any], *, media: MediaLoader) -> MediaSample:
    """A process function that rejects its row if its process has inherited the lock."""
    opened = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    if any(".lock" in path for path in opened):
        raise RowRejected(Reason.process_func_error, f"inherited {opened}")
    return media_caption(row, media=media)


def test_decode_workers_do_not_inherit_the_lock(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source.parquet", source_rows(4))
    func = {"_target_": f"{__name__}.look_for_lock"}
    totals = prepare(prepare_config(source, tmp_path / "out", process_func=func, num_workers=1))
    assert totals is not None
    assert totals.rejected == {}


def test_a_foreign_folder_gets_no_lock(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source.parquet", source_rows(1))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty and holds no run"):
        prepare(prepare_config(source, tmp_path / "out"))
    assert os.listdir(tmp_path / "out") == ["thesis.txt"]


def test_a_copy_of_a_running_dataset_is_not_locked_for_long(tmp_path: Path) -> None:
    """Its lock files are copies that nobody holds."""
    with other_process(hold, tmp_path / "out"):
        wait_for_lock(tmp_path / "out")
        shutil.copytree(tmp_path / "out", tmp_path / "copy")
        try_to_lock(tmp_path / "copy")
