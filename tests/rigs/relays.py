"""Lead connections to another place: by a proxy, a byte at a time, or until they are cut."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

Connect = Callable[[], socket.socket]


def to_port(port: int) -> Connect:
    """Return what connects to a port of this machine."""
    return lambda: socket.create_connection(("127.0.0.1", port))


class Relay:
    """Leads every connection to what ``connect`` opens."""

    def __init__(
        self,
        connect: Connect,
        listener: socket.socket | None = None,
        *,
        most: int = 1 << 16,  # bytes that come back at a time
        every: float = 0.0,  # seconds after each of them
    ) -> None:
        self._connect, self._most, self._every = connect, most, every
        self._listener = listener or socket.create_server(("127.0.0.1", 0))
        self._open = [self._listener]
        self.port = int(self._listener.getsockname()[1]) if listener is None else 0

    def __enter__(self) -> Any:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()

    def cut(self) -> None:
        """Cut every connection, for ever."""
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def begin(self, near: socket.socket) -> None:
        """Say nothing before the other end does."""

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                threading.Thread(target=self._lead, args=(near,), daemon=True).start()

    def _lead(self, near: socket.socket) -> None:
        with suppress(OSError), near:
            self.begin(near)
            with self._connect() as far:
                self._open += (near, far)
                threading.Thread(target=_copy, args=(near, far), daemon=True).start()
                _copy(far, near, self._most, self._every)


def _copy(
    source: socket.socket, target: socket.socket, most: int = 1 << 16, every: float = 0.0
) -> None:
    with suppress(OSError):
        while piece := source.recv(most):
            target.sendall(piece)
            time.sleep(every)
        target.shutdown(socket.SHUT_WR)


class Proxy(Relay):
    """A CONNECT proxy that leads every host to one port of this machine."""

    def __init__(self, to: int) -> None:
        super().__init__(to_port(to))
        self.targets: list[str] = []
        self.url = f"http://127.0.0.1:{self.port}"

    def begin(self, near: socket.socket) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            request += near.recv(4096)
        self.targets.append(request.split()[1].decode())
        near.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")


@contextmanager
def before_file(address: Path, behind: Path) -> Iterator[Callable[[], None]]:
    """Listen at a Unix socket for another one; gives what removes it and cuts all connections."""

    def connect() -> socket.socket:
        far = socket.socket(socket.AF_UNIX)
        far.connect(str(behind))
        return far

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen()
    with Relay(connect, listener) as relay:

        def remove_and_cut() -> None:
            address.unlink(missing_ok=True)
            relay.cut()

        yield remove_and_cut
