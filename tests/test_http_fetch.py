"""A URL is fetched, again if that may help, in time and within bounds; what else happens is told exactly."""

from __future__ import annotations

import pickle
import shutil
import socket
import subprocess
import threading
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from diffusion_data import http_fetch
from diffusion_data.errors import Reason, RowRejected
from diffusion_data.fetch import Fetcher
from diffusion_data.media import MediaConfig
from tests.fetching import LOCAL, fetch, reason, serving


def test_url_is_fetched(server: Any) -> None:
    assert fetch(f"{server.url}/ok", **LOCAL) == b"body"
    assert fetch(f"{server.url}/ok".replace("http://", "HTTP://"), **LOCAL) == b"body"


def test_fetcher_pickles_with_a_used_pool(server: Any) -> None:
    fetcher = Fetcher(MediaConfig(**LOCAL), "/nowhere")
    fetcher.open(f"{server.url}/ok").close()
    assert pickle.loads(pickle.dumps(fetcher)).open(f"{server.url}/ok").read() == b"body"


def test_relative_paths_below_an_http_root(server: Any) -> None:
    assert fetch("sub dir/ok", f"{server.url}/data", fetch_timeout_seconds=5.0) == b"body"
    assert server.requests == ["/data/sub%20dir/ok"]
    assert reason("../ok", f"{server.url}/data") == Reason.forbidden_path


@pytest.mark.parametrize(
    ("status", "expected", "requests"),
    [
        (404, Reason.not_found, 1),
        (410, Reason.not_found, 1),
        (400, Reason.fetch_error, 1),
        (401, Reason.fetch_error, 1),
        (403, Reason.fetch_error, 1),
        (408, Reason.fetch_error, 1),
        (418, Reason.fetch_error, 1),
        (429, Reason.fetch_error, 3),
        (500, Reason.fetch_error, 3),
        (501, Reason.fetch_error, 3),
        (503, Reason.fetch_error, 3),
        (520, Reason.fetch_error, 3),
    ],
)
def test_statuses_are_told_apart(server: Any, status: int, expected: Reason, requests: int) -> None:
    assert reason(f"{server.url}/status_{status}", **LOCAL, fetch_retries=2) == expected
    assert len(server.requests) == requests


def test_passing_failures_are_retried(server: Any) -> None:
    assert fetch(f"{server.url}/later_503", **LOCAL) == b"body"
    assert fetch(f"{server.url}/later_429", **LOCAL) == b"body"
    assert len(server.requests) == 6
    server.requests.clear()
    assert fetch(f"{server.url}/reset", **LOCAL) == b"body"
    assert reason(f"{server.url}/later_500", **LOCAL, fetch_retries=0) == Reason.fetch_error


def test_body_that_breaks_off_is_a_fetch_error(server: Any) -> None:
    assert reason(f"{server.url}/short", **LOCAL, fetch_retries=1) == Reason.fetch_error
    assert len(server.requests) == 2


def test_nobody_listening_is_a_fetch_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_fetch, "BACKOFF_SECONDS", 0.01)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert reason(f"http://127.0.0.1:{unused.getsockname()[1]}/", **LOCAL) == Reason.fetch_error


@pytest.mark.parametrize("path", ["slow", "drip", "dripheader", "dripchunk", "redirect_slow"])
def test_slow_servers_time_out_in_time(server: Any, path: str) -> None:
    server.targets["slow"] = "/dripheader"
    started = time.monotonic()
    options = {**LOCAL, "fetch_timeout_seconds": 0.4}
    assert reason(f"{server.url}/{path}", **options) == Reason.timeout
    assert time.monotonic() - started < 1.5


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_https_is_verified_and_ends_in_time_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pem = tmp_path / "server.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    command += f" -addext subjectAltName=IP:127.0.0.1 -keyout {pem} -out {tmp_path / 'certificate.pem'}"
    subprocess.run(command.split(), check=True, capture_output=True)
    with pem.open("a") as file:
        file.write((tmp_path / "certificate.pem").read_text())
    with serving(monkeypatch, pem) as web:
        with pytest.raises(RowRejected, match=r"fetch_error: .*certificate verify failed"):
            fetch(f"{web.url}/ok", **LOCAL)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
        assert fetch(f"{web.url}/ok", **LOCAL) == b"body"
        assert reason(f"{web.url}/dripheader", **{**LOCAL, "fetch_timeout_seconds": 0.4}) == Reason.timeout


def test_a_tls_handshake_that_drips_ends_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = listening.getsockname()

        def drip() -> None:
            connection, _ = listening.accept()
            with connection, suppress(OSError):
                connection.sendall(b"\x16\x03\x03\x40\x00")
                for _ in range(100):
                    connection.sendall(b"\0")
                    time.sleep(0.02)

        thread = threading.Thread(target=drip)
        thread.start()
        started = time.monotonic()
        options = {**LOCAL, "fetch_timeout_seconds": 0.4, "fetch_retries": 0}
        assert reason(f"https://127.0.0.1:{address[1]}/", **options) == Reason.timeout
        assert time.monotonic() - started < 1.5
        thread.join()


def test_asked_to_wait_longer_than_there_is_time_gives_up_at_once(server: Any) -> None:
    started = time.monotonic()
    assert reason(f"{server.url}/wait_600", **LOCAL) == Reason.fetch_error
    assert time.monotonic() - started < 1
    assert len(server.requests) == 1


@pytest.mark.parametrize("path", ["large_announced", "large_chunked"])
def test_large_bodies_are_cut_off(server: Any, path: str) -> None:
    assert reason(f"{server.url}/{path}", **LOCAL, max_fetch_bytes=999) == Reason.too_large
    assert len(fetch(f"{server.url}/{path}", **LOCAL, max_fetch_bytes=1000)) == 1000


@pytest.mark.parametrize("times", [1, 2])
def test_compressed_bodies_are_cut_off_at_their_size_unpacked(server: Any, times: int) -> None:
    tracemalloc.start()
    try:
        assert reason(f"{server.url}/packed_{times}", **LOCAL, max_fetch_bytes=1_000_000) == Reason.too_large
        assert tracemalloc.get_traced_memory()[1] < 110_000_000 + 10_000_000  # the server's own 100 MB, and little else
    finally:
        tracemalloc.stop()


def test_no_more_redirects_are_followed_than_allowed(server: Any) -> None:
    server.targets.update(a="/redirect_b", b="/redirect_c", c="/ok")
    assert fetch(f"{server.url}/redirect_a", **LOCAL, max_redirects=3) == b"body"
    with pytest.raises(RowRejected, match=r"more than media\.max_redirects=2 redirects"):
        fetch(f"{server.url}/redirect_a", **LOCAL, max_redirects=2)
    assert reason(f"{server.url}/redirect_c", **LOCAL, max_redirects=0) == Reason.fetch_error


def test_unknown_host_is_a_fetch_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: Any, **options: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(http_fetch, "BACKOFF_SECONDS", 0.01)
    assert reason("http://no-such-host.example/a.png", fetch_retries=1) == Reason.fetch_error


def test_proxy_of_the_environment_is_used(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert fetch("http://1.1.1.1/ok", fetch_timeout_seconds=5.0) == b"body"
    assert server.requests == ["http://1.1.1.1/ok"]
    assert reason("http://10.0.0.1/ok") == Reason.forbidden_url
