"""Which files may be opened, here and on remote filesystems, and what exactly becomes of the others."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from diffusion_data.errors import Reason
from tests.fetching import fetch, reason


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a b.png").write_bytes(b"inside")
    (tmp_path / "outside.png").write_bytes(b"outside")
    (tmp_path / "data2").mkdir()
    (tmp_path / "data2" / "c.png").write_bytes(b"beside")
    return folder


def test_paths_below_the_root_open(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = root / "images" / "a b.png"
    for reference in ("images/a b.png", "./images/../images/a b.png", str(inside), inside.as_uri()):
        assert fetch(reference, root) == b"inside"
    assert fetch("images/a b.png", root.as_uri()) == b"inside"
    monkeypatch.chdir(root)
    assert fetch("a b.png", "images") == b"inside"


def test_a_root_may_be_a_link_itself(root: Path) -> None:
    link = root.parent / "link"
    link.symlink_to(root)
    assert fetch("images/a b.png", link) == b"inside"


def test_paths_that_lead_out_are_forbidden(root: Path) -> None:
    (root / "link.png").symlink_to(root.parent / "outside.png")
    (root / "linked").symlink_to(root.parent)
    outside = root.parent / "outside.png"
    for reference in (
        "../outside.png",
        "images/../../outside.png",
        "../data2/c.png",  # its name merely begins like the root's
        "link.png",
        "linked/outside.png",
        str(outside),
        outside.as_uri(),
        "/etc/passwd",
        "../no_such_file",  # whether it exists is not told either
    ):
        assert reason(reference, root) == Reason.forbidden_path


def test_allowed_roots_widen_what_may_be_read(root: Path) -> None:
    (root / "link.png").symlink_to(root.parent / "data2" / "c.png")
    allowed = [str(root.parent / "data2")]
    for reference in ("../data2/c.png", "link.png", str(root.parent / "data2" / "c.png")):
        assert fetch(reference, root, allowed_roots=allowed) == b"beside"
    assert reason("../outside.png", root, allowed_roots=allowed) == Reason.forbidden_path


def test_missing_files_are_not_found(root: Path) -> None:
    for reference in ("no.png", "images/a b.png/x", "n" * 300 + ".png"):
        assert reason(reference, root) == Reason.not_found


def test_only_regular_files_are_read_and_nothing_blocks(root: Path) -> None:
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as unix:
        here = Path.cwd()
        os.chdir(root)  # socket paths are short
        try:
            unix.bind("socket")
        finally:
            os.chdir(here)
        for reference in ("fifo", "socket", "images", ".", "nul\0byte"):
            assert reason(reference, root) == Reason.forbidden_path
        assert reason("/dev/zero", root, allowed_roots=["/dev"]) == Reason.forbidden_path


def test_files_of_the_kernel_are_forbidden_wherever_one_may_read(root: Path) -> None:
    (root / "environment").symlink_to("/proc/self/environ")
    for reference in (
        "environment",
        "/proc/self/environ",
        "/proc/1/../self/mem",
        "/proc/thread-self/root/proc/kmsg",
        "/sys/kernel",
    ):
        assert reason(reference, root, allowed_roots=["/"]) == Reason.forbidden_path


@pytest.mark.parametrize(
    ("number", "expected"), [(errno.EACCES, Reason.forbidden_path), (errno.EIO, Reason.fetch_error)]
)
def test_refused_and_failing_reads_are_told_apart(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: Reason
) -> None:
    def fail(*args: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", fail)
    assert reason("images/a b.png", root) == expected


@pytest.fixture
def bucket() -> Iterator[str]:
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/bucket/data/a.png", b"remote")
    filesystem.pipe("/bucket/secret.png", b"secret")
    yield "memory://bucket/data"
    filesystem.rm("/bucket", recursive=True)


def test_relative_paths_below_a_remote_root_open(bucket: str) -> None:
    assert fetch("a.png", bucket) == b"remote"
    assert fetch(f"{bucket}/a.png", bucket) == b"remote"
    assert fetch(f"{bucket}/a.png", "/nowhere", allowed_roots=[bucket]) == b"remote"


def test_remote_rejects_are_exact(bucket: str) -> None:
    assert reason("no.png", bucket) == Reason.not_found
    assert reason("../secret.png", bucket) == Reason.forbidden_path
    assert reason("/etc/passwd", bucket) == Reason.forbidden_path
    assert reason("memory://bucket/secret.png", bucket) == Reason.forbidden_url
    assert reason(f"{bucket}/../secret.png", bucket) == Reason.forbidden_url
    assert reason("a.png", bucket, max_fetch_bytes=5) == Reason.too_large


def test_failing_filesystem_is_a_fetch_error(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("the service is away")

    monkeypatch.setattr(fsspec, "open", fail)
    assert reason("a.png", bucket) == Reason.fetch_error
