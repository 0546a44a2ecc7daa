"""A reference out of a row (path or URL) -> an open binary file, seekable, positioned at 0.

A row may name files below the parquet's own folder (root) and below the folders that the user allowed, and
nothing else: `..` and symbolic links that lead out are refused, and so is all that is not a regular file,
without ever blocking on a pipe or a device. root may be a local folder, an fsspec URL (hf://, s3://, ...)
or an http(s) URL.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import quote, unquote, urlsplit

from diffusion_data.errors import Reason, RowRejected
from diffusion_data.http_fetch import HttpFetcher, urlsplit_scheme

if TYPE_CHECKING:
    from diffusion_data.media import MediaConfig

_OPEN_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_NONBLOCK", 0)  # a pipe without a writer would block for ever
    | getattr(os, "O_NOFOLLOW", 0)  # the path is resolved already
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_CLOEXEC", 0)
)

_NEVER_DATA = ("/proc", "/sys")  # whose files say they are regular, yet hold secrets, or block


class Fetcher:
    """Opens references relative to root."""

    def __init__(self, config: MediaConfig, root: str) -> None:
        root = _without_file_scheme(str(root))
        roots = [root, *(_without_file_scheme(os.path.expanduser(allowed)) for allowed in config.allowed_roots)]
        self.root = root
        self.root_scheme = urlsplit_scheme(root)
        self.local_roots = [os.path.realpath(folder) for folder in roots if not urlsplit_scheme(folder)]
        self.remote_roots = [folder.rstrip("/") + "/" for folder in roots if urlsplit_scheme(folder)]
        # The user named the parquet's own host, so its files may be fetched from there.
        own_host = (urlsplit(root).hostname,) if self.root_scheme in ("http", "https") else ()
        self.max_fetch_bytes = config.max_fetch_bytes
        self.http = HttpFetcher(
            allowed_hosts=(*config.allowed_hosts, *(host for host in own_host if host)),
            timeout_seconds=config.fetch_timeout_seconds,
            max_bytes=config.max_fetch_bytes,
            retries=config.fetch_retries,
            max_redirects=config.max_redirects,
            max_connections_per_host=config.max_connections_per_host,
        )

    def open(self, reference: str) -> BinaryIO:
        """RowRejected with the exact reason if that can't or may not be done."""
        if "\0" in reference:
            raise RowRejected(Reason.forbidden_path, f"{reference!r} is no path")
        reference = _without_file_scheme(reference)
        if not urlsplit_scheme(reference) and self.root_scheme and not reference.startswith("/"):
            reference = self._below_remote_root(reference)
        scheme = urlsplit_scheme(reference)
        if scheme in ("http", "https"):
            return io.BytesIO(self.http.fetch(reference))
        if scheme:
            return self._open_remote(reference)
        return self._open_local(reference)

    def _below_remote_root(self, path: str) -> str:
        if ".." in path.split("/"):
            raise RowRejected(Reason.forbidden_path, f"{path} leads out of {self.root}")
        if self.root_scheme in ("http", "https"):
            path = quote(path)
        return f"{self.root.rstrip('/')}/{path}"

    def _open_local(self, path: str) -> BinaryIO:
        # root is local here, or path is absolute and join drops the root.
        real_path = os.path.realpath(os.path.join(self.root, path))
        if not any(_is_inside(real_path, folder) for folder in self.local_roots):
            raise RowRejected(Reason.forbidden_path, f"{path} is outside the parquet's folder and media.allowed_roots")
        if any(_is_inside(real_path, folder) for folder in _NEVER_DATA):
            raise RowRejected(Reason.forbidden_path, f"{path} is not a file on a disk")
        try:
            descriptor = -1
            is_regular = stat.S_ISREG(os.stat(real_path).st_mode)  # first, for opening a device may do something
            if is_regular:
                descriptor = os.open(real_path, _OPEN_FLAGS)
                is_regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        except OSError as error:
            raise RowRejected(_reason_of(error), f"{path}: {error.strerror}") from error
        if not is_regular:
            if descriptor >= 0:
                os.close(descriptor)
            raise RowRejected(Reason.forbidden_path, f"{path} is not a regular file")
        return os.fdopen(descriptor, "rb")

    def _open_remote(self, url: str) -> BinaryIO:
        if ".." in url.split("/") or not url.startswith(tuple(self.remote_roots)):
            raise RowRejected(
                Reason.forbidden_url,
                f"{url} is neither http(s) nor below the parquet's folder or media.allowed_roots",
            )
        import fsspec

        try:
            with fsspec.open(url, "rb") as remote:
                body = remote.read(self.max_fetch_bytes + 1)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise RowRejected(Reason.not_found, f"{url} does not exist") from error
        except (ImportError, MemoryError):
            raise  # the filesystem's package is missing: every row would fail; or this process is short of memory
        except Exception as error:  # each filesystem raises types of its own
            raise RowRejected(Reason.fetch_error, f"{url}: {type(error).__name__}: {error}") from error
        if len(body) > self.max_fetch_bytes:
            raise RowRejected(Reason.too_large, f"{url}: more than media.max_fetch_bytes={self.max_fetch_bytes}")
        return io.BytesIO(body)


def _is_inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _reason_of(error: OSError) -> Reason:
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
        return Reason.not_found
    if error.errno in (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EISDIR):
        return Reason.forbidden_path
    return Reason.fetch_error  # network filesystems have passing troubles


def _without_file_scheme(reference: str) -> str:
    """'/data/a b.png' of 'file:///data/a%20b.png'; anything else as it is."""
    if urlsplit_scheme(reference) != "file":
        return reference
    return unquote("/" + reference[len("file://") :].partition("/")[2])
