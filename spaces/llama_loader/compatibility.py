"""Judge one artifact for one machine: what it would serve and with what, or why it cannot.

Which of several that can run is taken, ``selection`` decides. Nothing here does I/O.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from llama_loader import cuda_libraries, gpus
from llama_loader.manifest import CUDA_RUNTIME, LLAMA_SERVER

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from llama_loader.cuda_libraries import Library
    from llama_loader.host import HostFacts
    from llama_loader.manifest import Artifact, Manifest

FORMATS: Final = frozenset({"tar.gz", "tar.xz", "tar.zst"})
"""Archives that ``unpack`` reads."""
_MACHINES: Final = {"amd64": "x86_64", "arm64": "aarch64"}


class Reach(IntEnum):
    """The check at which an artifact was passed over; of several the furthest names the error."""

    KIND = 0
    FORMAT = 1
    PLATFORM = 2
    BACKEND = 3
    GPU = 4
    GLIBC = 5
    DRIVER = 6
    FITS = 7


@dataclass(frozen=True)
class Candidate:
    """An artifact, how far it came, and what it would do on this machine.

    Attributes:
        artifact: the one judged.
        reach, reason: how far it came, and why no further.
        capabilities: those of the GPUs that it has code for; empty for the CPU.
        weight: the memory of the GPUs that it serves, or their number.
        native: machine code for all that it serves; False where the driver compiles first.
        gap: how much older its code is than the GPUs, added up.
        libraries, missing: CUDA libraries that this machine has, and that it lacks.
        runtime_libraries: the release's artifact that holds all of the missing ones.
    """

    artifact: Artifact
    reach: Reach
    reason: str
    capabilities: tuple[str, ...] = ()
    weight: int = 0
    native: bool = True
    gap: int = 0
    libraries: tuple[Library, ...] = ()
    missing: tuple[str, ...] = ()
    runtime_libraries: Artifact | None = None

    @property
    def lack(self) -> int:
        """0: its libraries are on this machine; 1: the release brings them; 2: they are missing."""
        if not self.missing:
            return 0
        return 1 if self.runtime_libraries else 2

    @property
    def download(self) -> int:
        """Bytes to download."""
        return self.artifact.size + (self.runtime_libraries.size if self.runtime_libraries else 0)

    @property
    def rank(self) -> tuple[bool, int, bool, int, int, int, str]:
        """Order of preference among those that fit; the smallest is the best."""
        for_gpu, name = self.artifact.backend != "cpu", self.artifact.name
        return for_gpu, -self.weight, not self.native, self.lack, self.gap, self.download, name


def judge(
    artifact: Artifact,
    host: HostFacts,
    targets: tuple[str, ...],
    runtimes: tuple[Artifact, ...] = (),
) -> Candidate:
    """Judge one artifact for the GPUs ``targets``; for the CPU where there are none."""
    codes = {target: code for target in targets if (code := cuda_code(artifact, target))}
    native = all(kind == "sass" for kind, _ in codes.values())
    trouble = (
        _kind_trouble(artifact)
        or _platform_trouble(artifact, host)
        or (_gpu_trouble(artifact, targets) if targets and not codes else None)
        or _system_trouble(artifact, host)
        or (_driver_trouble(artifact, host.driver, native=native) if targets else None)
    )
    if trouble:
        return Candidate(artifact, *trouble)
    if not targets:
        also = "CUDA; can run on the CPU too" if artifact.backend == "cuda" else "the CPU"
        return Candidate(artifact, Reach.FITS, f"built for {also}")
    taken, missing = cuda_libraries.split_needs(artifact.needs, host.libraries)
    fitting = Candidate(
        artifact,
        Reach.FITS,
        "",
        capabilities=tuple(codes),
        weight=_weight(host, codes),
        native=native,
        gap=sum(gap for _, gap in codes.values()),
        libraries=taken,
        missing=missing,
        runtime_libraries=_bringing(artifact, missing, runtimes),
    )
    return replace(fitting, reason=_fits_reason(fitting, targets, host.libraries))


def usable_runtimes(manifest: Manifest, host: HostFacts) -> tuple[Artifact, ...]:
    """Return the release's CUDA libraries that this host could load."""
    return tuple(
        one
        for one in manifest.artifacts
        if one.kind == CUDA_RUNTIME
        and not _platform_trouble(one, host)
        and not _system_trouble(one, host)
        and not _driver_trouble(one, host.driver, native=True)
        and not cuda_libraries.split_needs(one.needs, host.libraries)[1]
    )


def cuda_code(artifact: Artifact, target: str) -> tuple[str, int] | None:
    """Return how an artifact's best code runs on a GPU, and how much older than the GPU it is.

    The first is ``sass`` or ``ptx``, the second 0 for the GPU's own code, 6 for sm_80 code on 8.6.
    None where no code runs. SASS runs on its own capability and on later ones of the same major
    (CUDA C++ programming guide, "Binary Compatibility"); ``120a`` on 12.0 alone, ``120f`` within
    its family. PTX can be compiled for its own capability and all later ones, with the same
    exceptions.
    """
    for kind in ("sass", "ptx") if artifact.cuda else ():
        archs: tuple[str, ...] = getattr(artifact.cuda, kind)
        usable = [_number(arch) for arch in archs if _runs(arch, target, same_major=kind == "sass")]
        if usable:
            return kind, _number(target) - max(usable)
    return None


