"""An engine behind ``ssh://``: its socket is brought here by the system's own ssh.

That is the ssh with the person's configuration, keys and agent; the SDK would want paramiko, which
reads but a part of them. The ssh ends with the client, and where this process is killed: it waits
for the end of a pipe.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from farm.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator

_SOCKET: Final = "/var/run/docker.sock"
_SECONDS: Final = 30.0
"""For a connection: another continent, a jump host, a slow key."""
_PAUSE: Final = 0.05
_OPTIONS: Final = (
    *("-T", "-o", "BatchMode=yes"),
    *("-o", "ExitOnForwardFailure=yes", "-o", "ControlPath=none"),
)


@contextmanager
def forwarded(address: str) -> Iterator[str]:
    """Give a ``unix://`` address that leads to the engine of an ``ssh://`` one.

    Raises:
        EngineError: ``ENGINE_SSH_MISSING``: there is no ssh; ``ENGINE_NOT_RUNNING``: it cannot log
            in there, with its own words.
        ValueError: the address is none.
    """
    ssh = shutil.which("ssh")
    if ssh is None:
        raise EngineError(
            "ENGINE_SSH_MISSING",
            f"{address} needs ssh, and there is none on PATH",
            hint="install OpenSSH's client (apt-get install openssh-client)",
        )
    parts = urlsplit(address)
    if not parts.hostname:
        raise ValueError(f"{address} names no host")
    options = [*_OPTIONS, *([f"-p{parts.port}"] if parts.port else [])]
    options += ["-l", parts.username] if parts.username else []
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="llama-farm-ssh-"))
        here, said = Path(folder) / "docker.sock", stack.enter_context(tempfile.TemporaryFile())
        process = stack.enter_context(
            subprocess.Popen(
                # cat ends with our end of the pipe, and ssh with it
                [
                    ssh,
                    *options,
                    "-L",
                    f"{here}:{parts.path or _SOCKET}",
                    "--",
                    parts.hostname,
                    "cat",
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=said,
            )
        )
        stack.callback(process.terminate)
        if not _answers(here, process):
            said.seek(0)
            words = said.read().decode("utf-8", "replace").strip()
            raise EngineError(
                "ENGINE_NOT_RUNNING",
                f"no Docker engine answers at {address}: ssh: {words or 'no connection'}",
                hint=f"does `ssh {parts.hostname} docker version` work without a password?",
            )
        yield f"unix://{here}"


def _answers(here: Path, process: subprocess.Popen[bytes]) -> bool:
    """Wait until ssh listens, or has ended."""
    deadline = time.monotonic() + _SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with closing(socket.socket(socket.AF_UNIX)) as knocking:
            if knocking.connect_ex(str(here)) == 0:
                return True
        time.sleep(_PAUSE)
    return False
