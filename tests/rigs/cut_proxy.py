"""A proxy that can be cut: an engine that dies, or a host's network, without harm to either."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def before_file(address: Path, behind: Path) -> Iterator[Callable[[], None]]:
    """Listen at a Unix socket for another one; gives what cuts every connection, for ever."""

    def connect() -> socket.socket:
        far = socket.socket(socket.AF_UNIX)
        far.connect(str(behind))
        return far

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen()
    with _before(listener, connect) as cut:

        def remove_and_cut() -> None:
            address.unlink(missing_ok=True)
            cut()

        yield remove_and_cut


@contextmanager
def before_port(port: int) -> Iterator[tuple[int, Callable[[], None]]]:
    """Listen at a port of its own for one of this machine; gives it, and what cuts all."""
    listener = socket.create_server(("127.0.0.1", 0))
    own = int(listener.getsockname()[1])
    with _before(listener, lambda: socket.create_connection(("127.0.0.1", port))) as cut:
        yield own, cut


@contextmanager
def _before(
    listener: socket.socket, connect: Callable[[], socket.socket]
) -> Iterator[Callable[[], None]]:
    open_ones: list[socket.socket] = []

    def cut() -> None:
        for one in (listener, *open_ones):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def accept() -> None:
        with suppress(OSError):
            while True:
                near, far = listener.accept()[0], connect()
                open_ones.extend((near, far))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=_copy, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield cut
    finally:
        cut()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while piece := source.recv(1 << 16):
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)
