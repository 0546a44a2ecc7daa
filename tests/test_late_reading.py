"""Samples are read after the shuffle, some ahead of their use; neither changes what comes, and in what order."""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import pytest
import yaml
from megatron.energon import WorkerConfig, get_train_dataset, get_val_dataset

from diffusion_data.diffusion_energon_datamodule import DiffusionDataModule
from diffusion_data.diffusion_taskencoder import BasicDiffusionTaskEncoder
from diffusion_data.errors import UserError
from diffusion_data.late_reading import ReadThreads, late_readers
from diffusion_data.open_shards import Shard
from diffusion_data.safe_decoder import SafeDecoder
from diffusion_data.sample_reader import LocalTarReader
from tests import datamodules
from tests.tiny_dataset import tiny_sample, write_dataset

EVERY_PLACE = os.environ.get("RESUME_FROM_EVERY_PLACE")  # instead of from every fifth


@pytest.fixture(scope="module")
def twelve(tmp_path_factory) -> Path:
    samples = [tiny_sample(row) for row in range(12)]
    return write_dataset(tmp_path_factory.mktemp("twelve") / "ds", samples, per_shard=2)


def module(path: Path, read_ahead: int, **options) -> DiffusionDataModule:
    return datamodules.module(path, read_ahead=read_ahead, shuffle_buffer_size=5, **options)


def endless(data: DiffusionDataModule) -> Iterator[int]:
    loader = data.train_dataloader()
    while True:
        for batch in loader:
            yield int(batch["__key__"][0][-9:])


def dataset_of(path: Path, training: bool, encoder: BasicDiffusionTaskEncoder | None = None):
    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    options = {"split_part": "train", "worker_config": config, "batch_size": 1}
    options["task_encoder"] = encoder or BasicDiffusionTaskEncoder()
    if training:
        return get_train_dataset(str(path), shuffle_buffer_size=4, max_samples_per_sequence=None, **options)
    return get_val_dataset(str(path), **options)


@pytest.fixture(autouse=True)
def cached(request, monkeypatch) -> None:
    """Which samples the system seems to hold in memory; none, unless a test says all or some."""
    which = getattr(request, "param", "none")
    answers = cycle({"all": [True], "none": [False], "some": [True, False, False]}[which])

    def read_from_memory(shard: Shard, begin: int, end: int) -> memoryview | None:
        return shard.read(begin, end) if next(answers) else None

    monkeypatch.setattr(Shard, "read_from_memory", read_from_memory)


