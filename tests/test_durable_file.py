"""A file under its final name is complete, or it isn't there."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from diffusion_data.durable_file import durable_file, remove_partial_files


def test_what_is_written_appears_under_the_final_name_counted_and_hashed(tmp_path: Path) -> None:
    final = tmp_path / "x.tar"
    with durable_file(final) as file:
        file.write(b"abc")
        assert not final.exists()
        file.write(b"de")
    assert final.read_bytes() == b"abcde"
    assert (file.num_bytes, file.sha256) == (5, hashlib.sha256(b"abcde").hexdigest())
    assert os.listdir(tmp_path) == ["x.tar"]


def test_an_exception_leaves_what_was_there_before(tmp_path: Path) -> None:
    final = tmp_path / "x.tar"
    final.write_bytes(b"before")
    writing = durable_file(final)
    writing.__enter__().write(b"half")
    assert not writing.__exit__(KeyError, KeyError(), None)
    assert final.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["x.tar"]


def test_data_is_flushed_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor: int) -> None:
        happened.append("flush " + ("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"))
        fsync(descriptor)

    def note_replace(self: Path, target: Path) -> Path:
        happened.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    with durable_file(tmp_path / "x") as file:
        file.write(b"abc")
    assert happened == ["flush file", "rename", "flush folder"]


def test_only_partial_files_are_cleared(tmp_path: Path) -> None:
    (tmp_path / ".x.tar.12.partial").write_bytes(b"half")
    (tmp_path / "x.tar").write_bytes(b"whole")
    (tmp_path / ".hidden").write_bytes(b"somebody's")
    remove_partial_files(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "x.tar"]
