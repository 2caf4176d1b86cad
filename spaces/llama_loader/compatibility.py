"""Whether one artifact can run on one machine, and if not, what it lacks. Pure.

What ``select`` asks of each artifact by itself: kind, format, platform, code for the GPU, glibc,
driver. Which of several that can run is the best one is not decided here.
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from llama_loader import gpus
from llama_loader.manifest import CUDA_RUNTIME, LLAMA_SERVER

if TYPE_CHECKING:
    from collections.abc import Iterable

    from llama_loader.host import HostFacts
    from llama_loader.manifest import Artifact

FORMATS: Final = frozenset({"tar.gz", "tar.xz", "tar.zst"})
"""Archives that ``unpack`` reads."""
_MACHINES: Final = {"amd64": "x86_64", "arm64": "aarch64"}


class Stage(IntEnum):
    """How far an artifact came before it was passed over: the furthest one names the error."""

    KIND = 0
    FORMAT = 1
    PLATFORM = 2
    BACKEND = 3
    GPU = 4
    GLIBC = 5
    DRIVER = 6
    FITS = 7


def cuda_code(artifact: Artifact, target: str) -> str:
    """Say how an artifact runs on a GPU: ``sass``, ``ptx`` or, where it does not, nothing.

    SASS runs on its own capability and on later ones of the same major (CUDA C++ programming
    guide, "Binary Compatibility"); ``120a`` on 12.0 alone, ``120f`` within its family. PTX can be
    compiled for its own capability and all later ones, with the same exceptions.
    """
    cuda = artifact.cuda
    if cuda is None:
        return ""
    if any(_runs(arch, target, same_major=True) for arch in cuda.sass):
        return "sass"
    return "ptx" if any(_runs(arch, target, same_major=False) for arch in cuda.ptx) else ""


def _runs(arch: str, target: str, *, same_major: bool) -> bool:
    number, wanted = int(arch.rstrip("af")), int(target.rstrip("af"))
    if arch.endswith("a"):
        return number == wanted
    same = number // 10 == wanted // 10
    return number <= wanted and (same or not (same_major or arch.endswith("f")))


def refused_by_kind(artifact: Artifact) -> tuple[Stage, str] | None:
    """Say why an artifact is no server; None where it is one."""
    if artifact.kind == LLAMA_SERVER:
        return None
    if artifact.kind == CUDA_RUNTIME:
        return Stage.KIND, "holds CUDA libraries, no server"
    return Stage.KIND, f"its kind {artifact.kind} is unknown to this loader"


def refused_by_platform(artifact: Artifact, host: HostFacts) -> tuple[Stage, str] | None:
    """Say what of format, system, machine or backend is not this host's; None where all are."""
    if artifact.format not in FORMATS:
        return Stage.FORMAT, f"its format {artifact.format} is unknown to this loader"
    wanted, system = artifact.platform, host.system.rstrip("0123456789")
    machine = _MACHINES.get(host.machine.lower(), host.machine)
    if (wanted.system, wanted.machine) != (system, machine):
        return (
            Stage.PLATFORM,
            f"is for {wanted.system} {wanted.machine}, this is {system} {machine}",
        )
    if artifact.backend not in {"cuda", "cpu"}:
        return Stage.BACKEND, f"its backend {artifact.backend} is unknown to this loader"
    return None


def glibc_trouble(artifact: Artifact, host: HostFacts) -> str | None:
    """Say which of the system's libraries is too old; None where none is."""
    wanted = artifact.platform
    if host.glibc is None or older(host.glibc, wanted.glibc):
        return f"needs glibc {wanted.glibc}, this machine has {host.glibc or 'none'}"
    if wanted.glibcxx and host.glibcxx and older(host.glibcxx, wanted.glibcxx):
        return f"needs GLIBCXX {wanted.glibcxx} (libstdc++), this machine has {host.glibcxx}"
    return None


def gap(artifact: Artifact, target: str) -> int:
    """How much older the best code is than the GPU: 0 for its own, 6 for sm_80 code on 8.6."""
    cuda = artifact.cuda
    if cuda is None:
        return 0
    same = [arch for arch in cuda.sass if _runs(arch, target, same_major=True)]
    usable = same or [arch for arch in cuda.ptx if _runs(arch, target, same_major=False)]
    return int(target) - max(int(arch.rstrip("af")) for arch in usable)


def driver_trouble(artifact: Artifact, driver: str | None, *, native: bool) -> str | None:
    """An unknown driver (ZeroGPU before a GPU is attached) is given the benefit of the doubt."""
    cuda = artifact.cuda
    if cuda is None or driver is None:
        return None
    if older(driver, cuda.min_driver):
        return f"CUDA {cuda.toolkit} needs driver {cuda.min_driver}, this machine has {driver}"
    jit = None if native else gpus.jit_driver(cuda.toolkit)
    if jit and older(driver, jit):
        return f"its PTX of CUDA {cuda.toolkit} needs driver {jit}, this machine has {driver}"
    return None


def holds(artifact: Artifact) -> str:
    """Describe an artifact's code in a few words."""
    if artifact.cuda is None:
        return f"{artifact.backend}, no CUDA"
    parts = [dotted(artifact.cuda.sass)] if artifact.cuda.sass else []
    parts += [f"{dotted(artifact.cuda.ptx)} as PTX"] if artifact.cuda.ptx else []
    return f"CUDA {artifact.cuda.toolkit} for {' and '.join(parts) or 'nothing'}"


def dotted(archs: Iterable[str]) -> str:
    """Write compute capabilities as NVIDIA does: ``("90", "120a")`` → ``9.0, 12.0a``."""
    return ", ".join(re.sub(r"^([0-9]+)([0-9][af]?)$", r"\1.\2", arch) for arch in archs)


def older(one: str, other: str) -> bool:
    """Compare versions such as 2.36 and 580.65 by their numbers; 525.60 equals 525.60.0."""
    left, right = (list(map(int, re.findall(r"[0-9]+", text))) for text in (one, other))
    width = max(len(left), len(right))
    return left + [0] * (width - len(left)) < right + [0] * (width - len(right))
