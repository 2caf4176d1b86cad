"""Which artifact this host gets, and why each other one is passed over. Pure: no I/O at all.

Order of preference: the most GPUs served, machine code (SASS) before code for the driver's
compiler (PTX), CUDA libraries that are there before such that the release brings before such that
are missing, code made for this GPU before code for an older one of its family, then fewer bytes to
download, then the name.
Everything that it needs is an argument, so it can be asked what another machine would get.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from llama_loader.errors import HostError, LoaderError
from llama_loader.facts import cuda_libraries
from llama_loader.facts.compatibility import (
    Stage,
    cuda_code,
    dotted,
    driver_trouble,
    gap,
    glibc_trouble,
    holds,
    older,
    refused_by_kind,
    refused_by_platform,
)
from llama_loader.manifest import CUDA_RUNTIME, LLAMA_SERVER

if TYPE_CHECKING:
    from collections.abc import Iterable

    from llama_loader.facts.cuda_libraries import Library
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


@dataclass(frozen=True)
class _Candidate:
    artifact: Artifact
    stage: Stage
    reason: str
    served: tuple[str, ...] = ()
    native: bool = True
    gap: int = 0
    libraries: tuple[Library, ...] = ()
    missing: tuple[str, ...] = ()
    brings: Artifact | None = None

    @property
    def lack(self) -> int:
        """0: its libraries are here; 1: the release brings them; 2: they are missing."""
        if not self.missing:
            return 0
        return 1 if self.brings else 2

    @property
    def rank(self) -> tuple[bool, int, bool, int, int, int, str]:
        """Smaller is better."""
        return (
            self.artifact.backend != "cuda",
            -len(self.served),
            not self.native,
            self.lack,
            self.gap,
            self.artifact.size + (self.brings.size if self.brings else 0),
            self.artifact.name,
        )


def select(manifest: Manifest, host: HostFacts, wishes: Wishes) -> Choice:
    """Choose the artifact for this host.

    Raises:
        HostError: nothing fits; the message lists what there is. Missing CUDA libraries are not
            an error here, because fetching needs none: see ``require_libraries``.
    """
    targets = (wishes.arch,) if wishes.arch else host.capabilities
    on_gpu = bool(targets) and wishes.backend != "cpu"
    # Whoever allows the CPU is not made to fetch hundreds of megabytes for a GPU.
    runtimes = () if wishes.allow_cpu else _usable_runtimes(manifest, host)
    judged = [_judge(one, host, targets if on_gpu else (), runtimes) for one in manifest.artifacts]
    if on_gpu:
        gpu = [one for one in judged if one.stage is Stage.FITS and one.served]
        if gpu:
            return _choice(min(gpu, key=lambda one: one.rank), judged, "gpu")
    if not wishes.allow_cpu and wishes.backend != "cpu":
        raise _no_gpu(host) if not targets else _nothing(manifest, targets, judged, host)
    cpu = [_judge(artifact, host, ()) for artifact in manifest.artifacts]
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
    packages = " ".join(cuda_libraries.packages(missing))
    return HostError(
        "CUDA_LIBRARY_MISSING",
        f"{what} needs {', '.join(missing)}, which is neither in LD_LIBRARY_PATH, nor in"
        " site-packages/nvidia, nor in a CUDA toolkit under /usr/local or /cuda-image, nor known"
        f" to ldconfig{found}",
        hint=f"add to requirements.txt (or pip install): {packages}",
    )


def _judge(
    artifact: Artifact,
    host: HostFacts,
    targets: tuple[str, ...],
    runtimes: tuple[Artifact, ...] = (),
) -> _Candidate:
    """Judge one artifact for the GPUs ``targets``; for the CPU where there are none."""
    refused = refused_by_kind(artifact) or refused_by_platform(artifact, host)
    if refused:
        return _Candidate(artifact, *refused)
    if targets:
        return _judge_gpu(artifact, host, targets, runtimes)
    trouble = glibc_trouble(artifact, host)
    if trouble:
        return _Candidate(artifact, Stage.GLIBC, trouble)
    if artifact.backend == "cuda":
        return _Candidate(artifact, Stage.FITS, "built for CUDA; can run on the CPU too")
    return _Candidate(artifact, Stage.FITS, "built for the CPU")


def _usable_runtimes(manifest: Manifest, host: HostFacts) -> tuple[Artifact, ...]:
    """Return the release's CUDA libraries that this host could load."""
    return tuple(
        one
        for one in manifest.artifacts
        if one.kind == CUDA_RUNTIME
        and not refused_by_platform(one, host)
        and not glibc_trouble(one, host)
        and not driver_trouble(one, host.driver, native=True)
        and not cuda_libraries.split_needs(one.needs, host.libraries)[1]
    )


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
        and not older(one.cuda.toolkit, artifact.cuda.toolkit)
    ]
    return min(usable)[-1] if usable else None


