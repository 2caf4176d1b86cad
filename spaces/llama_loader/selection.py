"""Choose the artifact for a host, and give a reason for each other one.

Nothing here does I/O: everything is an argument, so another machine can be asked for, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from llama_loader import cuda_libraries
from llama_loader.compatibility import Candidate, dotted, holds, judge
from llama_loader.errors import HostError
from llama_loader.manifest import CUDA_RUNTIME, LLAMA_SERVER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llama_loader.cuda_libraries import Library
    from llama_loader.host import HostFacts
    from llama_loader.manifest import Manifest

_LOOK: Final = "look at the release's manifest; `doctor` shows why each artifact is passed over"
_HINTS: Final = {
    # in the order of ``compatibility.judge``
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
    runtimes = (
        [] if wishes.allow_cpu else [one for one in manifest.artifacts if one.kind == CUDA_RUNTIME]
    )
    judged = [judge(one, host, targets, runtimes) for one in manifest.artifacts]
    fitting, for_cpu = [one for one in judged if one.capabilities], ""
    if not fitting:
        if not wishes.allow_cpu:
            raise _nothing(manifest, targets, judged) if targets else _no_gpu(host)
        for_cpu = "; the CPU is allowed and no GPU can be served"
        on_cpu = [judge(one, host, ()) for one in manifest.artifacts]
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
    stems = {name.split(".so.")[0] for name in missing}
    others = [
        f"{one.soname} in {one.folder}" for one in libraries if one.soname.split(".so.")[0] in stems
    ]
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
        f"no NVIDIA GPU: {found} (asked NVML, nvidia-smi and /proc/driver/nvidia)",
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
    there = ", ".join(dict.fromkeys(holds(one.artifact) for one in servers)) or "nothing at all"
    return HostError(
        furthest,
        f"release {manifest.release} has nothing for {what} on this machine: {why}"
        f" (there is: {there})",
        hint=_HINTS[furthest],
    )
