"""Choose the artifact for a host, and give a reason for each other one.

Each artifact is judged by itself: what it would serve and with what, or why it cannot. Nothing here
does I/O: everything is an argument, so another machine can be asked for, too.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from llama_loader import cuda_libraries, gpus
from llama_loader.errors import HostError
from llama_loader.manifest import CUDA_RUNTIME, LLAMA_SERVER

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Sequence

    from llama_loader.cuda_libraries import Library
    from llama_loader.host import HostFacts
    from llama_loader.manifest import Artifact, Manifest

_KNOWN: Final = {
    "kind": {LLAMA_SERVER},
    "format": {"tar.gz", "tar.xz", "tar.zst"},
    "backend": {"cuda", "cpu"},
}
_LOOK: Final = "look at the release's manifest; `doctor` shows why each artifact is passed over"
_HINTS: Final = {
    # in the order of the checks of ``_judge``
    "NO_ARTIFACT": _LOOK,
    "PLATFORM_UNSUPPORTED": _LOOK,
    "NO_ARTIFACT_FOR_GPU": "build that set (invoke build-cuda --arch-set …) and publish it, or run"
    " on the CPU with --allow-cpu",
    "GLIBC_TOO_OLD": "use a newer base image, or a release built on an older system",
    "DRIVER_TOO_OLD": "update the NVIDIA driver, or use a release of an older CUDA line (cu124)",
}


@dataclass(frozen=True)
class Wishes:
    """What a person asked for: ``arch`` replaces the detected compute capabilities."""

    arch: str | None = None
    allow_cpu: bool = False


@dataclass(frozen=True)
class Candidate:
    """An artifact, and what it would do on this machine.

    Attributes:
        artifact: the one judged.
        trouble, reason: code of the error of the check that it does not pass, and why; where it
            passes all, no code, and what it serves.
        capabilities: those of the GPUs that it has code for; empty for the CPU.
        weight: the memory of the GPUs that it serves, or their number.
        native: machine code for all that it serves; False where the driver compiles first.
        gap: how much older its code is than the GPUs, added up.
        libraries, missing: CUDA libraries that this machine has, and that it lacks.
        runtime_libraries: the release's artifact that holds all of the missing ones.
    """

    artifact: Artifact
    trouble: str
    reason: str
    capabilities: tuple[str, ...] = ()
    weight: int = 0
    native: bool = True
    gap: int = 0
    libraries: tuple[Library, ...] = ()
    missing: tuple[str, ...] = ()
    runtime_libraries: Artifact | None = None

    @property
    def runs_on(self) -> str:
        """``gpu`` or ``cpu``."""
        return "gpu" if self.capabilities else "cpu"


@dataclass(frozen=True)
class Considered:
    """One artifact of the manifest: whether it could run on this host, and why it is not taken."""

    name: str
    fits: bool
    reason: str


@dataclass(frozen=True)
class Choice(Candidate):
    """The artifact to fetch; ``verdicts`` has one for each of the manifest, in its order."""

    verdicts: tuple[Considered, ...] = ()


def select(manifest: Manifest, host: HostFacts, wishes: Wishes) -> Choice:
    """Choose the artifact for this host.

    Raises:
        HostError: nothing fits; the message lists what there is. Missing CUDA libraries are not
            an error here, because fetching needs none: see ``require_libraries``.
    """
    targets = (wishes.arch,) if wishes.arch else host.capabilities
    # Whoever allows the CPU is not made to fetch hundreds of megabytes for a GPU.
    runtimes = () if wishes.allow_cpu else manifest.artifacts
    judged = [_judge(one, host, targets, runtimes) for one in manifest.artifacts]
    fitting, for_cpu = [one for one in judged if one.capabilities], ""
    if not fitting:
        if not wishes.allow_cpu:
            raise _nothing(manifest, targets, judged) if targets else _no_gpu(host)
        for_cpu = "; the CPU is allowed and no GPU can be served"
        on_cpu = [_judge(one, host, ()) for one in manifest.artifacts]
        fitting = [one for one in on_cpu if not one.trouble]
        if not fitting:
            raise _nothing(manifest, targets, on_cpu)
    best = min(fitting, key=_rank)
    verdicts = tuple(_considered(one, best) for one in judged)
    return Choice(**{**vars(best), "reason": best.reason + for_cpu}, verdicts=verdicts)


def require_libraries(choice: Choice, host: HostFacts) -> None:
    """Refuse a choice whose CUDA libraries this machine lacks and the release does not bring.

    Raises:
        HostError: names the libraries, where they were looked for, the other majors that were
            found, and the packages that bring them.
    """
    if choice.missing and not choice.runtime_libraries:
        raise missing_libraries(choice.artifact.name, choice.missing, host.libraries)


def missing_libraries(
    what: str, missing: tuple[str, ...], libraries: tuple[Library, ...]
) -> HostError:
    """Return the error for CUDA libraries that are not here: which, where looked, what to add."""
    stems = tuple(f"{name.partition('.so.')[0]}.so." for name in missing)
    others = [f"{one.soname} in {one.folder}" for one in libraries if one.soname.startswith(stems)]
    found = f"; found only {', '.join(others)}" if others else ""
    mismatch = cuda_libraries.unpaired(missing, libraries)
    found = f"; but {mismatch}" if mismatch else found
    packages = " ".join(cuda_libraries.packages(missing))
    return HostError(
        "CUDA_LIBRARY_MISSING",
        f"{what} needs {', '.join(missing)}, which is neither in LD_LIBRARY_PATH, nor in"
        " site-packages/nvidia, nor in a CUDA toolkit under /usr/local or /cuda-image, nor known"
        f" to ldconfig{found}",
        hint=f"add to requirements.txt (or pip install): {packages}",
    )


def _considered(one: Candidate, best: Candidate) -> Considered:
    name, size = one.artifact.name, f"{one.artifact.size / 1e6:.1f} MB"
    if one.artifact is best.artifact:
        return Considered(name, fits=True, reason=f"chosen: {best.reason}")
    if one.artifact is best.runtime_libraries:
        return Considered(name, fits=True, reason=f"fetched too: libraries; {size}")
    if one.trouble:
        return Considered(name, fits=False, reason=one.reason)
    why = f"would run, but {_why_not(one, best)} ({one.reason})"
    return Considered(name, fits=True, reason=why)


def _rank(one: Candidate) -> tuple[bool, int, bool, bool, bool, int, int, str]:
    """Return the order of preference among those that fit; the smallest is the best.

    Machine code comes before code for the driver's compiler, libraries that the host has before
    those that the release brings, code made for this GPU before code for an older one.
    """
    brought = one.runtime_libraries
    return (
        one.artifact.backend != "cpu",
        -one.weight,
        not one.native,
        bool(one.missing),
        bool(one.missing) and brought is None,
        one.gap,
        one.artifact.size + (brought.size if brought else 0),
        one.artifact.name,
    )


def _why_not(one: Candidate, best: Candidate) -> str:
    """Name the first difference in ``_rank`` between one that fits and the best."""
    chosen = best.artifact.name
    more = "GPUs" if len(one.capabilities) < len(best.capabilities) else "of the GPUs' memory"
    reasons = (
        f"{chosen} is for this backend",
        f"{chosen} serves more {more}",
        f"{chosen} has machine code",
        f"the libraries of {chosen} are here",
        f"the libraries of {chosen} are in this release",
        f"{chosen} is closer to this GPU",
        f"{chosen} is smaller",
        f"{chosen} comes first by name",
    )
    ranks = zip(_rank(one), _rank(best), reasons, strict=True)
    return next((reason for mine, its, reason in ranks if mine != its), reasons[-1])


def _no_gpu(host: HostFacts) -> HostError:
    named = ", ".join(gpu.name for gpu in host.gpus)
    if named and not host.visible:
        return HostError(
            "NO_GPU",
            f"no NVIDIA GPU: CUDA_VISIBLE_DEVICES={host.visible_devices!r} hides all: {named}",
            hint="unset it, or name a GPU that `nvidia-smi -L` lists; YAKULINGO_SPACES_CUDA_ARCH"
            " chooses for a GPU that is not seen; to run on the CPU, give --allow-cpu",
        )
    found = f"only {named}, whose compute capability is unknown" if named else "none was found"
    found = "; ".join([found, *host.complaints])
    return HostError(
        "NO_GPU",
        f"no NVIDIA GPU: {found} (asked NVML and /proc/driver/nvidia)",
        hint="check that the Space's hardware is ZeroGPU or another GPU; to run on the CPU, give"
        " --allow-cpu or set YAKULINGO_SPACES_ALLOW_CPU=1; YAKULINGO_SPACES_CUDA_ARCH names a"
        " compute capability that cannot be detected",
    )


def _nothing(
    manifest: Manifest, targets: tuple[str, ...], judged: Sequence[Candidate]
) -> HostError:
    """Return the error of the server that came furthest, with a list of what there is."""
    servers = [one for one in judged if one.artifact.kind == LLAMA_SERVER]
    furthest = max((one.trouble for one in servers), key=[*_HINTS].index, default="NO_ARTIFACT")
    best = [one for one in servers if one.trouble == furthest][:3]
    why = "; ".join(f"{one.artifact.name} {one.reason}" for one in best) or "none is a server"
    why = "none has code for it" if furthest == "NO_ARTIFACT_FOR_GPU" else why
    what = f"compute capability {dotted(targets)}" if targets else "the CPU"
    there = ", ".join(dict.fromkeys(_holds(one.artifact) for one in servers)) or "nothing at all"
    return HostError(
        furthest,
        f"release {manifest.release} has nothing for {what} on this machine: {why}"
        f" (there is: {there})",
        hint=_HINTS[furthest],
    )


def _judge(
    artifact: Artifact,
    host: HostFacts,
    targets: tuple[str, ...],
    others: Sequence[Artifact] = (),
) -> Candidate:
    """Judge one artifact for the GPUs ``targets``; for the CPU where there are none.

    One of the others may bring what this machine lacks of CUDA's libraries.
    """
    codes = {target: code for target in targets if (code := cuda_code(artifact, target))}
    native = all(kind == "sass" for kind, _ in codes.values())
    checks = (
        ("NO_ARTIFACT", _unknown(artifact)),
        ("PLATFORM_UNSUPPORTED", _other_platform(artifact, host)),
        (
            "NO_ARTIFACT",
            "has no CUDA code, and there is a GPU" if targets and artifact.cuda is None else "",
        ),
        ("NO_ARTIFACT_FOR_GPU", _no_code(artifact, targets) if targets and not codes else ""),
        ("GLIBC_TOO_OLD", _old_system(artifact, host)),
        ("DRIVER_TOO_OLD", _old_driver(artifact, host, native=native) if targets else ""),
    )
    for trouble, reason in checks:
        if reason:
            return Candidate(artifact, trouble, reason)
    if not targets:
        also = "CUDA; can run on the CPU too" if artifact.backend == "cuda" else "the CPU"
        return Candidate(artifact, "", f"built for {also}")
    taken, missing = cuda_libraries.split_needs(artifact.needs, host.libraries)
    brought = _bringing(artifact, missing, others, host)
    slow = "PTX, which the driver compiles at the first start (slow),"
    left = [target for target in targets if target not in codes]
    bringing = f", brought by {brought.name}" if brought else ""
    parts = (
        f"{'machine code' if native else slow} for {dotted(codes)}",
        f"none for {dotted(left)}" if left else "",
        f"{', '.join(missing)} missing here{bringing}" if missing else "",
        cuda_libraries.unpaired(missing, host.libraries),
        f"{artifact.size / 1e6:.1f} MB",
    )
    return Candidate(
        artifact,
        "",
        "; ".join(filter(None, parts)),
        capabilities=tuple(codes),
        weight=_weight(host, codes),
        native=native,
        gap=sum(gap for _, gap in codes.values()),
        libraries=taken,
        missing=missing,
        runtime_libraries=brought,
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
    artifact: Artifact, missing: tuple[str, ...], others: Iterable[Artifact], host: HostFacts
) -> Artifact | None:
    """Choose the libraries for a server: of its own toolkit, else of the next one that covers it.

    Not of an older toolkit: a soname stays from 12.0 to 12.9, but functions are added.
    """
    usable = [
        (one.cuda.toolkit != artifact.cuda.toolkit, one.size, one.name, one)
        for one in others
        if one.kind == CUDA_RUNTIME
        and one.cuda
        and artifact.cuda
        and missing
        and set(missing) <= set(one.provides)
        and one.format in _KNOWN["format"]
        and not _older(one.cuda.toolkit, artifact.cuda.toolkit)
        and not (_other_platform(one, host) or _old_system(one, host))
        and not _old_driver(one, host, native=True)
        and not cuda_libraries.split_needs(one.needs, host.libraries)[1]
    ]
    return min(usable)[-1] if usable else None


def _unknown(artifact: Artifact) -> str:
    if artifact.kind == CUDA_RUNTIME:
        return "holds CUDA libraries, no server"
    values = {name: getattr(artifact, name) for name in _KNOWN}
    unknown = [f"{name} {value}" for name, value in values.items() if value not in _KNOWN[name]]
    return f"its {' and '.join(unknown)} is unknown to this loader" if unknown else ""


def _other_platform(artifact: Artifact, host: HostFacts) -> str:
    wanted = f"{artifact.platform.system} {artifact.platform.machine}"
    here = f"{host.system} {host.machine}"
    return f"is for {wanted}, this is {here}" if wanted != here else ""


def _no_cuda(artifact: Artifact) -> str:
    return "has no CUDA code, and there is a GPU" if artifact.cuda is None else ""


def _no_code(artifact: Artifact, targets: tuple[str, ...]) -> str:
    return f"{_holds(artifact)}: not for {dotted(targets)}"


def _old_system(artifact: Artifact, host: HostFacts) -> str:
    glibc, glibcxx = artifact.platform.glibc, artifact.platform.glibcxx
    if host.glibc is None or _older(host.glibc, glibc):
        return f"needs glibc {glibc}, this machine has {host.glibc or 'none'}"
    if glibcxx and host.glibcxx and _older(host.glibcxx, glibcxx):
        return f"needs GLIBCXX {glibcxx} (libstdc++), this machine has {host.glibcxx}"
    return ""


def _old_driver(artifact: Artifact, host: HostFacts, *, native: bool) -> str:
    """An unknown driver (ZeroGPU before a GPU is attached) is given the benefit of the doubt."""
    cuda, driver = artifact.cuda, host.driver
    if cuda is None or driver is None:
        return ""
    jit = None if native else gpus.jit_driver(cuda.toolkit)
    for what, wanted in (("CUDA", cuda.min_driver), ("its PTX of CUDA", jit)):
        if wanted and _older(driver, wanted):
            return f"{what} {cuda.toolkit} needs driver {wanted}, this machine has {driver}"
    return ""


def _holds(artifact: Artifact) -> str:
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
    numbers = (map(int, re.findall(r"[0-9]+", text)) for text in (one, other))
    pairs = itertools.zip_longest(*numbers, fillvalue=0)
    return next((mine < its for mine, its in pairs if mine != its), False)
