import io
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from diffusion_data.safe_decoder import BadPart, SafeDecoder, decode_part


class Hostile:
    """Unpickling it makes a folder, which a test can look for."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def saved(value) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_every_pickle_protocol_are_read(protocol):
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    decoded = decode_part("pickle", pickle.dumps(array, protocol))
    assert decoded.dtype == np.float16
    assert decoded.tolist() == array.tolist()


def test_arrays_in_fortran_order_and_pickles_of_numpy_1_are_read():
    array = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    raw = pickle.dumps(array, 2)
    assert b"numpy._core" in raw or b"numpy.core" in raw
    for module in (b"numpy._core", b"numpy.core"):
        assert decode_part("pickle", raw.replace(b"numpy._core", module)).tolist() == array.tolist()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_read_from_pickle_and_from_pth(dtype):
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    for name, raw in [("pickle", pickle.dumps(tensor)), (".pickle", pickle.dumps([tensor])), ("pth", saved(tensor))]:
        decoded = decode_part(name, raw)
        decoded = decoded[0] if isinstance(decoded, list) else decoded
        assert decoded.dtype == dtype
        assert torch.equal(decoded, tensor)


def test_json_and_unknown_parts():
    assert decode_part("json", b'{"a": 1}') == {"a": 1}
    assert decode_part("txt", b"as it is") == b"as it is"


def test_hostile_pickle_and_pth_run_nothing(tmp_path):
    marker = tmp_path / "ran"
    tensor_within = pickle.dumps({"x": torch.zeros(1), "y": Hostile(str(marker))})
    for name, raw in [
        ("pickle", pickle.dumps(Hostile(str(marker)))),
        ("pickle", tensor_within),
        ("pkl", pickle.dumps(os.system)),
        ("pth", saved(Hostile(str(marker)))),
        ("pth", pickle.dumps(Hostile(str(marker)))),
        (".pth", saved({"latent": torch.zeros(1), "extra": Hostile(str(marker))})),
    ]:
        with pytest.raises(ValueError, match=name):
            decode_part(name, raw)
    assert not marker.exists()


def test_a_tensor_pickle_whose_inner_bytes_are_hostile_runs_nothing(tmp_path):
    """torch pickles a storage as bytes for its own loader, which would run what they hold."""
    marker = tmp_path / "ran"

    class Storage:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (saved(Hostile(str(marker))),)

    with pytest.raises(ValueError, match="refused"):
        decode_part("pickle", pickle.dumps(Storage()))
    assert not marker.exists()


def test_a_codec_can_not_be_chosen_by_the_pickle():
    class Encoded:
        def __reduce__(self):
            import _codecs

            return _codecs.encode, ("text", "rot13")

    with pytest.raises(ValueError, match="codec"):
        decode_part("pickle", pickle.dumps(Encoded()))


class Calls:
    """A pickle that calls `function`, and then gives `state` to what came of it."""

    def __init__(self, function, *arguments, state=None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


STORAGE = torch.storage.TypedStorage(wrap_storage=torch.zeros(4).untyped_storage(), dtype=torch.float32, _internal=True)
load_from_bytes = torch.storage._load_from_bytes
reconstruct, frombuffer = np.zeros(1).__reduce__()[0], np.zeros(1).__reduce_ex__(5)[0]
rebuild = torch._utils._rebuild_tensor_v2


@pytest.mark.parametrize(
    "hostile",
    {
        "bytes as addresses of objects": Calls(np.ndarray, (4,), "O", b"A" * 32),
        "objects from a buffer": Calls(frombuffer, b"A" * 32, np.dtype("O"), (4,), "C"),
        "objects as a state": Calls(reconstruct, np.ndarray, (0,), b"b", state=(1, (1,), np.dtype("O"), False, [1])),
        "memory that was not filled": Calls(np.ndarray, (1 << 20,)),
        "a shape of more than the bytes": Calls(
            reconstruct, np.ndarray, (0,), b"b", state=(1, (1 << 30,), np.dtype("f4"), False, b"abcd")
        ),
        "a dtype of dtypes": Calls(np.dtype, "i4," * 1000 + "i4"),
        "a large dtype": Calls(frombuffer, b"", np.dtype("V2147483647"), (0,), "C"),
        "a tensor beyond its storage": Calls(rebuild, STORAGE, 0, (1 << 20,), (1,), False, None),
        "a stride beyond its storage": Calls(rebuild, STORAGE, 0, (4,), (1 << 20,), False, None),
        "an offset before its storage": Calls(rebuild, STORAGE, -4, (4,), (1,), False, None),
        "a stride of 0": Calls(rebuild, STORAGE, 0, (1 << 40,), (0,), False, None),
        "other defaults of a function": Calls(rebuild, state=(None, {"__defaults__": (1,)})),
        "one tensor many times": [torch.zeros(1000)] * 10_000,
        "a number": 3.5,
        "a dict": {"a": np.zeros(3)},
    }.items(),
    ids=lambda named: named[0],
)
def test_what_plays_with_arrays_and_tensors_is_refused(hostile) -> None:
    with pytest.raises(ValueError, match="'pickle' is refused"):
        decode_part("pickle", pickle.dumps(hostile[1]))


def test_a_pickle_can_not_change_a_function_that_it_may_call():
    """BUILD with a pair sets attributes of whatever stands there."""
    defaults = rebuild.__defaults__
    raw = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__K\x01\x85s\x86b."
    with pytest.raises(ValueError, match="not to be changed"):
        decode_part("pickle", raw)
    assert rebuild.__defaults__ == defaults


@pytest.mark.parametrize(
    "raw",
    {
        "a shared tuple of 2 ** 40": b"\x80\x02K\x01" + b"2\x86" * 40 + b".",
        "a place far out in the memo": b"\x80\x04K\x01r" + (2**31 - 1).to_bytes(4, "little") + b".",
        "a byte string of a terabyte": b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"x",
        "a million operations": b"\x80\x02" + b"K\x010" * 500_000 + b"K\x01.",
    }.items(),
    ids=lambda named: named[0],
)
def test_a_pickle_that_needs_memory_or_time_out_of_proportion_is_refused(raw):
    with pytest.raises(ValueError, match="'pickle' is refused"):
        decode_part("pickle", raw[1])


def test_a_compressed_pth_is_refused_before_it_grows():
    bomb = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(torch.zeros(1 << 20)))) as plain, zipfile.ZipFile(bomb, "w", 8) as packed:
        for member in plain.infolist():
            packed.writestr(member.filename, plain.read(member))
    assert len(bomb.getvalue()) < 10_000
    for name, raw in [("pth", bomb.getvalue()), ("pickle", pickle.dumps(Calls(load_from_bytes, bomb.getvalue())))]:
        with pytest.raises(ValueError, match="compressed"):
            decode_part(name, raw)


@pytest.mark.parametrize(
    "value",
    [torch.zeros(3).expand(1 << 20, 3), torch.zeros(3).to_sparse(), {"latent": torch.zeros(3)}, [torch.zeros(3)], 7],
    ids=["expanded", "sparse", "dict", "list", "number"],
)
def test_a_pth_is_one_plain_tensor_that_its_bytes_can_hold(value):
    with pytest.raises(ValueError, match="'pth' is refused"):
        decode_part("pth", saved(value))


@pytest.mark.parametrize("name", ["pth", "pickle", "json"])
@pytest.mark.parametrize("raw", [b"", b"not what it should be", b"\x80\x05", b"[" * 100_000])
def test_broken_parts_are_named(name, raw):
    with pytest.raises(ValueError, match=f"part '{name}' is refused"):
        decode_part(name, raw)


def test_a_sample_keeps_its_good_parts_and_marks_the_bad_ones():
    decoded = SafeDecoder()({"__key__": "a", "__restore_key__": ("x", 1), "json": b"{}", ".pth": b"junk"})
    assert decoded["__key__"] == "a"
    assert decoded["__restore_key__"] == ("x", 1)
    assert decoded["json"] == {}
    assert isinstance(decoded[".pth"], BadPart)
    assert "'.pth'" in decoded[".pth"].reason


def test_the_package_imports_without_energon():
    code = "import diffusion_data, sys; assert not any(m.startswith(('megatron', 'torch')) for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
