"""Starts other programs, in an environment and a folder of their own; nothing else does.

A program sees an allow-list of harmless variables (``settings.inherited``), the library folders
and the devices that were chosen for it, and nothing else: no ``LLAMA_ARG_*``, no ``LD_PRELOAD``, no
token. It does not run in the caller's working folder: llama-server loads any ``libggml-*.so`` that
lies in its own (ggml/src/ggml-backend-reg.cpp).

``Program`` ties a program's life to this process. The kernel's parent-death signal is tied to the
*thread* that started the program, so a thread of its own starts each and waits for its end;
started from a caller's thread, it would die with that, which on ZeroGPU is the end of every call.
"""

import contextlib
import errno
import marshal
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

_LAUNCHER: Final = r"""
import ctypes, errno, marshal, os, resource, sys
loader = os.dup(0)
if ctypes.CDLL(None).prctl(1, 9, 0, 0, 0) or os.getppid() != int(sys.argv[1]):
    sys.exit("the loader has gone away")
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
os.write(loader, b"r")
argv, environ, text = marshal.load(open(loader, "rb", closefd=False))
reader, writer = os.pipe()
os.write(writer, text)
os.dup2(reader, 0)
try:
    os.execve(argv[0], argv, environ)
except (OSError, ValueError) as error:
    os.write(loader, b"%d" % getattr(error, "errno", errno.EINVAL))
"""
"""Sets PR_SET_PDEATHSIG (1, linux/prctl.h) to SIGKILL, then becomes the program that it is told.

A small interpreter of its own, because running Python between fork and exec (``preexec_fn``) can
deadlock in a process with threads, and every Space has threads. The parent may die before the
signal is set, hence the second check. No core file: a server that aborts with 17 GB of weights
mapped would fill the disk. It is told the program, and answers why it cannot be executed, through a
socket in place of its standard input: any user of the machine can read a command line.
"""
FOLDER: Final = "/proc"
"""The working folder of every program: not even root can put a file there."""
_PATH: Final = "/usr/local/bin:/usr/bin:/bin"
_OUTPUT_LIMIT: Final = 1024 * 1024
"""Most bytes kept of the output of a program that is run to its end."""
_NOT_EXECUTABLE: Final = {
    errno.ENOEXEC: "it is no program, or built for another processor",
    errno.ENOENT: "it, or the dynamic loader that it needs, is not on this system",
    errno.EACCES: "its disk is mounted noexec, or this user may not execute it",
}
_LISTEN: Final = "0A"
"""TCP_LISTEN in ``/proc/net/tcp`` (linux/include/net/tcp_states.h)."""
_ADDRESSES: Final = frozenset({"0100007F", "00000000"})
"""127.0.0.1 and 0.0.0.0 as ``/proc/net/tcp`` writes them on a little-endian machine."""
_PATIENCE: Final = 10.0
"""Seconds for what takes milliseconds: an execution, an end by SIGKILL."""


@dataclass(frozen=True)
class Finished:
    """A program that was run to its end, or for too long; ``output`` has at most 1 MiB."""

    # exit status, negative for a signal; None where it took too long or printed too much
    status: int | None
    output: str
    seconds: float
    failure: str = ""  # why it could not be started, else empty


def environment(inherited: Mapping[str, str], *, libraries: Sequence[Path] = ()) -> dict[str, str]:
    """Build a program's environment from nothing.

    It has the allow-listed variables of this process (``Settings.inherited``), and the folders of
    ``libraries`` for the dynamic linker. Empty and relative entries of ``PATH`` are dropped: they
    mean the working folder. So is a library folder that is relative, or has a ``:`` or ``;``.
    """
    environ = {"PATH": _PATH, **inherited}
    absolute = [entry for entry in environ["PATH"].split(":") if entry.startswith("/")]
    environ["PATH"] = ":".join(absolute) or _PATH
    usable = [str(one) for one in libraries if one.is_absolute() and not {":", ";"} & {*str(one)}]
    if usable:
        environ["LD_LIBRARY_PATH"] = ":".join(usable)
    return environ


def run(argv: Sequence[str], environ: Mapping[str, str], *, timeout: float) -> Finished:
    """Run a program to its end; kill its group after ``timeout`` seconds or 1 MiB of output."""
    began = time.monotonic()
    try:
        process, pipe = _started(argv, environ, subprocess.DEVNULL)
    except OSError as error:
        return Finished(None, "", 0.0, f"{argv[0]}: {why_not_executable(error)}")
    output, status, poll = bytearray(), None, select.poll()
    poll.register(pipe, select.POLLIN)  # select.select takes no descriptor above 1,023
    with process:
        try:
            while len(output) < _OUTPUT_LIMIT:
                left = max(0.0, began + timeout - time.monotonic())
                if not poll.poll(left * 1000):
                    break
                block = os.read(pipe.fileno(), 65536)
                if not block:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        status = process.wait(left)
                    break
                output += block
        finally:
            _signal_group(process.pid, signal.SIGKILL)
    return Finished(status, output.decode("utf-8", "replace"), time.monotonic() - began)


def why_not_executable(error: OSError) -> str:
    """Say why the system did not execute a file."""
    why = _NOT_EXECUTABLE.get(error.errno or 0)
    return f"{error.strerror} ({why})" if why else str(error.strerror or error)


