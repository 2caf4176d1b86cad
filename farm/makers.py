"""Which process made what may be left behind, and whether it still lives.

A process number means something in one PID namespace of one boot of one machine only: that is a
"host" here. Of what another host made nothing is known, so that it counts as living.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_HOST_FILES: Final = ("/etc/machine-id", "/proc/sys/kernel/random/boot_id")
_STATE, _SESSION, _STARTED = 0, 3, 19
"""Fields of /proc/PID/stat (proc(5)) after the name in brackets."""


@dataclass(frozen=True)
class Maker:
    """A process; ``started`` tells it from a later one of the same number."""

    host: str
    pid: int
    started: int

    def is_gone(self) -> bool:
        """Whether it has certainly ended: it was of this host, and no longer runs."""
        if not self.host or self.host != host():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # another user's process has the number; the check below compares it
        fields = stat_fields(self.pid)
        return fields is not None and (
            fields[_STATE] in "ZX" or int(fields[_STARTED]) != self.started
        )


def me() -> Maker:
    """Return this process."""
    fields = stat_fields(os.getpid())
    return Maker(host() if fields else "", os.getpid(), int(fields[_STARTED]) if fields else 0)


def host() -> str:
    """Name this machine, its boot and this PID namespace; empty where that cannot be told."""
    try:
        known = [str(Path("/proc/self/ns/pid").readlink())]
    except OSError:
        return ""
    for name in _HOST_FILES:
        file = Path(name)
        known.append(file.read_text("utf-8", "replace") if file.is_file() else "")
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:32] if known[-1] else ""


def stat_fields(pid: int) -> list[str] | None:
    """Return what the kernel tells of a process after its name, None where it is hidden or gone."""
    try:
        told = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return None
    return told.rpartition(")")[2].split()


def session_members(session: int) -> list[int]:
    """Return the processes of a session that still run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        fields = stat_fields(int(entry.name))
        if fields and int(fields[_SESSION]) == session and fields[_STATE] != "Z":
            found.append(int(entry.name))
    return found
