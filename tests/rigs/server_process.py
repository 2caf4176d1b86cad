"""A server of somebody else's as a process of a test's own."""

import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

_SECONDS = 60


@contextmanager
def running(
    argv: Sequence[str], where: tuple[str, int], log: Path, env: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Run it until the block ends, which is entered when it takes connections."""
    with (
        log.open("wb") as file,
        subprocess.Popen(argv, env=env, stdout=file, stderr=file) as process,
    ):
        try:
            _await(process, where, log)
            yield
        finally:
            process.terminate()


def _await(process: subprocess.Popen[bytes], where: tuple[str, int], log: Path) -> None:
    deadline = time.monotonic() + _SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(where, 1):
            return
        time.sleep(0.05)
    pytest.fail(log.read_text())
