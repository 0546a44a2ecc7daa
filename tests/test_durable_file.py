"""A file under its final name is complete, or it isn't there."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from diffusion_data.durable_file import (
    durable_file,
    explained,
    flush_file,
    make_folder,
    read_plain_file,
    remove_folder,
    remove_partial_files,
    sha256_of_file,
    size_of_plain_file,
)
from diffusion_data.errors import UserError


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
    with durable_file(tmp_path / "x", before_rename=lambda: happened.append("last moment")) as file:
        file.write(b"abc")
    assert happened == ["flush file", "last moment", "rename", "flush folder"]


def test_what_is_discarded_or_fails_before_the_rename_leaves_what_was_there_before(tmp_path: Path) -> None:
    final = tmp_path / "x.tar"
    final.write_bytes(b"before")
    called: list[str] = []
    with durable_file(final, before_rename=lambda: called.append("before rename")) as file:
        file.write(b"unwanted")
        file.discard()
    assert (called, final.read_bytes(), os.listdir(tmp_path)) == ([], b"before", ["x.tar"])

    def fail() -> None:
        raise OSError(errno.EIO, "no")

    with pytest.raises(OSError, match="no"), durable_file(final, before_rename=fail) as file:
        file.write(b"new")
    assert (final.read_bytes(), os.listdir(tmp_path)) == (b"before", ["x.tar"])


@pytest.mark.parametrize(
    ("name", "error"),
    [("nowhere/x.tar", FileNotFoundError), ("file/x.tar", NotADirectoryError), ("folder", IsADirectoryError)],
)
def test_a_name_that_cannot_be_written_is_told_as_it_was_given(tmp_path: Path, name: str, error: type[OSError]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(error) as raised, durable_file(tmp_path / name) as file:
        file.write(b"abc")
    assert str(raised.value) == f"[Errno {raised.value.errno}] {raised.value.strerror}: '{tmp_path / name}'"
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_only_partial_files_are_cleared(tmp_path: Path) -> None:
    (tmp_path / ".x.tar.12.partial").write_bytes(b"half")
    (tmp_path / "x.tar").write_bytes(b"whole")
    (tmp_path / ".hidden").write_bytes(b"somebody's")
    remove_partial_files(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "x.tar"]


def test_folders_are_made_with_those_above_them_and_removed_whole(tmp_path: Path) -> None:
    make_folder(tmp_path / "a/b/c")
    make_folder(tmp_path / "a/b/c")
    (tmp_path / "a/b/c/file").write_bytes(b"x")
    remove_folder(tmp_path / "a")
    remove_folder(tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("precious")
    remove_folder(tmp_path / "link")
    (tmp_path / ".x.1.partial").symlink_to("precious")
    remove_partial_files(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["precious", "precious/file"]


@pytest.mark.parametrize("what", ["link", "folder", "pipe"])
def test_only_plain_files_are_read_and_nothing_is_waited_for(tmp_path: Path, what: str) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert read_plain_file(tmp_path / "file") == b"abc"
    assert size_of_plain_file(tmp_path / "file") == 3
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest()
    match what:
        case "link":
            (tmp_path / "x").symlink_to("file")
        case "folder":
            (tmp_path / "x").mkdir()
        case "pipe":
            os.mkfifo(tmp_path / "x")
    assert size_of_plain_file(tmp_path / "x") is None
    with pytest.raises(OSError, match="x is not a plain file"):
        read_plain_file(tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        read_plain_file(tmp_path / "nothing")


def test_what_the_disk_refuses_is_told_with_what_to_do(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"can't work in .*No such file.*run the same command again"),
        explained(tmp_path),
    ):
        flush_file(tmp_path / "nothing")
