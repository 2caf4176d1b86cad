"""Debian's redis-server as a process of a test's own, with nothing on disk."""

import shutil
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import server_process
from needs import must_or_skip


def free_port(host: str) -> int:
    """Return a port of an address of this machine; nobody listens there."""
    try:
        with closing(socket.create_server((host, 0))) as server:
            return int(server.getsockname()[1])
    except OSError as error:
        must_or_skip(f"{host} is no address of this machine: {error.strerror}")


@contextmanager
def serving(host: str, folder: Path, password: str = "") -> Iterator[str]:
    """Serve on a free port of ``host``; gives the address in ccache's words."""
    if shutil.which("redis-server") is None:
        must_or_skip("no redis-server")
    port = free_port(host)
    options = ["--bind", host, "--port", str(port), "--save", "", "--dir", str(folder)]
    options += ["--requirepass", password] if password else []
    address = f"redis://{password}@{host}:{port}" if password else f"redis://{host}:{port}"
    log = folder / "redis_server.log"
    with server_process.running(["redis-server", *options], (host, port), log):
        yield address
