"""Which artifact this host gets, and why each other one is passed over. Pure: no I/O at all.

Order of preference: the most memory of visible GPUs served (or the most GPUs, where their memory
is unknown), machine code (SASS) before code for the driver's
compiler (PTX), CUDA libraries that are there before such that the release brings before such that
are missing, code made for this GPU before code for an older one of its family, then fewer bytes to
download, then the name.
Everything that it needs is an argument, so it can be asked what another machine would get.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from llama_loader import cuda_libraries
from llama_loader.candidates import judge, usable_runtimes
from llama_loader.compatibility import Stage, dotted, holds
from llama_loader.errors import HostError, LoaderError
from llama_loader.manifest import LLAMA_SERVER

if TYPE_CHECKING:
    from collections.abc import Iterable

    from llama_loader.candidates import Candidate
    from llama_loader.cuda_libraries import Library
    from llama_loader.host import HostFacts
    from llama_loader.manifest import Artifact, Manifest

_CODES: Final = {
    Stage.KIND: "NO_ARTIFACT",
    Stage.FORMAT: "NO_ARTIFACT",
    Stage.PLATFORM: "PLATFORM_UNSUPPORTED",
    Stage.BACKEND: "NO_ARTIFACT",
    Stage.GPU: "NO_ARTIFACT_FOR_GPU",
    Stage.GLIBC: "GLIBC_TOO_OLD",
    Stage.DRIVER: "DRIVER_TOO_OLD",
}


@dataclass(frozen=True)
class Wishes:
    """What a person asked for: ``arch`` replaces the detected capability, ``backend`` narrows."""

    arch: str | None = None
    allow_cpu: bool = False
    backend: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What was found about one artifact; ``fits`` says whether it could run here."""

    name: str
    fits: bool
    reason: str


@dataclass(frozen=True)
class Choice:
    """What to fetch.

    Attributes:
        artifact: the chosen one.
        reason: why it.
        runs_on: ``gpu`` or ``cpu``.
        native: machine code for every GPU meant; False where the driver compiles first.
        capabilities: the GPUs that it serves.
        libraries: CUDA libraries that it will use.
        missing: sonames of CUDA libraries that are not here; ``require_libraries`` says so.
        verdicts: one for each artifact of the manifest, in its order.
        runtime_libraries: what of the same release brings all that is missing; None where nothing
            is, where nothing does, or where the CPU would do.
    """

    artifact: Artifact
    reason: str
    runs_on: str
    native: bool
    capabilities: tuple[str, ...]
    libraries: tuple[Library, ...]
    missing: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    runtime_libraries: Artifact | None = None


def select(manifest: Manifest, host: HostFacts, wishes: Wishes) -> Choice:
    """Choose the artifact for this host.

    Raises:
        HostError: nothing fits; the message lists what there is. Missing CUDA libraries are not
            an error here, because fetching needs none: see ``require_libraries``.
    """
    targets = (wishes.arch,) if wishes.arch else host.capabilities
    on_gpu = bool(targets) and wishes.backend != "cpu"
    # Whoever allows the CPU is not made to fetch hundreds of megabytes for a GPU.
    runtimes = () if wishes.allow_cpu else usable_runtimes(manifest, host)
    judged = [judge(one, host, targets if on_gpu else (), runtimes) for one in manifest.artifacts]
    if on_gpu:
        gpu = [one for one in judged if one.stage is Stage.FITS and one.served]
        if gpu:
            return _choice(min(gpu, key=lambda one: one.rank), judged, "gpu")
    if not wishes.allow_cpu and wishes.backend != "cpu":
        raise _no_gpu(host) if not targets else _nothing(manifest, targets, judged, host)
    cpu = [judge(artifact, host, ()) for artifact in manifest.artifacts]
    fitting = [one for one in cpu if one.stage is Stage.FITS]
    if not fitting:
        raise _nothing(manifest, targets, cpu, host)
    best = min(fitting, key=lambda one: (one.artifact.backend != "cpu", one.artifact.size))
    return _choice(best, judged if on_gpu else cpu, "cpu")


def require_libraries(choice: Choice, host: HostFacts) -> None:
    """Refuse a choice whose CUDA libraries neither are here nor come with it, before any start.

    Raises:
        HostError: names the libraries, where they were looked for, the other majors that were
            found, and the packages that bring them.
    """
    if choice.runs_on != "gpu" or not choice.missing or choice.runtime_libraries:
        return
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


