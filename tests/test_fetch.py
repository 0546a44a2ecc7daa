"""Which references may be opened, and what exactly becomes of the others."""

from __future__ import annotations

import errno
import gzip
import multiprocessing
import os
import pickle
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from diffusion_data import guarded_pool, http_fetch
from diffusion_data.errors import Reason, RowRejected
from diffusion_data.fetch import Fetcher
from diffusion_data.host_slots import HostSlots
from diffusion_data.media import MediaConfig


def fetch(reference: str, root: Path | str = "/nowhere", **options: Any) -> bytes:
    with Fetcher(MediaConfig(**options), str(root)).open(reference) as file:
        return file.read()


def reason(reference: str, root: Path | str = "/nowhere", **options: Any) -> Reason:
    with pytest.raises(RowRejected) as rejected:
        fetch(reference, root, **options)
    return rejected.value.reason


# Local paths


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


# Remote filesystems


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


# URLs


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


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with serving(monkeypatch) as web:
        yield web


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


LOCAL: dict[str, Any] = {"allowed_hosts": ["127.0.0.1"], "fetch_timeout_seconds": 5.0}


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


def _fetch_busy(url: str, times: int, queue: Any) -> None:
    fetcher = Fetcher(MediaConfig(**LOCAL, max_connections_per_host=2), "/nowhere")
    queue.put(max(int(fetcher.open(url).read()) for _ in range(times)))


def test_a_host_is_asked_by_few_processes_at_a_time(server: Any) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_fetch_busy, args=(f"{server.url}/busy", 4, queue)) for _ in range(5)]
    for process in processes:
        process.start()
    assert max(queue.get(timeout=60) for _ in processes) == 2
    for process in processes:
        process.join()


def test_waiting_for_a_connection_ends_with_the_time(server: Any) -> None:
    options = {**LOCAL, "max_connections_per_host": 1}
    with HostSlots(1).hold("127.0.0.1", time.monotonic() + 1):
        with pytest.raises(
            RowRejected, match=r"media\.max_connections_per_host=1 connections to 127\.0\.0\.1"
        ) as rejected:
            fetch(f"{server.url}/ok", **{**options, "fetch_timeout_seconds": 0.3})
        assert rejected.value.reason is Reason.timeout
    assert fetch(f"{server.url}/ok", **options) == b"body"


def test_slots_are_not_kept_where_others_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first = tmp_path / f"diffusion_data-{os.getuid()}-0"
    first.symlink_to(tmp_path)
    (tmp_path / f"diffusion_data-{os.getuid()}-1").mkdir()
    (tmp_path / f"diffusion_data-{os.getuid()}-1").chmod(0o777)
    (tmp_path / f"diffusion_data-{os.getuid()}-2").touch()
    with HostSlots(1).hold("a", time.monotonic()):
        assert list((tmp_path / f"diffusion_data-{os.getuid()}-3").iterdir())
    assert (tmp_path / f"diffusion_data-{os.getuid()}-3").stat().st_mode & 0o777 == 0o700


def test_without_a_place_for_slots_rows_are_to_be_tried_again(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(RowRejected, match=r"no file for its connection in .*nowhere") as rejected:
        fetch(f"{server.url}/ok", **LOCAL, fetch_retries=1)
    assert rejected.value.reason.retryable


def test_a_name_that_changes_its_mind_between_check_and_connection_gains_nothing(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: public when it is asked for first, the server's own address afterwards."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def rebinding(host: str, *args: Any, **options: Any) -> Any:
        if host != "rebind.example":
            return real(host, *args, **options)
        asked.append(host)
        address = "192.0.2.1" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]

    connected: list[Any] = []

    def connect(address: tuple[str, int], *args: Any, **options: Any) -> socket.socket:
        connected.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    monkeypatch.setattr(guarded_pool, "create_connection", connect)
    monkeypatch.setattr(guarded_pool, "_is_public", lambda address: address != "127.0.0.1")
    url = f"http://rebind.example:{server.server_port}/ok"
    assert reason(url, fetch_retries=1) == Reason.forbidden_url  # at the retry, which asks again
    assert connected == [("192.0.2.1", server.server_port)]
    assert server.requests == []


def test_redirects_are_followed_and_checked_again(server: Any) -> None:
    server.targets.update(
        near="/ok",
        loop="/redirect_loop",
        file="file:///etc/passwd",
        private=f"http://localhost:{server.server_port}/ok",
    )
    assert fetch(f"{server.url}/redirect_near", **LOCAL) == b"body"
    assert reason(f"{server.url}/redirect_loop", **LOCAL) == Reason.fetch_error
    assert reason(f"{server.url}/redirect_file", **LOCAL) == Reason.forbidden_url
    assert reason(f"{server.url}/redirect_private", **LOCAL) == Reason.forbidden_url


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "10.0.0.1", "192.168.1.1", "169.254.169.254", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0",
     "2130706433", "0x7f.1", "0177.0.0.1", "127.1", "100.64.0.1", "[fe80::1]", "224.0.0.1", "255.255.255.255",
     "198.18.0.1", "[::]", "[fec0::1]", "[fc00::1]", "[ff02::1]", "[::127.0.0.1]", "[2002:7f00:1::]",
     "[64:ff9b::127.0.0.1]", "[64:ff9b::169.254.169.254]", "[64:ff9b:1::1]", "[2001::1]", "[2001:db8::1]", "[4000::1]",
     "me@127.0.0.1", "1.1.1.1@127.0.0.1", "127.0.0.1:80", "%31%32%37.0.0.1"],
)  # fmt: skip
def test_hosts_that_are_not_public_are_forbidden(host: str) -> None:
    assert reason(f"http://{host}/a.png") == Reason.forbidden_url


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "2606:4700::1111", "64:ff9b::101:101", "::ffff:1.1.1.1", "2002:101:101::"]
)
def test_public_addresses_are_not_refused(address: str) -> None:
    assert guarded_pool._is_public(address)


def test_private_host_is_refused_without_a_connection(server: Any) -> None:
    assert reason(f"{server.url}/ok") == Reason.forbidden_url
    assert server.requests == []


@pytest.mark.parametrize(
    "url", ["ftp://example.com/a.png", "gopher://example.com/", "http://", "http://[::1", "http://a b/", "s3://x/y"]
)
def test_other_schemes_and_broken_urls_are_forbidden(url: str) -> None:
    assert reason(url) == Reason.forbidden_url


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
