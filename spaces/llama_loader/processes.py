"""The only place that starts other programs. Their environment is built from nothing.

A program sees an allow-list of harmless variables (``settings.inherited``), the library folders
and the devices that were chosen for it, and nothing else: no ``LLAMA_ARG_*`` or ``AIP_*``, which
change llama-server's settings behind one's back, no ``LD_PRELOAD``, no token.

``spawn`` ties a program's life to this process. The kernel's parent-death signal is tied to the
*thread* that started the program, so it starts from one keeper thread that lives as long as the
process does; started from a caller's thread, the program would die when that thread ends, which
on ZeroGPU is the end of every call.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_LAUNCHER: Final = """
import ctypes, os, resource, sys
if ctypes.CDLL(None, use_errno=True).prctl(1, 9, 0, 0, 0):
    sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
if os.getppid() != int(sys.argv[1]):
    sys.exit("the loader has gone away")
os.environ.pop("LD_LIBRARY_PATH")
if sys.argv[2]:
    os.environ["LD_LIBRARY_PATH"] = sys.argv[2]
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
try:
    os.execv(sys.argv[3], sys.argv[3:])
except OSError as error:
    sys.exit(f"{sys.argv[3]}: cannot execute: {error.strerror}")
"""
"""Sets PR_SET_PDEATHSIG (1, linux/prctl.h) to SIGKILL, then becomes the program.

A small interpreter of its own (15 ms) instead of ``preexec_fn``: running Python between fork and
exec can deadlock in a process with threads, and every Space has threads. The parent may die
before the signal is set; that is what the second check is for. No core file: a server that aborts
with 17 GB of weights mapped would fill the disk.
"""
_OUTPUT_LIMIT: Final = 1024 * 1024
"""Most bytes kept of the output of a program that is run to its end."""


@dataclass(frozen=True)
class Finished:
    """A program that was run to its end.

    Attributes:
        status: exit status; negative for a signal; None where it was stopped because it took too
            long or printed too much.
        output: what it printed on both streams, decoded, at most 1 MiB.
        seconds: how long it ran.
        failure: why it could not be started, else empty.
    """

    status: int | None
    output: str
    seconds: float
    failure: str = ""


def environment(
    inherited: Mapping[str, str], *, libraries: Sequence[Path] = (), **extra: str
) -> dict[str, str]:
    """Build a program's environment from nothing.

    Args:
        inherited: the allow-listed variables of this process (``Settings.inherited``).
        libraries: folders for the dynamic linker, in order.
        extra: further variables.
    """
    environ = {"PATH": "/usr/local/bin:/usr/bin:/bin", **inherited, **extra}
    if libraries:
        environ["LD_LIBRARY_PATH"] = ":".join(map(str, libraries))
    return environ


def run(argv: Sequence[str], environ: Mapping[str, str], *, timeout: float) -> Finished:
    """Run a program to its end; its group is ended after ``timeout`` seconds or 1 MiB of output."""
    started = time.monotonic()
    try:
        process = subprocess.Popen(
            list(argv),
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        return Finished(None, "", 0.0, f"{argv[0]}: {error.strerror or error}")
    with process:
        try:
            output, finished = _collect(process, started + timeout)
            status = process.wait() if finished else None
        finally:
            kill_group(process.pid)
    text = output.decode("utf-8", "replace")
    return Finished(status, text, time.monotonic() - started)


def _collect(process: subprocess.Popen[bytes], deadline: float) -> tuple[bytes, bool]:
    """Read a program's output to its end; whether that came in time and within the limit."""
    output = bytearray()
    stream = process.stdout
    if stream is None:
        raise AssertionError("started with a pipe")
    while len(output) < _OUTPUT_LIMIT:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([stream], [], [], left)[0]:
            return bytes(output), False
        block = os.read(stream.fileno(), 65536)
        if not block:
            return bytes(output), ended(process, max(0.0, deadline - time.monotonic()))
        output += block
    return bytes(output), False


def spawn(
    argv: Sequence[str], environ: Mapping[str, str], *, folder: Path
) -> subprocess.Popen[bytes]:
    """Start a program that cannot outlive this process; both its streams come as ``stdout``.

    It leads a session and a process group of its own: a terminal's Ctrl-C does not reach it.

    Raises:
        OSError: it could not be started.
    """
    started: Future[subprocess.Popen[bytes]] = Future()
    _keeper().put((started, list(argv), dict(environ), folder))
    return started.result()


def stop(process: subprocess.Popen[bytes], *, grace: float) -> int:
    """End a program and its whole group: SIGTERM, after ``grace`` seconds SIGKILL.

    Returns its exit status. The group is killed in any case: children that the program leaves
    behind go with it.
    """
    if process.poll() is None:
        _signal_group(process.pid, signal.SIGTERM)
        ended(process, grace)
    kill_group(process.pid)
    return process.wait()


def ended(process: subprocess.Popen[bytes], timeout: float | None) -> bool:
    """Wait at most ``timeout`` seconds (for ever for None); True where the program has ended."""
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        return False
    return True


def kill_group(group: int) -> None:
    """SIGKILL to every process of a group; nothing where there is none left."""
    _signal_group(group, signal.SIGKILL)


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


_Order = tuple["Future[subprocess.Popen[bytes]]", list[str], dict[str, str], "Path"]
_orders: tuple[int, queue.SimpleQueue[_Order]] | None = None
_lock = threading.Lock()


def _keeper() -> queue.SimpleQueue[_Order]:
    """The keeper thread's queue; a forked child, which inherits no thread, gets its own keeper."""
    global _orders  # noqa: PLW0603 - one keeper for each process is the point
    with _lock:
        if _orders is None or _orders[0] != os.getpid():
            orders: queue.SimpleQueue[_Order] = queue.SimpleQueue()
            threading.Thread(
                target=_keep, args=(orders,), name="llama-loader-keeper", daemon=True
            ).start()
            _orders = (os.getpid(), orders)
        return _orders[1]


def _renew_lock() -> None:
    """A fork while another thread held the lock would leave it locked for ever in the child."""
    global _lock  # noqa: PLW0603 - there is one lock for each process
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def _keep(orders: queue.SimpleQueue[_Order]) -> None:
    while True:
        started, argv, environ, folder = orders.get()
        try:
            started.set_result(_start(argv, environ, folder))
        except OSError as error:
            started.set_exception(error)
        del started, argv, environ, folder  # the last order would hold its Popen for ever


def _start(argv: list[str], environ: dict[str, str], folder: Path) -> subprocess.Popen[bytes]:
    libraries = environ.get("LD_LIBRARY_PATH", "")
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), libraries]
    return subprocess.Popen(
        [*launcher, *argv],
        # the interpreter's own library first: some Pythons are found by LD_LIBRARY_PATH alone
        env={**environ, "LD_LIBRARY_PATH": f"{sys.base_prefix}/lib"},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