def _judge_gpu(
    artifact: Artifact, host: HostFacts, targets: tuple[str, ...], runtimes: tuple[Artifact, ...]
) -> _Candidate:
    if artifact.cuda is None:
        return _Candidate(artifact, Stage.BACKEND, "has no CUDA code, and there is a GPU")
    codes = {target: cuda_code(artifact, target) for target in targets}
    served = tuple(target for target, code in codes.items() if code)
    if not served:
        return _Candidate(
            artifact,
            Stage.GPU,
            f"{holds(artifact)}: not for {dotted(targets)}",
        )
    trouble = glibc_trouble(artifact, host)
    if trouble:
        return _Candidate(artifact, Stage.GLIBC, trouble)
    native = all(codes[target] == "sass" for target in served)
    trouble = driver_trouble(artifact, host.driver, native=native)
    if trouble:
        return _Candidate(artifact, Stage.DRIVER, trouble)
    taken, missing = cuda_libraries.split_needs(artifact.needs, host.libraries)
    distance = sum(gap(artifact, target) for target in served)
    brings = _bringing(artifact, missing, runtimes)
    fitting = _Candidate(artifact, Stage.FITS, "", served, native, distance, taken, missing, brings)
    return replace(fitting, reason=_fits_reason(fitting, targets))


def _fits_reason(one: _Candidate, targets: tuple[str, ...]) -> str:
    slow = "PTX, which the driver compiles at the first start (slow),"
    parts = [f"{'machine code' if one.native else slow} for {dotted(one.served)}"]
    left = tuple(target for target in targets if target not in one.served)
    parts += [f"none for {dotted(left)}"] if left else []
    if one.missing:
        bringing = f", brought by {one.brings.name}" if one.brings else ""
        parts.append(f"{', '.join(one.missing)} missing here{bringing}")
    return f"{'; '.join(parts)}; {one.artifact.size / 1e6:.1f} MB"


def _choice(best: _Candidate, judged: Iterable[_Candidate], runs_on: str) -> Choice:
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


def _verdict(one: _Candidate, best: _Candidate, runs_on: str) -> Verdict:
    if one.artifact is best.artifact:
        reason = one.reason if runs_on == "gpu" or one.served == () else best.reason
        return Verdict(one.artifact.name, fits=True, reason=f"chosen: {reason}")
    if runs_on == "gpu" and one.artifact is best.brings:
        size = f"{one.artifact.size / 1e6:.1f} MB"
        return Verdict(one.artifact.name, fits=True, reason=f"fetched too: libraries; {size}")
    if one.stage is not Stage.FITS:
        return Verdict(one.artifact.name, fits=False, reason=one.reason)
    return Verdict(one.artifact.name, fits=True, reason=f"{_why_not(one, best)} ({one.reason})")


def _why_not(one: _Candidate, best: _Candidate) -> str:
    chosen = best.artifact.name
    if one.artifact.backend != best.artifact.backend:
        return f"would run, but {chosen} is for this backend"
    if len(one.served) != len(best.served):
        return f"would run, but {chosen} serves more GPUs"
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
    found = f"only {named}, whose compute capability is unknown" if named else "none was found"
    return HostError(
        "NO_GPU",
        f"no NVIDIA GPU: {found} (asked NVML, nvidia-smi and /proc/driver/nvidia)",
        hint="check that the Space's hardware is ZeroGPU or another GPU; to run on the CPU, give"
        " --allow-cpu or set YAKULINGO_SPACES_ALLOW_CPU=1; YAKULINGO_SPACES_CUDA_ARCH names a"
        " compute capability that cannot be detected",
    )


def _nothing(
    manifest: Manifest, targets: tuple[str, ...], judged: list[_Candidate], host: HostFacts
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
