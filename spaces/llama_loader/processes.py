"""Starts other programs, in an environment and a folder of their own; nothing else does.

A program sees an allow-list of harmless variables (``settings.inherited``), the library folders
and the devices that were chosen for it, and nothing else: no ``LLAMA_ARG_*`` or ``AIP_*``, which
silently change llama-server's settings, no ``LD_PRELOAD``, no token.

``spawn`` ties a program's life to this process. The kernel's parent-death signal is tied to the
*thread* that started the program, so it starts from one keeper thread that lives as long as the
process does; started from a caller's thread, the program would die when that thread ends, which
on ZeroGPU is the end of every call.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_LAUNCHER: Final = r"""
import ctypes, os, resource, sys
if ctypes.CDLL(None, use_errno=True).prctl(1, 9, 0, 0, 0):
    sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
if os.getppid() != int(sys.argv[1]):
    sys.exit("the loader has gone away")
size = int(sys.stdin.buffer.read(12) or 0)
*order, end = sys.stdin.buffer.read(size).split(b"\0")
if end != b"end":
    sys.exit(0)  # nothing was ordered, or the loader died in the middle of the order
folder, count, *rest = order
argv, variables = rest[: int(count)], rest[int(count) :]
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
try:
    os.chdir(folder)
    os.execve(argv[0], argv, dict(one.split(b"=", 1) for one in variables))
except OSError as error:
    sys.exit(f"{os.fsdecode(argv[0])}: cannot execute: {error.strerror}")
"""
"""Sets PR_SET_PDEATHSIG (1, linux/prctl.h) to SIGKILL, then becomes the program that it is told.

A small interpreter of its own instead of ``preexec_fn``: running Python between fork and exec can
deadlock in a process with threads, and every Space has threads. The parent may die before the
signal is set; that is what the second check is for. No core file: a server that aborts with 17 GB
of weights mapped would fill the disk. It takes its order (``_order``) from its standard input, so
that it can be started ahead of time. The order begins with its length: its end is not the stream's,
which a child that the parent forks meanwhile keeps open.
"""
_PATH: Final = "/usr/local/bin:/usr/bin:/bin"
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

    Empty and relative entries of ``PATH`` are dropped: they mean the working folder. So is a
    library folder that is relative or has a ``:`` or ``;`` in its name, at which the dynamic
    linker would split it.

    Args:
        inherited: the allow-listed variables of this process (``Settings.inherited``).
        libraries: folders for the dynamic linker, in order.
        extra: further variables.
    """
    environ = {"PATH": _PATH, **inherited, **extra}
    absolute = [entry for entry in environ["PATH"].split(":") if entry.startswith("/")]
    environ["PATH"] = ":".join(absolute) or _PATH
    usable = [str(one) for one in libraries if one.is_absolute() and not {":", ";"} & {*str(one)}]
    if usable:
        environ["LD_LIBRARY_PATH"] = ":".join(usable)
    return environ


