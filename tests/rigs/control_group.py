"""A control group with a part of the machine's CPUs, as a container has; needs root."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_PERIOD: Final = 100_000
"""Microseconds of a control group's period: the kernel's default, and Docker's."""


@contextmanager
def capped(pid: int, cpus: float) -> Iterator[None]:
    """Cap a process and its children to come; on the way out they are uncapped again."""
    first = Path("/sys/fs/cgroup/cpu")
    parent = first if first.is_dir() else first.parent
    group, quota = parent / f"farm-capped-{pid}", int(cpus * _PERIOD)
    group.mkdir()
    try:
        if first.is_dir():
            (group / "cpu.cfs_period_us").write_text(str(_PERIOD))
            (group / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            (group / "cpu.max").write_text(f"{quota} {_PERIOD}")
        (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        for one in (group / "cgroup.procs").read_text().split():
            (parent / "cgroup.procs").write_text(one)
        group.rmdir()
