"""Starts other programs, in an environment and a folder of their own; nothing else does.

A program sees an allow-list of harmless variables (``settings.inherited``), the library folders
and the devices that were chosen for it, and nothing else: no ``LLAMA_ARG_*`` or ``AIP_*``, which
silently change llama-server's settings, no ``LD_PRELOAD``, no token.

``spawn`` ties a program's life to this process. The kernel's parent-death signal is tied to the
*thread* that started the program, so each program is started by a thread of its own that waits for
its end; started from a caller's thread, the program would die when that thread ends, which on
ZeroGPU is the end of every call.
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
parent, count, *rest = sys.argv[1:]
if os.getppid() != int(parent):
    sys.exit("the loader has gone away")
variables, argv = rest[: int(count)], rest[int(count) :]
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
try:
    os.execve(argv[0], argv, dict(one.split("=", 1) for one in variables))
except OSError as error:
    sys.exit(f"{argv[0]}: cannot execute: {error.strerror}")
"""
"""Sets PR_SET_PDEATHSIG (1, linux/prctl.h) to SIGKILL, then becomes the program that it is given.

A small interpreter of its own instead of ``preexec_fn``: running Python between fork and exec can
deadlock in a process with threads, and every Space has threads. The parent may die before the
signal is set; that is what the second check is for. No core file: a server that aborts with 17 GB
of weights mapped would fill the disk.
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
        process = _started(argv, environ, folder or Path("/"))
    except OSError as error:
        reason = why_not_executable(Path(argv[0]))
        shown = f"{argv[0]}: {error.strerror or error}{reason and f' ({reason})'}"
        return Finished(None, "", 0.0, shown)
    with process:
        try:
            output, ended_in_time = _collect(process, started + timeout)
        finally:
            kill_group(process.pid)
    text = output.decode("utf-8", "replace")
    status = process.returncode if ended_in_time else None
    return Finished(status, text, time.monotonic() - started)


def why_not_executable(program: Path) -> str:
    """Say why the system cannot execute a file; empty where the file shows no reason."""
    try:
        if os.statvfs(program).f_flag & os.ST_NOEXEC:
            return f"{program.parent} is on a disk that is mounted noexec"
        if not os.access(program, os.X_OK):
            return "this user may not execute the file"
        head, ours = (_beginning(one) for one in (program, Path(sys.executable)))
    except OSError as error:
        return error.strerror or str(error)
    elf = head.startswith(b"\x7fELF")
    if elf and head[4:6] + head[18:20] != ours[4:6] + ours[18:20]:  # the class, the machine
        return "it is built for another processor"
    loader = re.search(rb"\A#! *([!-~]+)|\0(/[!-~]*/ld[!-~]*\.so[!-~]*)\0", head)
    if loader is None:
        return "" if elf else "it is not a program"
    path = os.fsdecode(loader[1] or loader[2])
    return "" if Path(path).exists() else f"its dynamic loader {path} is not on this system"


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(65536)


def _collect(process: subprocess.Popen[bytes], deadline: float) -> tuple[bytes, bool]:
    """Read a program's output; whether the program ended in time and within the limit."""
    output = bytearray()
    if process.stdout is None:
        raise AssertionError("started with a pipe")
    pipe = process.stdout.fileno()
    while len(output) < _OUTPUT_LIMIT:
        left = max(0.0, deadline - time.monotonic())
        if not select.select([pipe], [], [], left)[0]:
            break
        block = os.read(pipe, 65536)
        if not block:
            return bytes(output), ended(process, left)
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
    told = [str(os.getpid()), str(len(environ)), *(f"{name}={environ[name]}" for name in environ)]
    started: queue.SimpleQueue[subprocess.Popen[bytes] | Exception] = queue.SimpleQueue()

    def keep() -> None:
        try:
            # some Pythons find their own library by LD_LIBRARY_PATH alone
            own = {"LD_LIBRARY_PATH": f"{sys.base_prefix}/lib"}
            launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER]
            process = _started([*launcher, *told, *argv], own, folder)
        except (OSError, ValueError) as error:  # ValueError: an argument with a NUL
            started.put(error)
            return
        started.put(process)
        with contextlib.suppress(ChildProcessError):  # another thread has reaped it
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    threading.Thread(target=keep, name=f"keeps {Path(argv[0]).name}", daemon=True).start()
    process = started.get()
    if not isinstance(process, subprocess.Popen):
        raise process
    return process


def _started(
    argv: Sequence[str], environ: Mapping[str, str], folder: Path
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        argv,
        env=environ,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


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