class Program:
    """A program that cannot outlive this process, and whose own children end with it.

    It leads a session and a process group of its own: a terminal's Ctrl-C does not reach it. Only
    the thread that keeps it reaps it, after its group was killed.
    """

    def __init__(self) -> None:
        self.status: int | None = None  # negative for a signal; None until it has ended
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: OSError | None = None
        self._unwanted = False
        self._launched, self._ended = threading.Event(), threading.Event()
        self._launched.set()  # or will not be

    @property
    def pid(self) -> int | None:
        """Its process id, None where it does not run."""
        process = self._process
        return None if process is None or self._ended.is_set() else process.pid

    def start(
        self,
        argv: Sequence[str],
        environ: Mapping[str, str],
        *,
        read: Callable[[IO[bytes]], None],
        text: bytes = b"",
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Start it, once. Call ``stop`` afterwards, also if this raises.

        Args:
            argv: its path and its arguments.
            environ: all variables that it sees.
            read: given what it prints; must not block.
            text: what its standard input has, at most 4 KiB.
            before: called last before the execution; what it raises prevents that.

        Raises:
            OSError: it cannot be started; ``filename`` is its path where it cannot be executed.
        """
        variables = {os.fsencode(name): os.fsencode(value) for name, value in environ.items()}
        told = marshal.dumps(([os.fsencode(word) for word in argv], variables, text))
        ours, theirs = socket.socketpair()
        with ours:
            name = f"keeps {Path(argv[0]).name}"
            self._launched.clear()
            threading.Thread(target=self._keep, args=(theirs, read), name=name, daemon=True).start()
            self._launched.wait()
            if self._process is None:
                raise self._failure or AssertionError("launched, or failed")
            ours.settimeout(_PATIENCE)  # a fork of this process may hold a copy of ``theirs``
            failure = b""
            with contextlib.suppress(ConnectionError, TimeoutError):
                ours.recv(1)  # the launcher is ready: the execution follows ``before`` at once
            before()
            with contextlib.suppress(ConnectionError, TimeoutError):
                ours.sendall(told)
                failure = ours.recv(16)  # empty: the execution closed it
        if failure:
            raise OSError(int(failure), os.strerror(int(failure)), argv[0])

    def wait(self, timeout: float | None) -> bool:
        """Wait at most ``timeout`` seconds, for ever for None; True where it does not run."""
        return self._process is None or self._ended.wait(timeout)

    def stop(self, *, grace: float) -> None:
        """End it and its group: SIGTERM, then SIGKILL after ``grace`` seconds or at an interrupt.

        Safe to call twice, from any thread, and at any moment of ``start``.
        """
        self._unwanted = True
        try:
            self._launched.wait(_PATIENCE)
            self._signal(signal.SIGTERM)
            self.wait(grace)
        finally:
            self._signal(signal.SIGKILL)
            self.wait(_PATIENCE)

    def _signal(self, number: signal.Signals) -> None:
        if self.pid is not None:
            _signal_group(self.pid, number)

    def _keep(self, theirs: socket.socket, read: Callable[[IO[bytes]], None]) -> None:
        # some Pythons find their own library by LD_LIBRARY_PATH alone
        own = {"LD_LIBRARY_PATH": f"{sys.base_prefix}/lib"}
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())]
        try:
            with theirs:
                process, output = _started(launcher, own, theirs.fileno())
            self._process = process
            read(output)
        except OSError as error:
            self._failure = error
            return
        finally:
            self._launched.set()
        if self._unwanted:
            self._signal(signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):  # the app reaps all its children
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        self._signal(signal.SIGKILL)  # what it leaves behind
        self.status = process.wait()
        self._ended.set()


def _started(
    argv: Sequence[str], environ: Mapping[str, str], stdin: int
) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    process = subprocess.Popen(
        argv,
        env=environ,
        cwd=FOLDER,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    if process.stdout is None:
        raise AssertionError("started with a pipe")
    return process, process.stdout


def lives(pid: int) -> bool:
    """Return whether a process runs; one that only waits to be reaped does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in {"Z", "X"}


def listens(pid: int, port: int, *, proc: Path = Path("/proc")) -> bool | None:
    """Return whether a process of this user listens on a port; None where that is not known.

    A table of sockets that is empty or has no inodes, as in some sandboxes, proves nothing.
    """
    try:
        inodes, is_empty = set(), True
        with (proc / "net/tcp").open(encoding="ascii") as table:  # others may have 100,000 rows
            next(table, None)
            for row in map(str.split, table):
                is_empty, (address, _, number) = False, row[1].partition(":")
                if row[3] == _LISTEN and address in _ADDRESSES and number == f"{port:04X}":
                    inodes.add(f"socket:[{row[9]}]")
        held = set()
        folder = proc / str(pid) / "fd"
        for name in os.listdir(folder):  # noqa: PTH208 - an interrupt leaves no open iterator
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                held.add(str((folder / name).readlink()))
    except (OSError, IndexError, ValueError):
        return None
    if is_empty or "socket:[0]" in inodes:
        return None
    return not inodes.isdisjoint(held)


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
