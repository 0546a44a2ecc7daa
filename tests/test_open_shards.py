"""What the system holds in memory is mapped; everything else is left to whoever reads from the disk."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_data import open_shards
from diffusion_data.diffusion_energon_datamodule import DiffusionDataModule
from diffusion_data.diffusion_sample import CookedSample, DiffusionSample
from diffusion_data.diffusion_taskencoder import BasicDiffusionTaskEncoder
from diffusion_data.latent_sample import LATENT_PART, TEXT_PART
from diffusion_data.open_shards import Place, Shard
from tests.tiny_dataset import tiny_sample, write_dataset


@pytest.fixture
def three(tmp_path) -> Path:
    return write_dataset(tmp_path / "ds", [tiny_sample(row) for row in range(3)])


def places(folder: Path) -> list[Place]:
    shard = Shard(folder / "shard_000000.tar")
    return [shard.place(number, "shard_000000.tar") for number in range(3)]


def needs_memory(place: Place) -> None:
    if place.read_from_memory() is None:
        pytest.skip("this system can't tell what it holds in memory")


def test_a_sample_just_written_is_in_memory_and_is_not_copied(three):
    needs_memory(places(three)[0])
    for place in places(three):
        found, again = place.read_from_memory(), place.read_from_memory()
        assert found == place.read()
        assert np.shares_memory(np.frombuffer(found, np.uint8), np.frombuffer(again, np.uint8))


def test_what_was_mapped_outlives_its_shard(three):
    place = places(three)[1]
    needs_memory(place)
    expected, found = bytes(place.read()), place.read_from_memory()
    del place
    assert found == expected


def test_writing_to_what_was_mapped_changes_no_file(three):
    place = places(three)[1]
    needs_memory(place)
    before = (three / "shard_000000.tar").read_bytes()
    place.read_from_memory()[:] = bytes(place.end - place.begin)
    assert (three / "shard_000000.tar").read_bytes() == before


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system can't be told to forget a file")
def test_a_sample_that_the_system_forgot_is_not_in_memory_and_is_after_reading(three):
    place = places(three)[1]
    with (three / "shard_000000.tar").open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if place.read_from_memory() is not None:
        pytest.skip("this file system keeps its files in memory")
    block = place.read()
    assert block is not None
    assert place.read_from_memory() == block


def test_a_long_sample_is_in_memory_only_if_its_middle_is(tmp_path, monkeypatch):
    (tmp_path / "x.tar").write_bytes(bytes(5 << 20))
    (tmp_path / "x.tar.idx").write_bytes(np.array([0, 5 << 20], np.uint64).tobytes())
    place = Shard(tmp_path / "x.tar").place(0, "x.tar")
    needs_memory(place)
    read = os.preadv

    def middle_is_gone(file: int, buffers: list, offset: int, flags: int = 0) -> int:
        if flags and 2 << 20 <= offset < 3 << 20:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return read(file, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", middle_is_gone)
    assert place.read_from_memory() is None
    assert place.read() == bytes(5 << 20)


def test_what_was_cut_off_since_is_not_touched(three):
    """A mapped page beyond the end of the file would end the process."""
    whole = places(three)
    needs_memory(whole[0])
    with (three / "shard_000000.tar").open("r+b") as file:
        file.truncate(whole[2].begin + 100)
    assert whole[0].read_from_memory() is not None
    assert whole[2].read_from_memory() is None
    assert whole[2].read() is None


def test_a_system_that_maps_nothing_has_nothing_in_memory(three, monkeypatch):
    def refused(*arguments: object, **options: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refused)
    assert places(three)[1].read_from_memory() is None
    assert places(three)[1].read() is not None


def test_where_the_system_cannot_tell_nothing_is_in_memory(three, monkeypatch):
    def unsupported(*arguments: object) -> int:
        raise OSError(95, "Operation not supported")

    place = places(three)[1]
    monkeypatch.setattr(os, "preadv", unsupported)
    assert place.read_from_memory() is None
    monkeypatch.setattr(open_shards, "_NOWAIT", None)
    assert place.read_from_memory() is None


def test_a_place_beyond_the_index_is_not_in_memory(three):
    beyond = places(three)[0].shard.place(3, "shard_000000.tar")
    assert beyond.read_from_memory() is None
    assert beyond.read() is None


class Changing(BasicDiffusionTaskEncoder):
    """What somebody's task encoder may do: changes the tensor it was given."""

    def encode_sample(self, sample: CookedSample) -> DiffusionSample:
        sample.parts[LATENT_PART].mul_(2)
        with pytest.raises(ValueError, match="read-only"):
            sample.parts[TEXT_PART][:] = 0
        return super().encode_sample(sample)


def test_a_task_encoder_that_changes_its_samples_gets_them_unchanged_the_next_time(three):
    module = DiffusionDataModule(
        three,
        micro_batch_size=1,
        global_batch_size=1,
        num_workers=0,
        task_encoder=Changing(text_embedding_padding_size=8),
    )
    passes: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for found in passes:
        for batch in module.train_dataloader():
            found[batch["__key__"][0]] = batch["video"]
            if len(found) == 3:
                break
    assert all(found.keys() == passes[0].keys() for found in passes)
    assert all(torch.equal(found[key], video) for found in passes for key, video in passes[0].items())
