"""What the control groups of this process leave it: a container, a pod or a batch job is one.

The group itself or any above it may have the limit. Seen from within a container whose group has a
namespace of its own, its path is ``/``; without one, the path names folders that do not exist in
the container, and the limits lie at the mount point. So every folder from the named one up is read.

https://docs.kernel.org/admin-guide/cgroup-v2.html (``cpu.max``, ``memory.max``), and for version 1
https://docs.kernel.org/scheduler/sched-bwc.html (``cpu.cfs_quota_us``).
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_UNLIMITED: Final = 1 << 62
"""Version 1 reports a limit near 2**63 where there is none."""


def processors(root: Path = Path("/")) -> int:
    """Return how many logical CPUs this process can keep busy, at least 1.

    ``os.cpu_count`` is the machine's number, which a container with two CPUs of 64 is given, too;
    as many compilers as that run out of memory.
    """
    return max(1, min([len(os.sched_getaffinity(0)), *_quotas(root)]))


def threads(root: Path = Path("/")) -> int | None:
    """Return how many threads can compute at the same time, where the machine's cores are more.

    A thread without a CPU of its own holds up those that wait for it: so cores count, not their
    hyper-threads. None where nothing limits this process, or not below the machine's cores.
    """
    quotas, mine, there = [*_quotas(root)], os.sched_getaffinity(0), os.cpu_count() or 1
    if not quotas and len(mine) >= there:
        return None
    topology = root / "sys/devices/system/cpu"
    core = {
        cpu: read_text(topology / f"cpu{cpu}/topology/thread_siblings") or f"core {cpu}"
        for cpu in {*range(there), *mine}
    }
    found = max(1, min([len({core[cpu] for cpu in mine}), *quotas]))
    return found if found < len(set(core.values())) else None


def memory(root: Path = Path("/")) -> int | None:
    """Return the bytes of main memory that its groups allow this process; None without a limit."""
    files = (*_files(root, "", "memory.max"), *_files(root, "memory", "memory.limit_in_bytes"))
    limits = [int(text) for text in map(read_text, files) if re.fullmatch(r"[0-9]{1,20}", text)]
    return min((limit for limit in limits if limit < _UNLIMITED), default=None)


def read_text(path: Path) -> str:
    """Return a file of the kernel without the space around it; empty where it cannot be read."""
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def _quotas(root: Path) -> Iterator[int]:
    """Yield CPU seconds in a second, rounded up, one for each group that limits them."""
    told = [read_text(file) for file in _files(root, "", "cpu.max")]
    told += [
        f"{read_text(file)} {read_text(file.with_name('cpu.cfs_period_us'))}"
        for file in _files(root, "cpu", "cpu.cfs_quota_us")
    ]
    for text in told:
        if limit := re.fullmatch(r"([0-9]{1,15}) ([1-9][0-9]{0,15})", text):
            yield math.ceil(int(limit[1]) / int(limit[2]))


def _files(root: Path, controller: str, name: str) -> Iterator[Path]:
    """Yield where a file of this process's groups may be; version 2's have no controller.

    Version 1's lie below the controller's name or below those of all that are mounted with it, in
    an order that need not be the kernel's; beside version 1, version 2 lies in ``unified``.
    """
    mounts = root / "sys/fs/cgroup"
    yield mounts / controller / name
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller not in controllers.split(","):
            continue
        for mount in {controller, controllers} if controller else ("", "unified"):
            group = PurePosixPath(path)
            for parent in (group, *group.parents):
                yield mounts / mount / str(parent).lstrip("/") / name
