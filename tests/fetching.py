"""A fetch in a line, and a web server that misbehaves as it is asked to."""

from __future__ import annotations

import gzip
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from diffusion_data import http_fetch
from diffusion_data.errors import Reason, RowRejected
from diffusion_data.fetch import Fetcher
from diffusion_data.media import MediaConfig


def fetch(reference: str, root: Path | str = "/nowhere", **options: Any) -> bytes:
    with Fetcher(MediaConfig(**options), str(root)).open(reference) as file:
        return file.read()


def reason(reference: str, root: Path | str = "/nowhere", **options: Any) -> Reason:
    with pytest.raises(RowRejected) as rejected:
        fetch(reference, root, **options)
    return rejected.value.reason


LOCAL: dict[str, Any] = {"allowed_hosts": ["127.0.0.1"], "fetch_timeout_seconds": 5.0}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 5

    def do_GET(self) -> None:
        self.server.requests.append(self.path)  # type: ignore[attr-defined]
        name, _, argument = self.path.rpartition("/")[2].partition("_")
        getattr(self, f"answer_{name.partition('?')[0]}")(argument)

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for header, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(header.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def answer_ok(self, argument: str) -> None:
        self.answer(200, b"body")

    def answer_status(self, argument: str) -> None:
        self.answer(int(argument))

    def answer_later(self, argument: str) -> None:
        """Fails with the given status until the third request."""
        count = sum(self.path == path for path in self.server.requests)  # type: ignore[attr-defined]
        self.answer(int(argument)) if count < 3 else self.answer_ok("")

    def answer_reset(self, argument: str) -> None:
        if len(self.server.requests) < 3:  # type: ignore[attr-defined]
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            self.answer_ok("")

    def answer_short(self, argument: str) -> None:
        self.answer(200, b"half", Content_Length="8")
        self.close_connection = True

    def answer_redirect(self, argument: str) -> None:
        self.answer(302, Location=self.server.targets[argument])  # type: ignore[attr-defined]

    def answer_slow(self, argument: str) -> None:
        time.sleep(2)
        self.close_connection = True

    def answer_drip(self, argument: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        for _ in range(40):
            try:
                self.wfile.write(b"x")
            except OSError:
                return
            time.sleep(0.05)

    def answer_dripheader(self, argument: str) -> None:
        """A header line that never ends, a byte at a time."""
        self.close_connection = True
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        for _ in range(200):
            try:
                self.wfile.write(b"x")
            except OSError:
                return
            time.sleep(0.02)

    def answer_dripchunk(self, argument: str) -> None:
        """The size of a chunk that never ends."""
        self.close_connection = True
        self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(200):
            try:
                self.wfile.write(b"0")
            except OSError:
                return
            time.sleep(0.02)

    def answer_packed(self, argument: str) -> None:
        """A hundred megabytes of zeros in a hundred kilobytes; packed again as often as the argument says."""
        body = gzip.compress(bytes(100_000_000), 9)
        for _ in range(int(argument) - 1):
            body = gzip.compress(body, 9)
        self.answer(200, body, Content_Encoding=", ".join(["gzip"] * int(argument)))

    def answer_busy(self, argument: str) -> None:
        """Says how many of these are answered at a time."""
        with self.server.lock:  # type: ignore[attr-defined]
            self.server.busy += 1  # type: ignore[attr-defined]
            busy = self.server.busy  # type: ignore[attr-defined]
        time.sleep(0.05)
        with self.server.lock:  # type: ignore[attr-defined]
            self.server.busy -= 1  # type: ignore[attr-defined]
        self.answer(200, str(busy).encode())

    def answer_wait(self, argument: str) -> None:
        self.answer(503, Retry_After=argument)

    def answer_large(self, argument: str) -> None:
        """1000 bytes, their number announced or not."""
        if argument == "announced":
            self.answer(200, b"x" * 1000)
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"3e8\r\n" + b"x" * 1000 + b"\r\n0\r\n\r\n")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, certificate: Path | None = None) -> Iterator[Any]:
    monkeypatch.setattr(http_fetch, "BACKOFF_SECONDS", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        web.daemon_threads = True
        web.requests = []  # type: ignore[attr-defined]
        web.targets = {}  # type: ignore[attr-defined]
        web.lock, web.busy = threading.Lock(), 0  # type: ignore[attr-defined]
        web.url = f"http{'s' if certificate else ''}://127.0.0.1:{web.server_port}"  # type: ignore[attr-defined]
        if certificate is not None:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(certificate)
            web.socket = tls.wrap_socket(web.socket, server_side=True)
        thread = threading.Thread(target=web.serve_forever, args=(0.01,))
        thread.start()
        yield web
        web.shutdown()
        thread.join()
