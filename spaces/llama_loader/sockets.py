"""TCP ports on loopback: a free one, whether one can be had, and who listens on it."""

from __future__ import annotations

import errno
import socket
from pathlib import Path
from typing import Final

from llama_loader.errors import ServerError

_LISTEN: Final = "0A"
"""TCP_LISTEN in ``/proc/net/tcp`` (linux/include/net/tcp_states.h)."""
_ADDRESSES: Final = frozenset({"0100007F", "00000000"})
"""127.0.0.1 and 0.0.0.0 as ``/proc/net/tcp`` writes them on a little-endian machine."""


def free_port() -> int:
    """Return a TCP port that was free on loopback a moment ago."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def claim(port: int) -> None:
    """Check that a port can be had.

    Raises:
        ServerError: somebody has it, or this user may not have it; the message names it.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # as the server does: a connection that is still closing does not count
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ServerError(
                    "PORT_IN_USE",
                    f"port {port} on 127.0.0.1 is in use by another program",
                    hint="give another --port, or none (and leave"
                    " YAKULINGO_SPACES_LLAMA_SERVER_PORT unset) to get a free one",
                ) from error
            raise ServerError(
                "PORT_FORBIDDEN", f"port {port} cannot be had: {error.strerror}"
            ) from error


def listens(pid: int, port: int, *, proc: Path = Path("/proc")) -> bool | None:
    """Return whether a process of this user listens on a port; None where that is not known.

    A table of sockets that is empty, as some sandboxes show it, tells nothing.
    """
    try:
        rows = [line.split() for line in (proc / "net/tcp").read_text("ascii").splitlines()[1:]]
        inodes = {
            f"socket:[{row[9]}]"
            for row in rows
            if row[3] == _LISTEN
            and row[1].partition(":")[0] in _ADDRESSES
            and int(row[1].partition(":")[2], 16) == port
        }
        held = {_target(link) for link in (proc / str(pid) / "fd").iterdir()} if inodes else set()
    except (OSError, IndexError, ValueError):
        return None
    return not inodes.isdisjoint(held) if rows else None


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:  # closed meanwhile
        return ""
