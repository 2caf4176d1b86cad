"""A Debian root file system out of the distribution's packages, as a reproducible tar stream.

``debootstrap`` knows the distribution's mirror and checks its signatures; it needs root, because
it runs the packages' own scripts in a chroot.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from farm.errors import EngineError, UsageError
from farm.inputs.packages import cache_folder
from farm.plan import SOURCE_DATE_EPOCH

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SUITE: Final = "bookworm"
"""Debian 12: its glibc 2.36 gives binaries that need 2.34 (FACTS: measured)."""


@dataclass(frozen=True)
class Distribution:
    """What a root file system is made of.

    Attributes:
        suite: the distribution's name for its release.
        packages: what is in it beside the minimum.
        components: the parts of the mirror that are used.
        keyring: whose signatures the mirror must carry, None for this system's own.
    """

    suite: str
    packages: tuple[str, ...] = ()
    components: tuple[str, ...] = ("main",)
    keyring: Path | None = None


DEVEL: Final = Distribution(SUITE)
KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
"""Debian's keys. Other distributions have them in the package ``debian-archive-keyring``."""

SHOWN_LINES: Final = 12

_EMPTY: Final = (
    "dev",
    "proc",
    "sys",
    "run",
    "tmp",
    "var/cache/apt",
    "var/lib/apt/lists",
    "var/log",
)
"""Folders that stay, without what is in them: filled by the engine, or made again by apt."""
_LEFT_OUT: Final = ("etc/hostname", "etc/resolv.conf", "var/cache/ldconfig/aux-cache")
"""Copied from this host, or holding its inode numbers."""


def require_tools() -> None:
    """Check that this process can make a root file system.

    Raises:
        UsageError: it is not root, or ``debootstrap`` or Debian's keys are not installed; says what
            to do.
    """
    if shutil.which("debootstrap") is None:
        raise UsageError(
            "DEBOOTSTRAP_MISSING",
            "debootstrap is not installed, and the base image is made with it",
            hint="apt-get install debootstrap; where a registry can be reached, none is needed: "
            "leave --image out",
        )
    if not KEYRING.is_file():  # Ubuntu has debootstrap without them, GitHub's runners too
        raise UsageError(
            "KEYRING_MISSING",
            f"{KEYRING} is not there, and debootstrap checks the mirror's signatures with it",
            hint="apt-get install debian-archive-keyring",
        )
    if os.geteuid() != 0:
        raise UsageError(
            "ROOT_NEEDED",
            "debootstrap runs the packages' scripts in a chroot, which only root may do",
            hint="run the same command with sudo",
        )


@contextmanager
def root_tar(log: Callable[[str], None], *, of: Distribution = DEVEL) -> Iterator[IO[bytes]]:
    """Make a root file system of a distribution; gone when closed.

    Yields:
        An uncompressed tar stream, about 200 MB: sorted names, fixed times, no logs.

    Raises:
        UsageError: see ``require_tools``.
        EngineError: debootstrap failed; shows its last lines.
    """
    require_tools()
    # Below the cache, not /tmp: device nodes and programs must work there.
    with (
        tempfile.TemporaryDirectory(dir=cache_folder("roots")) as folder,
        tempfile.TemporaryFile(dir=folder) as stream,
    ):
        root = Path(folder) / "root"
        _debootstrap(of, root, log)
        pack(root, stream)
        stream.seek(0)
        yield stream


def pack(root: Path, stream: IO[bytes]) -> None:
    """Write a root file system as tar; the same packages give the same bytes."""
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(root, arcname=".", filter=_normal)


def _normal(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    name = entry.name.removeprefix("./")
    if name in _LEFT_OUT or any(name.startswith(f"{folder}/") for folder in _EMPTY):
        return None
    entry.mtime = SOURCE_DATE_EPOCH
    entry.uname = entry.gname = ""
    return entry


def _debootstrap(of: Distribution, root: Path, log: Callable[[str], None]) -> None:
    argv = (
        "debootstrap",
        "--variant=minbase",
        "--arch=amd64",
        # On a host of another distribution a missing keyring is only a warning without it.
        "--force-check-gpg",
        f"--cache-dir={cache_folder(f'debs-{of.suite}')}",
        f"--components={','.join(of.components)}",
        *((f"--include={','.join(of.packages)}",) if of.packages else ()),
        *((f"--keyring={of.keyring}",) if of.keyring else ()),
        of.suite,
        str(root),
    )
    # Passwords' dates of change would differ from day to day.
    environment = os.environ | {"SOURCE_DATE_EPOCH": str(SOURCE_DATE_EPOCH), "LC_ALL": "C"}
    tail: list[str] = []
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        for line in process.stdout or ():
            tail = [*tail[1 - SHOWN_LINES :], line.rstrip()]
            log(line.rstrip())
    if process.returncode != 0:
        shown = "\n".join(f"  | {line}" for line in tail)
        raise EngineError(
            "DEBOOTSTRAP_FAILED",
            f"debootstrap ended with status {process.returncode}\n{shown}",
            hint="is the distribution's mirror in reach, and its keyring installed "
            "(debian-archive-keyring)?",
        )