def _choice(best: Candidate, judged: Iterable[Candidate], runs_on: str) -> Choice:
    verdicts = tuple(_verdict(one, best, runs_on) for one in judged)
    reason = best.reason
    if runs_on == "cpu":
        reason += "; the CPU is allowed and no GPU can be served"
    return Choice(
        best.artifact,
        reason,
        runs_on,
        best.native,
        best.served,
        best.libraries,
        best.missing if runs_on == "gpu" else (),
        verdicts,
        best.brings if runs_on == "gpu" else None,
    )


def _verdict(one: Candidate, best: Candidate, runs_on: str) -> Verdict:
    if one.artifact is best.artifact:
        reason = one.reason if runs_on == "gpu" or one.served == () else best.reason
        return Verdict(one.artifact.name, fits=True, reason=f"chosen: {reason}")
    if runs_on == "gpu" and one.artifact is best.brings:
        size = f"{one.artifact.size / 1e6:.1f} MB"
        return Verdict(one.artifact.name, fits=True, reason=f"fetched too: libraries; {size}")
    if one.stage is not Stage.FITS:
        return Verdict(one.artifact.name, fits=False, reason=one.reason)
    return Verdict(one.artifact.name, fits=True, reason=f"{_why_not(one, best)} ({one.reason})")


def _why_not(one: Candidate, best: Candidate) -> str:
    chosen = best.artifact.name
    if one.artifact.backend != best.artifact.backend:
        return f"would run, but {chosen} is for this backend"
    if one.weight != best.weight:
        more = "GPUs" if len(one.served) < len(best.served) else "of the GPUs' memory"
        return f"would run, but {chosen} serves more {more}"
    if one.native != best.native:
        return f"would run, but {chosen} has machine code"
    if one.lack != best.lack:
        there = "here" if best.lack == 0 else "in this release"
        return f"would run, but the libraries of {chosen} are {there}"
    if one.gap != best.gap:
        return f"would run, but {chosen} is closer to this GPU"
    return (
        f"would run, but {chosen} is smaller"
        if one.artifact.size != best.artifact.size
        else (f"would run, but {chosen} comes first by name")
    )


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
    return HostError(
        "NO_GPU",
        f"no NVIDIA GPU: {found} (asked NVML, nvidia-smi and /proc/driver/nvidia)",
        hint="check that the Space's hardware is ZeroGPU or another GPU; to run on the CPU, give"
        " --allow-cpu or set YAKULINGO_SPACES_ALLOW_CPU=1; YAKULINGO_SPACES_CUDA_ARCH names a"
        " compute capability that cannot be detected",
    )


def _nothing(
    manifest: Manifest, targets: tuple[str, ...], judged: list[Candidate], host: HostFacts
) -> LoaderError:
    """The error of the artifact that came furthest, with a list of what there is."""
    furthest = max((one.stage for one in judged), default=Stage.KIND)
    best = [one for one in judged if one.stage is furthest]
    servers = [one for one in manifest.artifacts if one.kind == LLAMA_SERVER]
    there = ", ".join(dict.fromkeys(holds(artifact) for artifact in servers))
    what = f"compute capability {dotted(targets)}" if targets else "the CPU"
    why = {
        Stage.GPU: "none has code for it",
        Stage.BACKEND: "none is for it",
        Stage.FORMAT: "none can be read",
        Stage.KIND: "none is a server",
    }.get(furthest, "; ".join(f"{one.artifact.name} {one.reason}" for one in best[:3]))
    return HostError(
        _CODES.get(furthest, "NO_ARTIFACT"),
        f"release {manifest.release} has nothing for {what} on this machine: {why}"
        f" (there is: {there or 'nothing at all'})",
        hint=_hint(furthest, host),
    )


def _hint(stage: Stage, host: HostFacts) -> str:
    if stage is Stage.GLIBC:
        return (
            f"this system's glibc is {host.glibc}: use a newer base image, or a release built on"
            " an older system"
        )
    if stage is Stage.DRIVER:
        return "update the NVIDIA driver, or use a release of an older CUDA line (cu124)"
    if stage is Stage.GPU:
        return (
            "build that set (invoke build-cuda --arch-set …) and publish it, or run on the CPU"
            " with --allow-cpu"
        )
    return "look at the release's manifest; `doctor` shows why each artifact is passed over"
