"""urllib3's pools, whose connections go only to addresses that may be fetched from, and end when their time is up."""

from __future__ import annotations

import ipaddress
import socket
import threading
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError
from urllib3.util.connection import create_connection

from diffusion_data.errors import Reason, RowRejected

_IPV6_PUBLIC = ipaddress.IPv6Network("2000::/3")  # what is not in it has a purpose of its own
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # stands for an IPv4 address, its last 32 bits


class CutOff:
    """Ends the connections that this thread makes inside, after so many seconds.

    A timeout of urllib3's bounds each wait for bytes, so a server that drips headers would never meet one.
    """

    def __init__(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self.is_over = False

    def __enter__(self) -> CutOff:
        _CURRENT.cut_off = self
        self._timer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._timer.cancel()
        _CURRENT.cut_off = None
        self._keep(None)

    def watch(self, connection: socket.socket) -> None:
        """The one in use from now on. A copy is kept: TLS takes the original over, HTTP closes it too early."""
        self._keep(socket.fromfd(connection.fileno(), connection.family, connection.type))

    def _keep(self, connection: socket.socket | None) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = connection
            if self.is_over:
                self._shut_down()

    def _cut(self) -> None:
        with self._lock:
            self.is_over = True
            self._shut_down()

    def _shut_down(self) -> None:
        try:
            if self._connection is not None:
                self._connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # it has ended by itself
            pass


class _Current(threading.local):
    cut_off: CutOff | None = None


_CURRENT = _Current()


def _watch(connection: Any) -> None:
    if _CURRENT.cut_off is not None and connection is not None:
        _CURRENT.cut_off.watch(connection)


class _Watched:
    """For a connection class of urllib3's: one that a CutOff can end."""

    sock: Any

    def _new_conn(self) -> socket.socket:
        connection = self._connect()
        _watch(connection)
        return connection

    def _connect(self) -> socket.socket:
        return super()._new_conn()  # type: ignore[misc]

    def getresponse(self) -> Any:
        _watch(self.sock)
        return super().getresponse()  # type: ignore[misc]


def guarded_pool(allowed_hosts: frozenset[str]) -> urllib3.PoolManager:
    """A pool manager whose connections refuse non-public addresses, allowed_hosts excepted."""

    class Guarded(_Watched):
        def _connect(self) -> socket.socket:
            return _connect_to_checked(self, allowed_hosts)

    return _with_connections(urllib3.PoolManager(), Guarded)


def proxy_pool(proxy: str) -> urllib3.PoolManager:
    """A pool manager that asks `proxy`, which decides by itself where it goes."""
    return _with_connections(urllib3.ProxyManager(proxy), _Watched)


def _with_connections(manager: urllib3.PoolManager, mixin: type[_Watched]) -> urllib3.PoolManager:
    http = type("HTTP", (mixin, HTTPConnection), {})
    https = type("HTTPS", (mixin, HTTPSConnection), {})
    manager.pool_classes_by_scheme = {
        "http": type("HTTPPool", (HTTPConnectionPool,), {"ConnectionCls": http}),
        "https": type("HTTPSPool", (HTTPSConnectionPool,), {"ConnectionCls": https}),
    }
    return manager


def _connect_to_checked(connection: Any, allowed_hosts: frozenset[str]) -> socket.socket:
    """Connects to the very addresses that were checked: a name can't change its mind in between."""
    try:
        addresses = check_public(connection.host, allowed_hosts)
    except socket.gaierror as error:
        raise NameResolutionError(connection.host, connection, error) from error
    failure: OSError = OSError("no address")
    for address in addresses:
        if _CURRENT.cut_off is not None and _CURRENT.cut_off.is_over:
            failure = TimeoutError()
            break
        try:
            return create_connection(
                (address, connection.port), connection.timeout, socket_options=connection.socket_options
            )
        except OSError as error:
            failure = error
    if isinstance(failure, TimeoutError):
        raise ConnectTimeoutError(connection, f"{connection.host} did not answer") from failure
    raise NewConnectionError(connection, f"can't connect: {failure}") from failure


def check_public(host: str, allowed_hosts: frozenset[str], may_be_unknown: bool = False) -> list[str]:
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
        within = parsed.ipv4_mapped or parsed.sixtofour
        if parsed in _NAT64:
            within = ipaddress.IPv4Address(int(parsed) & 0xFFFF_FFFF)
        if within is None and parsed not in _IPV6_PUBLIC:
            return False
        parsed = within or parsed
    return parsed.is_global and not parsed.is_multicast
