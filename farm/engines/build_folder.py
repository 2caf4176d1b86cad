"""The local engine's private folders: held while they are used, swept when their maker was killed.

A folder is held by a ``flock`` on its file ``maker``, which the system lets go of with the process.
The file names the host and the sessions in which the folder's compilers run, so that those can be
ended too: nobody waits for them any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import IO, TYPE_CHECKING, Final

from farm import makers, run_lock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from farm.engines.base import LineSink

_FILE: Final = "maker"
_GRACE: Final = 5.0
"""Seconds for a build that was interrupted to end its compilers."""
_PAUSE: Final = 0.02


@contextmanager
def held(parent: Path, prefix: str) -> Iterator[Path]:
    """Make a folder that is held by this process; it is gone when the context is left.

    Raises:
        BuildError: ``OUT_NOT_WRITABLE``.
    """
    with contextlib.ExitStack() as stack:
        with run_lock.turn(parent, "folders"):  # a sweep sees no folder that is not held yet
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            maker = stack.enter_context((folder / _FILE).open("a+", encoding="ascii"))
            fcntl.flock(maker, fcntl.LOCK_EX)
            maker.write(f"{makers.host()}\n")
            maker.flush()
        yield folder


def note_session(folder: PurePath, session: int) -> None:
    """Write down the session of a command that runs in a folder."""
    with Path(folder / _FILE).open("a", encoding="ascii") as file:
        file.write(f"{session}\n")


def sweep(parent: Path, sink: LineSink) -> None:
    """Remove folders that no living process holds, end what still runs there, and say so.

    Raises:
        BuildError: ``OUT_NOT_WRITABLE``.
    """
    with run_lock.turn(parent, "folders"):
        for file in sorted(parent.glob(f"*/{_FILE}")):
            with contextlib.suppress(OSError), file.open("a+", encoding="ascii") as maker:
                fcntl.flock(maker, fcntl.LOCK_EX | fcntl.LOCK_NB)
                ended = _end_compilers(maker, file.parent)
                shutil.rmtree(file.parent, ignore_errors=True)
                also = f", and ended {ended} processes in it" if ended else ""
                sink(f"note[LEFT_BEHIND]: removed {file.parent}, whose maker was killed{also}")


def _end_compilers(maker: IO[str], folder: Path) -> int:
    """End what runs in a folder and is of one of its sessions; a number may be another's by now."""
    maker.seek(0)
    host, *sessions = maker.read().split() or [""]
    if not host or host != makers.host():
        return 0
    ended: set[int] = set()
    deadline = time.monotonic() + _GRACE
    while (left := _in_folder(sessions, folder)) and time.monotonic() < deadline:
        _kill(left)
        ended.update(left)
        time.sleep(_PAUSE)
    return len(ended)


def _in_folder(sessions: list[str], folder: Path) -> list[int]:
    members = [
        pid for one in sessions if one.isdecimal() for pid in makers.session_members(int(one))
    ]
    return [pid for pid in members if _works_in(pid, folder)]


def _works_in(pid: int, folder: Path) -> bool:
    try:
        return Path(f"/proc/{pid}/cwd").readlink().is_relative_to(folder.resolve())
    except OSError:
        return False


def end_session(session: int) -> None:
    """Kill whatever is left of a session that this process has started."""
    deadline = time.monotonic() + _GRACE
    while (left := makers.session_members(session)) and time.monotonic() < deadline:
        _kill(left)
        time.sleep(_PAUSE)


def _kill(processes: list[int]) -> None:
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