def _runs(arch: str, target: str, *, same_major: bool) -> bool:
    number, wanted = _number(arch), _number(target)
    if arch.endswith("a"):
        return number == wanted
    same = number // 10 == wanted // 10
    return number <= wanted and (same or not (same_major or arch.endswith("f")))


def _number(arch: str) -> int:
    return int(arch.rstrip("af"))


def _weight(host: HostFacts, served: Container[str]) -> int:
    """Add up the memory of the GPUs that are served, where a model has to fit.

    Their number where a GPU's memory is unknown; 1 for a capability that was only named.
    """
    known = all(gpu.memory for gpu in host.visible)
    counted = [gpu for gpu in host.visible if gpu.capability in served]
    return sum((gpu.memory or 0) if known else 1 for gpu in counted) or 1


def _bringing(
    artifact: Artifact, missing: tuple[str, ...], runtimes: Iterable[Artifact]
) -> Artifact | None:
    """Choose the libraries for a server: of its own toolkit, else of the next one that covers it.

    Not of an older toolkit: a soname stays from 12.0 to 12.9, but functions are added.
    """
    usable = [
        (one.cuda.toolkit != artifact.cuda.toolkit, one.size, one.name, one)
        for one in runtimes
        if one.cuda
        and artifact.cuda
        and missing
        and set(missing) <= set(one.provides)
        and not _older(one.cuda.toolkit, artifact.cuda.toolkit)
    ]
    return min(usable)[-1] if usable else None


def _fits_reason(one: Candidate, targets: tuple[str, ...], libraries: tuple[Library, ...]) -> str:
    slow = "PTX, which the driver compiles at the first start (slow),"
    parts = [f"{'machine code' if one.native else slow} for {dotted(one.capabilities)}"]
    left = tuple(target for target in targets if target not in one.capabilities)
    parts += [f"none for {dotted(left)}"] if left else []
    if one.missing:
        brought = one.runtime_libraries
        bringing = f", brought by {brought.name}" if brought else ""
        parts.append(f"{', '.join(one.missing)} missing here{bringing}")
        parts += filter(None, [cuda_libraries.unpaired(one.missing, libraries)])
    return f"{'; '.join(parts)}; {one.artifact.size / 1e6:.1f} MB"


def _kind_trouble(artifact: Artifact) -> tuple[Reach, str] | None:
    if artifact.kind == LLAMA_SERVER:
        return None
    if artifact.kind == CUDA_RUNTIME:
        return Reach.KIND, "holds CUDA libraries, no server"
    return Reach.KIND, f"its kind {artifact.kind} is unknown to this loader"


def _platform_trouble(artifact: Artifact, host: HostFacts) -> tuple[Reach, str] | None:
    if artifact.format not in FORMATS:
        return Reach.FORMAT, f"its format {artifact.format} is unknown to this loader"
    wanted = f"{artifact.platform.system} {artifact.platform.machine}"
    machine = _MACHINES.get(host.machine.lower(), host.machine)
    here = f"{host.system.rstrip('0123456789')} {machine}"
    if wanted != here:
        return Reach.PLATFORM, f"is for {wanted}, this is {here}"
    if artifact.backend not in {"cuda", "cpu"}:
        return Reach.BACKEND, f"its backend {artifact.backend} is unknown to this loader"
    return None


def _gpu_trouble(artifact: Artifact, targets: tuple[str, ...]) -> tuple[Reach, str]:
    if artifact.cuda is None:
        return Reach.BACKEND, "has no CUDA code, and there is a GPU"
    return Reach.GPU, f"{holds(artifact)}: not for {dotted(targets)}"


def _system_trouble(artifact: Artifact, host: HostFacts) -> tuple[Reach, str] | None:
    wanted = artifact.platform
    if host.glibc is None or _older(host.glibc, wanted.glibc):
        here = host.glibc or "none"
        return Reach.GLIBC, f"needs glibc {wanted.glibc}, this machine has {here}"
    if wanted.glibcxx and host.glibcxx and _older(host.glibcxx, wanted.glibcxx):
        needed = f"GLIBCXX {wanted.glibcxx} (libstdc++)"
        return Reach.GLIBC, f"needs {needed}, this machine has {host.glibcxx}"
    return None


def _driver_trouble(
    artifact: Artifact, driver: str | None, *, native: bool
) -> tuple[Reach, str] | None:
    """An unknown driver (ZeroGPU before a GPU is attached) is given the benefit of the doubt."""
    cuda = artifact.cuda
    if cuda is None or driver is None:
        return None
    if _older(driver, cuda.min_driver):
        needed = f"CUDA {cuda.toolkit} needs driver {cuda.min_driver}"
        return Reach.DRIVER, f"{needed}, this machine has {driver}"
    jit = None if native else gpus.jit_driver(cuda.toolkit)
    if jit and _older(driver, jit):
        needed = f"its PTX of CUDA {cuda.toolkit} needs driver {jit}"
        return Reach.DRIVER, f"{needed}, this machine has {driver}"
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


def _older(one: str, other: str) -> bool:
    """Compare versions such as 2.36 and 580.65 by their numbers; 525.60 equals 525.60.0."""
    left, right = (list(map(int, re.findall(r"[0-9]+", text))) for text in (one, other))
    width = max(len(left), len(right))
    return left + [0] * (width - len(left)) < right + [0] * (width - len(right))
