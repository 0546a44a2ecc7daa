"""Parts of a kind read before are read in place, equal to what the slow reader gives; all else goes to that one."""

from __future__ import annotations

import io
import os
import pickle
import struct

import numpy as np
import pytest
import torch

from diffusion_data import safe_decoder
from diffusion_data.part_layouts import PartLayouts
from tests.tiny_dataset import tiny_sample


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def random_tensor(seed: int, shape=(4, 2, 6, 8), dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_array(seed: int, shape=(5, 8), dtype=np.float16) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def taught(*pairs: tuple[bytes, object]) -> PartLayouts:
    layouts = PartLayouts()
    for raw, value in pairs:
        layouts.learn(raw, value)
    return layouts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64])
@pytest.mark.parametrize("shape", [(4, 2, 6, 8), (1,), (16, 1, 64, 64)])
def test_a_tensor_like_one_read_before_is_read_without_torch_load(dtype, shape):
    first, second = (random_tensor(seed, shape, dtype) for seed in (0, 1))
    layouts = taught((saved(first), first))
    read = layouts.read(memoryview(saved(second)))
    assert read.dtype == dtype
    assert read.shape == second.shape
    assert torch.equal(read, second)
    read += 1  # it is the reader's own
    assert torch.equal(read, second + 1)


@pytest.mark.parametrize("shape", [(5, 8), (1, 1), (3, 1024), (512, 1024), (40_000,)])
@pytest.mark.parametrize("protocol", [4, 5])
def test_an_array_like_one_read_before_is_read_without_pickle(shape, protocol):
    first, second = (random_array(seed, shape) for seed in (0, 1))
    raw = pickle.dumps(second, protocol)
    read = taught((pickle.dumps(first, protocol), first)).read(memoryview(raw))
    if read is None:  # frames of protocol 4 hold the values as text where they are few
        assert protocol == 4
        return
    assert read.dtype == np.float16
    np.testing.assert_array_equal(read, second)
    with pytest.raises(ValueError, match="read-only"):
        read += 1


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_a_tensor_is_the_readers_own_and_an_array_stays_where_it_is(kind):
    tensor, array = random_tensor(0), random_array(0)
    buffer = kind(saved(tensor))
    taught((saved(tensor), tensor)).read(memoryview(buffer)).zero_()
    assert buffer == saved(tensor)
    buffer = kind(pickle.dumps(array))
    read = taught((pickle.dumps(array), array)).read(memoryview(buffer))
    assert np.shares_memory(read, np.frombuffer(buffer, np.uint8))


def test_constant_and_repeating_values_are_found_at_their_place():
    """A search for the values would find zeros within the zeros of a length field."""
    for first in (np.zeros((3, 4), np.float16), np.full((3, 4), 257, np.uint16), np.ones((2, 9), np.uint8)):
        second = np.arange(first.size).astype(first.dtype).reshape(first.shape)
        read = taught((pickle.dumps(first), first)).read(memoryview(pickle.dumps(second)))
        np.testing.assert_array_equal(read, second)
    zeros, counted = torch.zeros(2, 3, 4, 4), torch.arange(96.0).reshape(2, 3, 4, 4)
    assert torch.equal(taught((saved(zeros), zeros)).read(memoryview(saved(counted))), counted)


def test_other_shapes_and_dtypes_of_the_same_length_are_not_mistaken():
    tall, wide = random_tensor(0, (4, 1, 12, 8)), random_tensor(1, (4, 1, 8, 12))
    assert len(saved(tall)) == len(saved(wide))
    layouts = taught((saved(tall), tall))
    assert layouts.read(memoryview(saved(wide))) is None
    layouts.learn(saved(wide), wide)
    assert torch.equal(layouts.read(memoryview(saved(wide))), wide)
    assert torch.equal(layouts.read(memoryview(saved(tall))), tall)
    halves, shorts = random_array(0), random_array(0).view(np.int16)
    assert taught((pickle.dumps(halves), halves)).read(memoryview(pickle.dumps(shorts))) is None


@pytest.mark.parametrize(
    "array",
    [
        np.asfortranarray(random_array(0, (4, 6))),
        random_array(0, (4, 6)).astype(">f2"),
        np.array([b"ab", b"cd"]),
        np.zeros((0, 4), np.float16),
        random_array(0, ())[()] * np.ones(()),
    ],
)
def test_arrays_in_another_order_are_left_to_the_slow_reader_or_read_right(array):
    read = taught((pickle.dumps(array), array)).read(memoryview(pickle.dumps(array)))
    assert read is None or (read.shape == array.shape and read.tolist() == array.tolist())


