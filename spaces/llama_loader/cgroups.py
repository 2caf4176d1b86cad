"""What the control groups of this process leave it: a container, a pod or a batch job is one.

The group itself or any above it may have the limit. Seen from within a container whose group has a
namespace of its own, its path is ``/``; without one, the path names folders that do not exist in
the container, and the limits lie at the mount point. So every folder from the named one up is read.

https://docs.kernel.org/admin-guide/cgroup-v2.html (``cpu.max``, ``memory.max``), and for version 1
https://docs.kernel.org/scheduler/sched-bwc.html (``cpu.cfs_quota_us``).
"""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

_MOUNT_POINTS: Final = "0::/\n1:cpu:/\n2:memory:/"
"""Read where ``/proc/self/cgroup`` is hidden."""
_MOST_GROUPS: Final = 32
"""The kernel has some 14 controllers; for each of a path's folders some files are opened. Of a
deeper path the mount point alone is read."""


def processors(root: Path = Path("/")) -> int:
    """Return how many logical CPUs this process can keep busy, at least 1.

    ``os.cpu_count`` is the machine's number, which a container with two CPUs of 64 is given, too;
    as many compilers as that run out of memory.
    """
    found = [len(os.sched_getaffinity(0))]
    for folder in _folders(root):
        first = " ".join(read_text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        told = read_text(folder / "cpu.max") or first
        if limit := re.fullmatch(r"([0-9]{1,15}) ([1-9][0-9]{0,15})", told):
            found.append(math.ceil(int(limit[1]) / int(limit[2])))
    return max(1, min(found))


def memory(root: Path = Path("/")) -> int:
    """Return the bytes of main memory that this process may use; 0 for unknown."""
    total = re.search(
        r"^MemTotal:\s*([0-9]{1,15}) kB", read_text(root / "proc/meminfo"), re.MULTILINE
    )
    names = ("memory.max", "memory.limit_in_bytes")
    told = [read_text(folder / name) for folder in _folders(root) for name in names]
    limits = [int(text) for text in told if re.fullmatch(r"[0-9]{1,20}", text)]
    return min([*limits, int(total[1]) * 1024] if total else limits, default=0)


def read_text(path: Path) -> str:
    """Return a file of the kernel without the space around it; empty where it cannot be read."""
    try:
        return path.read_text("utf-8", "replace").strip()
    except (OSError, ValueError):  # ValueError: its name has a zero byte
        return ""


def _folders(root: Path) -> Iterator[Path]:
    """Yield where the files of this process's groups may be, of both versions.

    Version 1's lie below a controller's name or below those of all that are mounted with it, in an
    order that need not be the kernel's; beside version 1, version 2 lies in ``unified``.
    """
    told = read_text(root / "proc/self/cgroup") or _MOUNT_POINTS
    for line in told.splitlines()[:_MOST_GROUPS]:
        controllers, _, path = line.partition(":")[2].partition(":")
        mounts = {controllers, *controllers.split(",")} if controllers else {"", "unified"}
        named = PurePosixPath(path if path.count("/") < _MOST_GROUPS else "/")
        for group in (named, *named.parents):
            for mount in mounts:
                yield root / "sys/fs/cgroup" / mount / str(group).lstrip("/")
