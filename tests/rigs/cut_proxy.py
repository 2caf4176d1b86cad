"""A proxy in front of a Unix socket that can be cut: an engine that dies, without harm to one."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def between(address: Path, behind: Path) -> Iterator[Callable[[], None]]:
    """Listen at ``address`` for what is behind; gives what cuts every connection, for ever."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen()
    open_ones: list[socket.socket] = []

    def cut() -> None:
        address.unlink(missing_ok=True)
        for one in (listener, *open_ones):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.socket(socket.AF_UNIX)
                far.connect(str(behind))
                open_ones.extend((near, far))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=_copy, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield cut
    finally:
        cut()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(1 << 16):
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)
