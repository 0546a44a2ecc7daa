"""Which URLs may be opened: public hosts by http and https, whatever names, redirects and digits say."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from diffusion_data import guarded_pool
from diffusion_data.errors import Reason
from tests.fetching import LOCAL, fetch, reason


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
