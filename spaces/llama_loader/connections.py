"""HTTP connections on which every wait has an end, into however many pieces it is cut.

A socket's timeout begins anew with every byte. A server, or a proxy, that sends its headers, the
length of a chunk or trailers a byte at a time, each just in time, would be waited for for ever; so
would one that sends them without end, because ``http.client`` reads on until they are whole. Here
every single read is told to a ``Watch``, which decides how long is long enough.

A TLS handshake needs nothing of this: Python bounds the whole of it by the socket's timeout.
"""

from __future__ import annotations

import io
import socket
import time
from http.client import HTTPResponse
from typing import Any, ClassVar, Final, Protocol

from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

_SHORTEST: Final = 0.001
"""Seconds. A timeout of 0 would mean not to wait at all."""


class Watch(Protocol):
    """Knows how long a server may take; both raise what a caller is to see."""

    def left(self) -> float:
        """Seconds that may still be waited; raises where there are none."""

    def waited(self, seconds: float, count: int) -> None:
        """Take note of a wait and the bytes that it brought; raises where it is one too many."""


class Watched(HTTPAdapter):
    """Has requests connect, and read answers, under a watch.

    A SOCKS proxy's connections (with PySocks, which the loader does not need) are not watched.
    """

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """Make the pools of what is asked directly."""
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _pools(self._watch)

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        """Make the pools of what is asked through a proxy."""
        manager = super().proxy_manager_for(proxy, **kwargs)
        if not proxy.lower().startswith("socks"):
            manager.pool_classes_by_scheme = _pools(self._watch)
        return manager


def _pools(under: Watch) -> dict[str, type[HTTPConnectionPool]]:
    """Return pools whose connections know the watch: urllib3 makes both out of classes."""

    class Answer(_Answer):
        watch = under

    class Plain(_Connection):
        watch = under
        response_class = Answer

    class Tls(_Connection, HTTPSConnection):
        watch = under
        response_class = Answer

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class TlsPool(HTTPSConnectionPool):
        ConnectionCls = Tls

    return {"http": PlainPool, "https": TlsPool}


class _Connection(HTTPConnection):
    watch: ClassVar[Watch]

    def _new_conn(self) -> socket.socket:
        """Connect to one address after the other: none may take more than its share of the time."""
        try:
            found = socket.getaddrinfo(self.host.strip("[]"), self.port, type=socket.SOCK_STREAM)
        except UnicodeError as error:  # a label is empty or too long
            raise OSError(f"{self.host[:80]!r} is no host's name") from error
        for others in reversed(range(len(found))):
            address = found[-1 - others][4]
            share = min(float(self.timeout or 0), self.watch.left() / (others + 1))
            try:
                made = socket.create_connection((str(address[0]), self.port), share)
            except OSError:
                if not others:
                    raise
            else:
                for option in self.socket_options or ():
                    made.setsockopt(*option)
                made.settimeout(min(float(self.timeout or 0), self.watch.left()))
                return made
        raise OSError(f"{self.host} has no address")


class _Answer(HTTPResponse):
    """What http.client reads an answer with, also that of a proxy to CONNECT."""

    watch: ClassVar[Watch]

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_Reads(self.fp.detach(), sock, self.watch))


class _Reads(io.RawIOBase):
    """A socket's reads, each one watched."""

    def __init__(self, raw: Any, sock: socket.socket, watch: Watch) -> None:
        self._raw = raw
        self._sock = sock
        self._watch = watch
        self._silence = self._timeout = sock.gettimeout() or _SHORTEST

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        timeout = min(self._silence, max(self._watch.left(), _SHORTEST))
        if timeout != self._timeout:  # each change is a system call
            self._sock.settimeout(timeout)
            self._timeout = timeout
        began, count = time.monotonic(), 0
        try:
            count = self._raw.readinto(buffer) or 0
        finally:
            self._watch.waited(time.monotonic() - began, count)
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()
