"""A tar from anywhere is read as a row of samples or refused by name; nothing in it leads elsewhere."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import pytest

from diffusion_data.shard_reader import read_keys, read_shard
from tests.tiny_dataset import tiny_sample


def shard(path: Path, *members: tuple[tarfile.TarInfo | str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for member, content in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample_members(row: int, key: str | None = None) -> list[tuple[str, bytes]]:
    sample = tiny_sample(row)
    return [(f"{key or sample.key}.{part}", raw) for part, raw in sample.to_parts().items()]


def test_samples_come_in_order(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", *sample_members(3), *sample_members(1))
    assert [sample.key for sample in read_shard(path)] == ["samples/sample_000000003", "samples/sample_000000001"]


def test_those_that_are_wanted_are_read_and_no_others(tmp_path: Path) -> None:
    damaged = [(name, b"no latent") for name, _ in sample_members(1)]
    path = shard(tmp_path / "a.tar", *sample_members(0), *damaged, *sample_members(2))
    keys = list(read_keys(path))
    assert keys == [f"samples/sample_{row:09d}" for row in range(3)]
    assert [sample.key for sample in read_shard(path, {keys[0], keys[2]})] == [keys[0], keys[2]]


def test_folders_links_and_devices_are_passed_by(tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text('{"caption": "secret"}')
    others = []
    for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
        info = tarfile.TarInfo(f"other_{kind.decode()}.json")
        info.type, info.linkname = kind, str(tmp_path / "secret.json")
        others.append((info, b""))
    inside = tarfile.TarInfo("link.pth")  # tarfile itself would follow this one
    inside.type, inside.linkname = tarfile.LNKTYPE, "samples/sample_000000000.pth"
    path = shard(tmp_path / "a.tar", *sample_members(0), *others, (inside, b""), *sample_members(1))
    assert [sample.metadata["caption"] for sample in read_shard(path)] == ["caption 0", "caption 1"]


@pytest.mark.parametrize("key", ["/etc/passwd", "../../home/x", "samples/../../x"])
def test_a_key_that_leads_out_is_refused(tmp_path: Path, key: str) -> None:
    path = shard(tmp_path / "a.tar", *sample_members(0, key))
    with pytest.raises(ValueError, match=rf"a\.tar: {key}: a key can't lead out"):
        list(read_shard(path))


def test_a_hostile_part_is_refused_with_shard_and_key(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> object:
            return os.mkdir, (str(tmp_path / "ran"),)

    members = dict(sample_members(0))
    members["samples/sample_000000000.pickle"] = pickle.dumps(Hostile())
    path = shard(tmp_path / "a.tar", *members.items())
    with pytest.raises(ValueError, match=r"a\.tar: samples/sample_000000000: part 'pickle' is refused.*mkdir"):
        list(read_shard(path))
    assert not (tmp_path / "ran").exists()


def test_a_sparse_file_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.json")
    info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,2",
                        "GNU.sparse.size": "1000000000000", "GNU.sparse.name": "a.json"}  # fmt: skip
    with pytest.raises(ValueError, match=r"a\.tar: a\.json is a sparse file"):
        list(read_shard(shard(tmp_path / "a.tar", (info, b"{}"))))


@pytest.mark.parametrize("compression", ["gz", "xz"])
def test_a_compressed_shard_is_refused(tmp_path: Path, compression: str) -> None:
    with tarfile.open(tmp_path / "a.tar", f"w:{compression}"):
        pass
    with pytest.raises(ValueError, match=r"a\.tar: damaged"):
        list(read_shard(tmp_path / "a.tar"))


@pytest.mark.parametrize("kept", [700, 1100, -3000])
def test_a_cut_shard_is_refused_by_name(tmp_path: Path, kept: int) -> None:
    path = shard(tmp_path / "a.tar", *sample_members(0))
    path.write_bytes(path.read_bytes().rstrip(b"\0")[:kept])
    with pytest.raises(ValueError, match=r"a\.tar: "):
        list(read_shard(path))