def run(
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    timeout: float,
    folder: Path | None = None,
) -> Finished:
    """Run a program to its end; its group is killed after ``timeout`` seconds or 1 MiB of output.

    It runs in ``folder``, by default ``/``, and never in the caller's working folder: llama-server
    loads any ``libggml-*.so`` that lies in its working folder (ggml/src/ggml-backend-reg.cpp).
    """
    started = time.monotonic()
    try:
        process = subprocess.Popen(
            list(argv),
            env=dict(environ),
            cwd=folder or "/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        reason = why_not_executable(Path(argv[0]))
        shown = f"{argv[0]}: {error.strerror or error}{reason and f' ({reason})'}"
        return Finished(None, "", 0.0, shown)
    with process:
        try:
            output, finished = _collect(process, started + timeout)
            status = process.wait() if finished else None
        finally:
            kill_group(process.pid)
    text = output.decode("utf-8", "replace")
    return Finished(status, text, time.monotonic() - started)


def why_not_executable(program: Path) -> str:
    """Say why the system cannot execute a file; empty where the file shows no reason."""
    try:
        if os.statvfs(program).f_flag & os.ST_NOEXEC:
            return f"{program.parent} is on a disk that is mounted noexec"
        if not os.access(program, os.X_OK):
            return "this user may not execute the file"
        return _why_not_loadable(_head(program), _head(Path(sys.executable)))
    except OSError as error:
        return error.strerror or str(error)


def _why_not_loadable(head: bytes, ours: bytes) -> str:
    """Compare a program's first bytes with those of one that runs here: the class, the machine."""
    if head.startswith(b"\x7fELF"):
        if head[4:6] + head[18:20] != ours[4:6] + ours[18:20]:
            return "it is built for another processor"
        loader = re.search(rb"\0(/[!-~]*/ld[!-~]*\.so[!-~]*)\0", head)
    else:
        loader = re.match(rb"#! *([!-~]+)", head)
        if loader is None:
            return "it is not a program"
    if loader is not None and not Path(os.fsdecode(loader[1])).exists():
        return f"its dynamic loader {os.fsdecode(loader[1])} is not on this system"
    return ""


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(65536)


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
    answer: queue.SimpleQueue[subprocess.Popen[bytes] | OSError] = queue.SimpleQueue()
    _keeper().put((_order(argv, environ, folder), answer))
    started = answer.get()
    if isinstance(started, OSError):
        raise started
    return started


def spawn_soon() -> None:
    """Get the next ``spawn`` ready while other work goes on: it takes a tenth of the time then."""
    _keeper().put(None)


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


def lives(pid: int) -> bool:
    """Return whether a process runs; one that only waits to be reaped does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in {"Z", "X"}


def kill_group(group: int) -> None:
    """Kill every process of a group; do nothing where none is left."""
    _signal_group(group, signal.SIGKILL)


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


_Order = tuple[bytes, "queue.SimpleQueue[subprocess.Popen[bytes] | OSError]"]
_orders: tuple[int, queue.SimpleQueue[_Order | None]] | None = None
_lock = threading.Lock()


def _keeper() -> queue.SimpleQueue[_Order | None]:
    """The keeper thread's queue; a forked child, which inherits no thread, gets its own keeper."""
    global _orders  # noqa: PLW0603 - one keeper for each process is the point
    with _lock:
        if _orders is None or _orders[0] != os.getpid():
            orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
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


def _keep(orders: queue.SimpleQueue[_Order | None]) -> None:
    """Start what is ordered; ``None`` orders a launcher ahead of time."""
    spare: subprocess.Popen[bytes] | None = None
    while True:
        ordered = orders.get()
        if ordered is None:
            with contextlib.suppress(OSError):  # the next order reports it
                spare = spare or _launcher()
            continue
        order, answer = ordered
        try:
            answer.put(_start(order, spare))
        except OSError as error:
            answer.put(error)
        spare = None


def _start(order: bytes, spare: subprocess.Popen[bytes] | None) -> subprocess.Popen[bytes]:
    if spare is not None:
        with contextlib.suppress(BrokenPipeError):  # it was killed while it waited
            return _told(spare, order)
        with spare:  # closes its pipes and waits for it
            pass
    return _told(_launcher(), order)


def _told(launcher: subprocess.Popen[bytes], order: bytes) -> subprocess.Popen[bytes]:
    """Hand a launcher its order; from then on it is the program."""
    if launcher.stdin is None:
        raise AssertionError("started with a pipe")
    with launcher.stdin as stream:
        stream.write(order)
    return launcher


def _order(argv: Sequence[str], environ: Mapping[str, str], folder: Path) -> bytes:
    """Length, folder, number of arguments, these, variables, a mark that nothing was cut off."""
    variables = [f"{name}={value}" for name, value in environ.items()]
    words = [str(folder), str(len(argv)), *argv, *variables, "end"]
    order = b"\0".join(os.fsencode(word) for word in words)
    return b"%012d" % len(order) + order


def _launcher() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())],
        # some Pythons find their own library by LD_LIBRARY_PATH alone
        env={"LD_LIBRARY_PATH": f"{sys.base_prefix}/lib"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