wherever_samples_are = pytest.mark.parametrize("cached", ["all", "none", "some"], indirect=True)


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The names of the threads that read a sample, a name for each read."""
    names: list[str] = []
    read = Shard.read

    def noted(shard: Shard, begin: int, end: int) -> memoryview | None:
        names.append(threading.current_thread().name)
        return read(shard, begin, end)

    monkeypatch.setattr(Shard, "read", noted)
    return names


@wherever_samples_are
@pytest.mark.parametrize("num_workers", [0, 2])
def test_reading_ahead_changes_no_order(twelve, num_workers):
    orders = [list(islice(endless(module(twelve, n, num_workers=num_workers)), 40)) for n in (0, 20)]
    assert orders[0] == orders[1]
    assert set(orders[0]) == set(range(12))


@wherever_samples_are
def test_every_pass_holds_each_sample_once(twelve):
    order = list(islice(endless(module(twelve, 4)), 36))
    assert [sorted(order[start : start + 12]) for start in (0, 12, 24)] == [list(range(12))] * 3


@wherever_samples_are
@pytest.mark.parametrize(("before", "after"), [(0, 0), (4, 4), (4, 0), (0, 4), (30, 2)])
def test_resumes_exactly_wherever_it_was_saved_and_with_another_read_ahead(twelve, before, after):
    reference = module(twelve, before)
    order, states = [], []
    for row in islice(endless(reference), 28):
        order.append(row)
        states.append(reference.state_dict())
    for done, state in list(enumerate(states[:26], start=1))[:: 1 if EVERY_PLACE else 5]:
        resumed = module(twelve, after)
        resumed.load_state_dict(state)
        assert list(islice(endless(resumed), len(order) - done)) == order[done:], done


def test_nothing_is_read_before_it_is_wanted_but_what_is_read_ahead(twelve, reads):
    """The shuffle buffer would else be full of samples that were read."""
    next(endless(module(twelve, 0)))
    assert reads == ["MainThread"]
    reads.clear()
    list(islice(endless(module(twelve, 3)), 2))
    assert len(reads) <= 4
    assert reads.pop(0) == "MainThread"  # which finds out that the samples aren't in memory
    assert reads
    assert set(reads) <= {"read_ahead_0", "read_ahead_1", "read_ahead_2"}


@pytest.mark.parametrize("cached", ["all"], indirect=True)
def test_samples_in_memory_need_no_thread(twelve, reads):
    before = set(threading.enumerate())
    list(islice(endless(module(twelve, 3)), 6))
    assert set(reads) == {"MainThread"}
    assert set(threading.enumerate()) <= before


def test_resuming_reads_no_sample_that_waits_in_the_shuffle_buffer(twelve, reads):
    reference = module(twelve, 0)
    list(islice(endless(reference), 3))
    state = reference.state_dict()
    reads.clear()
    resumed = module(twelve, 0)
    resumed.load_state_dict(state)
    next(endless(resumed))
    assert len(reads) == 1


@pytest.mark.parametrize("read_ahead", [0, 3])
def test_samples_that_the_metadata_excludes_are_left_out(tmp_path, read_ahead):
    folder = write_dataset(tmp_path / "ds", [tiny_sample(row) for row in range(6)], per_shard=3)
    split = folder / ".nv-meta" / "split.yaml"
    described = yaml.safe_load(split.read_text())
    described["exclude"] = ["shard_000000.tar/samples/sample_000000001"]
    split.write_text(yaml.safe_dump(described))
    order = list(islice(endless(module(folder, read_ahead)), 20))
    assert set(order) == {0, 2, 3, 4, 5}


@pytest.mark.parametrize("read_ahead", [0, 3])
def test_an_error_of_a_read_stops_the_stream_where_the_sample_was_due(twelve, monkeypatch, read_ahead):
    undisturbed = list(islice(endless(module(twelve, read_ahead)), 12))
    begun: list[int] = []
    read = Shard.read

    def failing(shard: Shard, begin: int, end: int) -> memoryview | None:
        begun.append(begin)
        if len(begun) == 6:
            raise OSError(5, "the disk is gone")
        return read(shard, begin, end)

    monkeypatch.setattr(Shard, "read", failing)
    came: list[int] = []

    def take_all() -> None:
        for row in endless(module(twelve, read_ahead)):
            came.append(row)  # noqa: PERF402 - those before the error stay

    with pytest.raises(OSError, match="the disk is gone"):
        take_all()
    assert came == undisturbed[: len(came)]
    assert len(came) == 5 or read_ahead  # threads may finish in another order than they were asked in


@pytest.mark.parametrize("between", [0, 4])
def test_a_place_at_the_end_of_a_pass_leaves_the_next_passes_whole(twelve, between):
    """Whatever read_ahead was when the state was saved, and saved again."""
    first = module(twelve, 4, repeat=False)
    list(first.train_dataloader())
    second = module(twelve, between, repeat=False)
    second.load_state_dict(first.state_dict())
    begun = [batch["__key__"][0] for batch in islice(second.train_dataloader(), 5)]
    third = module(twelve, 4, repeat=False)
    third.load_state_dict(second.state_dict())
    rest = [batch["__key__"][0] for batch in third.train_dataloader()]
    assert len({*begun, *rest}) == len(begun) + len(rest) == 12
    assert len({batch["__key__"][0] for batch in third.train_dataloader()}) == 12


@pytest.mark.parametrize("damage", ["tar", "index"])
def test_a_damaged_shard_stops_training_and_is_named(tmp_path, damage):
    folder = write_dataset(tmp_path / "ds", [tiny_sample(row) for row in range(3)])
    if damage == "tar":
        tar = folder / "shard_000000.tar"
        tar.write_bytes(tar.read_bytes()[:1500])
    else:
        (folder / "shard_000000.tar.idx").write_bytes(struct.pack("<4Q", 0, 1 << 62, 1 << 63, (1 << 64) - 1))
    with pytest.raises(UserError, match=r"ds: sample number \d of the split can't be read: .*verify_dataset\.py"):
        list(islice(endless(module(folder, 2)), 6))


def test_iterating_again_after_an_error_tells_the_same_error(tmp_path, monkeypatch):
    loader = module(write_dataset(tmp_path / "ds", [tiny_sample(0)]), 0).train_dataloader()

    def failing(shard: Shard, begin: int, end: int) -> memoryview | None:
        raise OSError(5, "the disk is gone")

    monkeypatch.setattr(Shard, "read", failing)
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(iter(loader))


def test_threads_end_with_the_stream(twelve):
    before = set(threading.enumerate())
    data = module(twelve, 3)
    list(islice(endless(data), 2))
    reading = [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("read_ahead")]
    assert len(reading) == 3
    data.teardown()
    for thread in reading:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in reading)


def test_results_come_in_the_order_in_which_they_were_begun():
    threads = ReadThreads(3)
    first_may_end = threading.Event()
    threads.begin(lambda: first_may_end.wait(timeout=30))
    for number in range(7):
        threads.begin(lambda number=number: number)
    first_may_end.set()
    assert threads.next() is True
    assert [threads.next() for _ in range(7)] == list(range(7))
    threads.close()


@pytest.mark.parametrize("training", [True, False])
def test_training_and_validation_read_late(twelve, training):
    """Were energon to arrange its datasets differently, reading would be right but slow: this test says so."""
    (reader,) = late_readers(dataset_of(twelve, training))
    assert type(reader.reader) is LocalTarReader


def test_a_decoder_of_the_users_gets_bytes_from_energons_reader(twelve):
    class Own(SafeDecoder):
        pass

    encoder = BasicDiffusionTaskEncoder()
    encoder.decoder = Own()
    assert late_readers(dataset_of(twelve, True, encoder)) == []


def test_a_negative_read_ahead_is_refused(twelve):
    with pytest.raises(UserError, match="read_ahead must not be negative, got -1"):
        module(twelve, -1)


def test_the_state_holds_numbers_of_samples_only(twelve):
    data = module(twelve, 4)
    next(endless(data))
    assert len(json.dumps(data.state_dict(), default=lambda value: f"<{type(value).__name__}>")) < 30_000