def test_tensors_that_are_more_than_their_values_are_left_to_the_slow_reader():
    whole = random_tensor(0, (8, 8))
    for tensor in (whole.t(), whole[2:4], whole[:, 1:3], torch.nn.Parameter(whole.float()), whole.to_sparse()):
        raw = saved(tensor)
        assert taught((raw, torch.load(io.BytesIO(raw), weights_only=True))).read(memoryview(raw)) is None
    for value in ({"latent": whole}, [whole], 3):
        assert taught((saved(value), value)).read(memoryview(saved(value))) is None


@pytest.mark.parametrize("kind", ["pth", "pickle"])
def test_any_byte_changed_around_the_values_leads_to_the_slow_reader(kind):
    """Except in what identifies an archive and in checksums, which torch doesn't read either."""
    if kind == "pth":
        value, raw = random_tensor(0, (2, 1, 4, 4)), saved(random_tensor(0, (2, 1, 4, 4)))
        varying = 4 * 4 + 40
    else:
        value, raw, varying = random_array(0), pickle.dumps(random_array(0)), 0
    layouts = taught((raw, value))
    size = value.numel() * 2 if kind == "pth" else value.nbytes
    accepted = []
    for position in range(len(raw)):
        changed = bytearray(raw)
        changed[position] ^= 0x41
        if layouts.read(memoryview(changed)) is not None:
            accepted.append(position)
    assert len(accepted) == size + varying
    for cut in (raw[:-1], raw[1:], raw + b"\0", b""):
        assert layouts.read(memoryview(cut)) is None


def test_a_hostile_part_behind_a_known_frame_runs_nothing(tmp_path):
    """Same length, same beginning and values, but a pickle that goes on after them."""

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    array = random_array(0, (64, 8))
    raw = pickle.dumps(array)
    assert safe_decoder.decode_part("pickle", raw) is not None
    evil = pickle.dumps(Hostile())
    tail = raw[:-1] + evil[2:]
    for hostile in (tail, raw[: len(raw) - len(evil)] + evil):
        try:
            decoded = safe_decoder.decode_part("pickle", hostile)
        except ValueError:
            continue
        assert isinstance(decoded, np.ndarray)
    assert not (tmp_path / "ran").exists()


def test_one_reader_does_not_vouch_for_the_other():
    tensor = random_tensor(0)
    safe_decoder.decode_part("pth", saved(tensor))
    with pytest.raises(ValueError, match="refused"):
        safe_decoder.decode_part("pickle", saved(tensor))


def test_too_many_kinds_are_read_but_not_remembered(monkeypatch):
    monkeypatch.setattr("diffusion_data.part_layouts._MOST_TRIED", 2)
    arrays = [random_array(0, (rows, 8)) for rows in (2, 3, 4)]
    layouts = taught(*((pickle.dumps(array), array) for array in arrays))
    assert [layouts.read(memoryview(pickle.dumps(array))) is None for array in arrays] == [False, False, True]


def test_what_the_writer_writes_is_read_in_place(monkeypatch):
    """Were torch or numpy to change their frames, reading would be right but slow: this test says so."""
    safe_decoder.decode_part("pth", tiny_sample(0).to_parts()["pth"])
    safe_decoder.decode_part("pickle", tiny_sample(0).to_parts()["pickle"])

    def unexpected(raw: bytes) -> None:
        raise AssertionError("the slow reader was asked")

    for extension, slow in (("pth", "load_saved_tensor"), ("pickle", "load_array_pickle")):
        layouts = safe_decoder._LAYOUTS[getattr(safe_decoder, slow)]
        monkeypatch.setitem(safe_decoder._DECODERS, extension, unexpected)
        monkeypatch.setitem(safe_decoder._LAYOUTS, unexpected, layouts)
        sample = tiny_sample(7)
        value = safe_decoder.decode_part(extension, sample.to_parts()[extension])
        if extension == "pth":
            assert torch.equal(value, sample.latent)
        else:
            np.testing.assert_array_equal(value, sample.text_embedding)


def test_random_bytes_of_a_known_length_are_refused():
    tensor = random_tensor(0)
    layouts = taught((saved(tensor), tensor))
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert layouts.read(memoryview(rng.bytes(len(saved(tensor))))) is None
    assert layouts.read(memoryview(struct.pack("<I", 0))) is None


def test_a_part_with_a_large_frame_is_not_remembered():
    """Frames are kept: crafted parts would fill the memory with them."""
    array = random_array(0)
    begin, rest = (raw := pickle.dumps(array, 3))[:2], raw[2:]
    for size, is_remembered in [(1_000, True), (100_000, False)]:
        unused = b"B" + struct.pack("<I", size) + bytes(size) + b"0"  # pushed, and popped again
        crafted = begin + unused + rest
        assert np.array_equal(pickle.loads(crafted), array)
        assert (taught((crafted, array)).read(memoryview(crafted)) is not None) == is_remembered
