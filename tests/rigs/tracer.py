"""Stops a program at every system call, of every thread, and kills it at the one that is asked for.

Uses ptrace(2) itself: strace counts each call by its name and thread, and would start an
interpreter for every kill. Here the work is a function in a forked process, so nothing is imported
again, and "the 400th system call" is one place whichever thread makes it.
"""

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Final, NamedTuple

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_LIBC.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_LIBC.ptrace.restype = ctypes.c_long
# linux/ptrace.h
_TRACE_ME, _TO_SYSCALL, _SET_OPTIONS, _SYSCALL_INFO = 0, 24, 0x4200, 0x420E
_OPTIONS: Final = 0x1 | 0x2 | 0x4 | 0x8 | 0x100000  # system calls, (v)forks, clones, EXITKILL
_AT_SYSCALL: Final = signal.SIGTRAP | 0x80
_ENTRY: Final = 1
_WALL: Final = 0x40000000
_CHANGING: Final = {
    1: "write", 18: "pwrite64", 20: "writev", 74: "fsync", 75: "fdatasync", 76: "truncate",
    77: "ftruncate", 73: "flock", 82: "rename", 83: "mkdir", 84: "rmdir", 85: "creat", 86: "link",
    87: "unlink", 88: "symlink", 90: "chmod", 91: "fchmod", 92: "chown", 93: "fchown",
    235: "utimes", 258: "mkdirat", 263: "unlinkat", 264: "renameat", 265: "linkat",
    266: "symlinkat", 268: "fchmodat", 280: "utimensat", 285: "fallocate", 316: "renameat2",
    326: "copy_file_range",
}  # fmt: skip
"""The calls of x86_64 that change a file or a folder; ``openat`` counts by its flags."""
_OPENAT: Final = 257
_SEES_CHANGES: Final = os.O_CREAT | os.O_TRUNC


class _Info(ctypes.Structure):
    """``struct ptrace_syscall_info`` at the entry of a call."""

    _fields_ = (
        ("op", ctypes.c_uint8),
        ("arch", ctypes.c_uint32),
        ("place", ctypes.c_uint64),
        ("stack", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
        ("rest", ctypes.c_uint64 * 4),
    )


class Stop(NamedTuple):
    """Where a process was killed."""

    call: str  # that changes files; "" for any other
    thread: int  # 0 for the first, 1 for the next one that it made


def fork(work: Callable[[], object]) -> int:
    """Run ``work`` in a child that ends with 0, or with 70 and a traceback; return its number."""
    child = os.fork()
    if child == 0:
        try:
            work()
            sys.stdout.flush()
            os._exit(0)
        except BaseException:  # noqa: BLE001  the child must never return into its parent's code
            traceback.print_exc()
            os._exit(70)
    return child


def kill_at(nth: int, work: Callable[[], object]) -> Stop | None:
    """SIGKILL a child that does ``work`` at its ``nth`` system call; None where it made fewer."""

    def traced() -> None:
        _ptrace(_TRACE_ME, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        work()

    child = fork(traced)
    os.waitpid(child, _WALL)
    _ptrace(_SET_OPTIONS, child, _OPTIONS)
    _ptrace(_TO_SYSCALL, child, 0)
    return _follow(child, nth)


def _follow(child: int, nth: int) -> Stop | None:
    threads, count = {child: 0}, 0
    while True:
        thread, status = os.waitpid(-1, _WALL)
        if not os.WIFSTOPPED(status):
            if thread == child:
                _require_success(status)
                return None
            continue
        threads.setdefault(thread, len(threads))
        deliver = os.WSTOPSIG(status)
        if deliver == _AT_SYSCALL:
            info = _info(thread)
            count += info.op == _ENTRY
            if count == nth and info.op == _ENTRY:
                os.kill(child, signal.SIGKILL)
                _reap(child)
                return Stop(_name(info), threads[thread])
        if deliver in {_AT_SYSCALL, signal.SIGTRAP, signal.SIGSTOP}:
            deliver = 0
        _ptrace(_TO_SYSCALL, thread, deliver)


def _reap(child: int) -> None:
    """Wait until every thread of a killed process is gone; the first one goes last."""
    thread, status = os.waitpid(-1, _WALL)
    while thread != child or os.WIFSTOPPED(status):
        thread, status = os.waitpid(-1, _WALL)


def _require_success(status: int) -> None:
    if os.waitstatus_to_exitcode(status) != 0:
        raise ChildProcessError(f"it ended with status {os.waitstatus_to_exitcode(status)}")


def _name(info: _Info) -> str:
    if info.number == _OPENAT and info.arguments[2] & _SEES_CHANGES:
        return "openat"
    return _CHANGING.get(info.number, "")


def _info(thread: int) -> _Info:
    info = _Info()
    size = ctypes.sizeof(info)
    if _LIBC.ptrace(_SYSCALL_INFO, thread, size, ctypes.addressof(info)) < 0:
        raise OSError(ctypes.get_errno(), "PTRACE_GET_SYSCALL_INFO")
    return info


def _ptrace(request: int, process: int, data: int) -> None:
    if _LIBC.ptrace(request, process, None, data) < 0:
        raise OSError(ctypes.get_errno(), f"ptrace request {request:#x}")
