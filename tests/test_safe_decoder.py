import io
import os
import pickle
import subprocess
import sys

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
