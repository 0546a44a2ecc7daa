"""An http(s) URL -> bytes, within a time, a size and a set of hosts.

A dataset's URLs come from strangers. Every connection, redirects included, goes only to a public address
that was checked before connecting, or to a host that the user named; so a row can't read a cluster's
internal services. Proxies named in the environment (https_proxy, no_proxy) are used.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from functools import cached_property
from typing import Any
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import (
    ConnectTimeoutError,
    DecodeError,
    HTTPError,
    LocationValueError,
    NameResolutionError,
    NewConnectionError,
    SSLError,
)
from urllib3.exceptions import TimeoutError as UrllibTimeoutError
from urllib3.util.connection import create_connection

from diffusion_data.errors import Reason, RowRejected

_MAX_REDIRECTS = 5
_CONNECT_SECONDS = 10.0
_CHUNK_BYTES = 1 << 16
_REDIRECTS = (301, 302, 303, 307, 308)
_WORTH_A_RETRY = (408, 429, 500, 502, 503, 504)
_HEADERS = {"User-Agent": "diffusion_data", "Accept": "image/*,video/*,*/*;q=0.5"}

BACKOFF_SECONDS = 0.5  # before the first retry; doubles with each


class _Retryable(Exception):
    def __init__(self, reason: Reason, message: str, wait_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.reason, self.message, self.wait_seconds = reason, message, wait_seconds


class HttpFetcher:
    """Fetches URLs over one connection pool a process; picklable, the pool stays behind."""

    def __init__(self, *, allowed_hosts: tuple[str, ...], timeout_seconds: float, max_bytes: int, retries: int) -> None:
        self.allowed_hosts = frozenset(host.lower() for host in allowed_hosts)
        self.timeout_seconds = timeout_seconds
        self.max_bytes = max_bytes
        self.retries = retries

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_pools"}

    def fetch(self, url: str) -> bytes:
        """The body behind url. timeout_seconds bounds it all: redirects, retries and the waits between."""
        deadline = time.monotonic() + self.timeout_seconds
        attempt = 0
        while True:
            try:
                return self._follow(url, deadline)
            except _Retryable as trouble:
                wait = max(BACKOFF_SECONDS * 2**attempt, trouble.wait_seconds)
                if attempt >= self.retries or time.monotonic() + wait >= deadline:
                    raise RowRejected(trouble.reason, f"{url}: {trouble.message}") from trouble
            time.sleep(wait)
            attempt += 1

    def _follow(self, url: str, deadline: float) -> bytes:
        target = url
        for _ in range(_MAX_REDIRECTS + 1):
            if urlsplit_scheme(target) not in ("http", "https"):
                raise RowRejected(Reason.forbidden_url, f"{url}: only http and https are fetched, not {target}")
            response = self._get(target, deadline)
            try:
                location = response.headers.get("Location")
                if response.status not in _REDIRECTS or not location:
                    return self._body(url, response, deadline)
                target = urljoin(target, location)
            except UrllibTimeoutError as error:
                raise _Retryable(Reason.timeout, f"timed out while reading ({error})") from error
            except (DecodeError, ValueError) as error:  # broken compression, broken Location
                raise RowRejected(Reason.fetch_error, f"{url}: {error}") from error
            except (HTTPError, OSError) as error:
                raise _Retryable(Reason.fetch_error, f"broke off while reading ({error})") from error
            finally:
                response.close()
        raise RowRejected(Reason.fetch_error, f"{url}: more than {_MAX_REDIRECTS} redirects")

    def _get(self, url: str, deadline: float) -> urllib3.BaseHTTPResponse:
        left = deadline - time.monotonic()
        if left <= 0:
            raise _Retryable(Reason.timeout, f"not done in {self.timeout_seconds} s")
        timeout = urllib3.Timeout(connect=min(_CONNECT_SECONDS, left), read=left)
        try:
            return self._pool_for(url).request(
                "GET", url, headers=_HEADERS, timeout=timeout, retries=False, redirect=False,
                preload_content=False,
            )  # fmt: skip
        except (LocationValueError, UnicodeError, ValueError) as error:
            raise RowRejected(Reason.forbidden_url, f"{url}: not a valid URL ({error})") from error
        except NewConnectionError as error:  # before timeouts, of which urllib3 takes it for one
            raise _Retryable(Reason.fetch_error, str(error)) from error
        except UrllibTimeoutError as error:
            raise _Retryable(Reason.timeout, f"no answer in time ({error})") from error
        except SSLError as error:
            raise RowRejected(Reason.fetch_error, f"{url}: {error}") from error
        except (HTTPError, OSError) as error:
            raise _Retryable(Reason.fetch_error, str(error)) from error

    def _body(self, url: str, response: urllib3.BaseHTTPResponse, deadline: float) -> bytes:
        self._check_status(url, response)
        too_large = f"{url}: more than media.max_fetch_bytes={self.max_bytes}"
        announced = response.headers.get("Content-Length", "")
        if announced.isdigit() and int(announced) > self.max_bytes:
            raise RowRejected(Reason.too_large, too_large)
        body = bytearray()
        # read1 returns what has come, so that a server which drips bytes can't outlast the deadline.
        while chunk := response.read1(_CHUNK_BYTES):
            body += chunk
            if len(body) > self.max_bytes:
                raise RowRejected(Reason.too_large, too_large)
            if time.monotonic() > deadline:
                raise _Retryable(Reason.timeout, f"not done in {self.timeout_seconds} s")
        return bytes(body)

    @staticmethod
    def _check_status(url: str, response: urllib3.BaseHTTPResponse) -> None:
        status = f"the server answered {response.status} {response.reason or ''}".rstrip()
        if response.status in _WORTH_A_RETRY:
            after = response.headers.get("Retry-After", "")
            raise _Retryable(Reason.fetch_error, status, float(after) if after.isdigit() else 0.0)
        if response.status in (404, 410):
            raise RowRejected(Reason.not_found, f"{url}: {status}")
        if response.status != 200:
            raise RowRejected(Reason.fetch_error, f"{url}: {status}")

    def _pool_for(self, url: str) -> urllib3.PoolManager:
        """One pool manager for direct connections and one a proxy, made anew in a forked process."""
        parts = urlsplit(url)
        host = parts.hostname or ""
        proxy = getproxies().get(parts.scheme.lower())
        if proxy and not proxy_bypass(host):
            _check_public(host, self.allowed_hosts, may_be_unknown=True)
        else:
            proxy = None
        key = (os.getpid(), proxy)
        if key not in self._pools:
            self._pools[key] = urllib3.ProxyManager(proxy) if proxy else guarded_pool(self.allowed_hosts)
        return self._pools[key]

    @cached_property
    def _pools(self) -> dict[tuple[int, str | None], urllib3.PoolManager]:
        return {}


def urlsplit_scheme(reference: str) -> str:
    """'https' of 'HTTPS://host/x'; '' of a path."""
    scheme, found, _ = reference.partition("://")
    return scheme.lower() if found and scheme[:1].isalpha() and "/" not in scheme else ""


def guarded_pool(allowed_hosts: frozenset[str]) -> urllib3.PoolManager:
    """A pool manager whose connections refuse non-public addresses, allowed_hosts excepted."""

    class GuardedHTTP(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return _connect(self, allowed_hosts)

    class GuardedHTTPS(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            return _connect(self, allowed_hosts)

    class GuardedHTTPPool(HTTPConnectionPool):
        ConnectionCls = GuardedHTTP

    class GuardedHTTPSPool(HTTPSConnectionPool):
        ConnectionCls = GuardedHTTPS

    manager = urllib3.PoolManager()
    manager.pool_classes_by_scheme = {"http": GuardedHTTPPool, "https": GuardedHTTPSPool}
    return manager


def _connect(connection: HTTPConnection, allowed_hosts: frozenset[str]) -> socket.socket:
    """Connects to the very addresses that were checked: a name can't change its mind in between."""
    try:
        addresses = _check_public(connection.host, allowed_hosts)
    except socket.gaierror as error:
        raise NameResolutionError(connection.host, connection, error) from error
    failure: OSError = OSError("no address")
    for address in addresses:
        try:
            return create_connection(
                (address, connection.port), connection.timeout, socket_options=connection.socket_options
            )
        except OSError as error:  # noqa: PERF203  the next address may answer
            failure = error
    if isinstance(failure, TimeoutError):
        raise ConnectTimeoutError(connection, f"{connection.host} did not answer") from failure
    raise NewConnectionError(connection, f"can't connect: {failure}") from failure


def _check_public(host: str, allowed_hosts: frozenset[str], may_be_unknown: bool = False) -> list[str]:
    """The addresses of host; forbidden_url if one of them is not public and the host was not allowed."""
    host = host.strip("[]")
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except socket.gaierror:
        if may_be_unknown:  # behind a proxy names may only resolve there
            return []
        raise
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if host.lower() not in allowed_hosts:
        for address in addresses:
            if not _is_public(address):
                raise RowRejected(
                    Reason.forbidden_url,
                    f"{host} is at {address}, which is not public; media.allowed_hosts can allow it",
                )
    return addresses


def _is_public(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        parsed = parsed.ipv4_mapped or parsed.sixtofour or parsed
    return parsed.is_global and not parsed.is_multicast
