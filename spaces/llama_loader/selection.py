"""Choose the artifact for a host, and give a reason for each other one.

Each artifact is judged by itself: what it would serve and with what, or why it cannot. Nothing here
does I/O: everything is an argument, so it can choose for another machine, too.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from llama_loader import cuda_libraries
from llama_loader.cuda_libraries import Library
from llama_loader.errors import HostError
from llama_loader.host import SUPPOSED, HostFacts
from llama_loader.manifest import CUDA_RUNTIME, LLAMA_SERVER, Artifact, Manifest

_KNOWN: Final = {
    "kind": {LLAMA_SERVER, CUDA_RUNTIME},
    "format": {"tar.gz", "tar.xz", "tar.zst"},
    "backend": {"cuda", "cpu"},
}
_CHECKS: Final = (
    *("NO_ARTIFACT", "PLATFORM_UNSUPPORTED", "NO_ARTIFACT_FOR_GPU"),
    *("GLIBC_TOO_OLD", "DRIVER_TOO_OLD"),
)
"""Codes of the errors of ``_troubles``, in its order."""


@dataclass(frozen=True)
class Considered:
    """One artifact of the manifest: whether it could run on this host, and why it is not taken."""

    name: str
    fits: bool
    reason: str


@dataclass(frozen=True)
class Choice:
    """An artifact that could be fetched, and what it would do on this machine."""

    artifact: Artifact
    reason: str  # what it serves, or why it cannot
    trouble: str = ""  # code of the error of the check that it does not pass, else empty
    # what is compared, the most important first: less is better, and why in words
    rank: tuple[tuple[Any, str], ...] = ()
    capabilities: tuple[str, ...] = ()  # those of the GPUs that it has code for; empty for the CPU
    # machine code for all that it serves; False where the driver compiles first
    native: bool = True
    # CUDA libraries that this machine has, and that it lacks
    libraries: tuple[Library, ...] = ()
    missing: tuple[str, ...] = ()
    # the release's artifact that holds all of the missing ones
    runtime_libraries: Artifact | None = None
    # on each artifact of the manifest, in its order, if this one is chosen
    verdicts: tuple[Considered, ...] = ()

    @property
    def runs_on(self) -> str:
        """``gpu`` or ``cpu``."""
        return "gpu" if self.capabilities else "cpu"


def select(
    manifest: Manifest, host: HostFacts, *, arch: str | None = None, allow_cpu: bool = False
) -> Choice:
    """Choose the artifact for this host; ``arch`` replaces the detected compute capabilities.

    Raises:
        HostError: nothing fits; the message lists what there is. Missing CUDA libraries are not
            an error here, because fetching needs none: see ``require_libraries``.
    """
    targets = (arch,) if arch else host.capabilities
    if not targets and not allow_cpu:
        raise _no_gpu(host)
    # With the CPU allowed, no hundreds of megabytes are fetched for a GPU.
    runtimes = [] if allow_cpu else _runtimes(manifest, host)
    judged = [_judge(one, host, targets, runtimes) for one in manifest.artifacts]
    candidates = judged
    if targets and allow_cpu and all(one.trouble for one in judged):
        candidates = [_judge(one, host, ()) for one in manifest.artifacts]
    fitting = [one for one in candidates if not one.trouble]
    if not fitting:
        raise _nothing(manifest, host, targets, candidates)
    best = min(fitting, key=lambda one: one.rank)
    return replace(best, verdicts=tuple(_considered(one, best) for one in judged))


def refusals(manifest: Manifest, host: HostFacts) -> tuple[Considered, ...]:
    """Return why each artifact is not taken, where ``select`` finds none for the host."""
    judged = [_judge(one, host, host.capabilities) for one in manifest.artifacts]
    return tuple(Considered(one.artifact.name, not one.trouble, one.reason) for one in judged)


def require_libraries(choice: Choice, host: HostFacts) -> None:
    """Refuse a choice whose CUDA libraries this machine lacks and the release does not bring."""
    if choice.missing and not choice.runtime_libraries:
        raise missing_libraries(choice.artifact.name, choice.missing, host.libraries)


def missing_libraries(
    what: str, missing: tuple[str, ...], libraries: tuple[Library, ...]
) -> HostError:
    """Return the error: which, where they were looked for, what was found, what to install."""
    stems = tuple(f"{name.partition('.so.')[0]}.so." for name in missing)
    others = [
        f"{one.soname} in {one.folder} (version {one.version or 'unknown'})"
        for one in libraries
        if one.soname.startswith(stems)
    ]
    found = f"; found only {', '.join(others)}" if others else ""
    if any(one.soname in missing for one in libraries):
        found += "; cuBLAS and cuBLASLt have to be of one version"
    packages, names = " ".join(cuda_libraries.packages(missing)), ", ".join(missing)
    return HostError(
        "CUDA_LIBRARY_MISSING", what=what, missing=names, found=found, packages=packages
    )


def _considered(one: Choice, best: Choice) -> Considered:
    name, chosen = one.artifact.name, best.artifact.name
    if name == chosen:
        return Considered(name, fits=True, reason=f"chosen: {best.reason}")
    if one.artifact is best.runtime_libraries:
        size = f"{one.artifact.size / 1e6:.1f} MB"
        return Considered(name, fits=True, reason=f"fetched too: libraries; {size}")
    if one.trouble:
        return Considered(name, fits=False, reason=one.reason)
    ranks = zip(one.rank, best.rank, strict=True)
    why = next(why for (mine, why), (its, _) in ranks if mine != its).format(chosen)
    return Considered(name, fits=True, reason=f"would run, but {why} ({one.reason})")


def _no_gpu(host: HostFacts) -> HostError:
    named = ", ".join(gpu.name for gpu in host.gpus)
    if host.gpu_source == SUPPOSED:
        return HostError("NO_GPU/supposed", called=host.called)
    found = f"only {named}, whose compute capability is unknown" if named else "none was found"
    if named and not host.visible:
        found = f"CUDA_VISIBLE_DEVICES={host.visible_devices!r} hides all: {named}"
    return HostError("NO_GPU", found="; ".join([found, *host.complaints]))


def _nothing(
    manifest: Manifest, host: HostFacts, targets: tuple[str, ...], judged: Sequence[Choice]
) -> HostError:
    """Return the error of the server that came furthest, with a list of what there is."""
    servers = [one for one in judged if one.artifact.kind == LLAMA_SERVER]
    furthest = max((one.trouble for one in servers), key=_CHECKS.index, default="NO_ARTIFACT")
    best = [one for one in servers if one.trouble == furthest][:3]
    why = "; ".join(f"{one.artifact.name} {one.reason}" for one in best) or "none is a server"
    why = "none has code for it" if furthest == "NO_ARTIFACT_FOR_GPU" else why
    what = f"compute capability {dotted(targets)}" if targets else "the CPU"
    there = ", ".join(dict.fromkeys(_holds(one.artifact) for one in servers)) or "nothing at all"
    return HostError(
        f"{furthest}/release",
        release=manifest.release,
        what=what,
        called=host.called,
        why=why,
        there=there,
        building=building(targets) if targets else "",
        list="its verdicts say" if host.gpu_source == SUPPOSED else "the page of `doctor` lists",
    )


def building(capabilities: Sequence[str]) -> str:
    """Say how the farm builds a set for these GPUs, or that no line of it can.

    CUDA 12.8, the default line, has code for 5.0 to 12.0, and CUDA 13.0 for 7.5 to 12.1
    (build/targets.toml).
    """
    numbers = sorted(int(one) for one in capabilities)
    for line, oldest, newest in (("", 50, 120), (" --line cu130", 75, 121)):
        if oldest <= numbers[0] and numbers[-1] <= newest:
            command = f"invoke build-cuda{line} --archs '{';'.join(capabilities)}'"
            return f"build a set for them ({command}) and publish it"
    return f"use other GPUs: no line of the farm has code for all of {dotted(capabilities)}"


def _judge(
    artifact: Artifact, host: HostFacts, targets: tuple[str, ...], others: Sequence[Artifact] = ()
) -> Choice:
    """Judge one artifact for GPUs, or the CPU; one of the others may bring CUDA libraries."""
    if artifact.kind == CUDA_RUNTIME:
        return Choice(artifact, "holds CUDA libraries, no server", "NO_ARTIFACT")
    codes = {target: code for target in targets if (code := cuda_code(artifact, target))}
    for trouble, reason in _troubles(artifact, host, targets):
        return Choice(artifact, reason, trouble)
    size, name = (artifact.size, "{} is smaller"), (artifact.name, "{} comes first by name")
    if not targets:
        also = "CUDA; can run on the CPU too" if artifact.cuda else "the CPU"
        backend = (artifact.backend != "cpu", "{} is for this backend")
        return Choice(artifact, f"built for {also}", rank=(backend, size, name))
    native = all(kind == "sass" for kind, _ in codes.values())
    toolkit = artifact.cuda.toolkit if artifact.cuda else ""
    taken, missing = cuda_libraries.split_needs(artifact.needs, host.libraries)
    brought = _bringing(artifact, missing, others) if missing else None
    slow = "PTX, which the driver compiles at the first start (slow),"
    left = [target for target in targets if target not in codes]
    bringing = f", brought by {brought.name}" if brought else ""
    parts = (
        f"{'machine code' if native else slow} for {dotted(codes)}",
        f"none for {dotted(left)}" if left else "",
        f"{', '.join(missing)} missing here{bringing}" if missing else "",
        f"{artifact.size / 1e6:.1f} MB",
    )
    # a model has to fit into the memory of the GPUs; where one's is unknown, their number counts
    known = all(gpu.memory for gpu in host.visible)
    served = [(gpu.memory or 0) if known else 1 for gpu in host.visible if gpu.capability in codes]
    rank = (
        (-sum(served), "{} serves more GPUs, or those with more memory"),
        (not native, "{} has machine code"),
        ("" if native else toolkit, "the PTX of {} is taken by older drivers"),
        (bool(missing), "the libraries of {} are here"),
        (bool(missing) and not brought, "the libraries of {} are in this release"),
        (sum(gap for _, gap in codes.values()), "{} is closer to this GPU"),
        (artifact.size + (brought.size if brought else 0), "{} is smaller"),
        name,
    )
    reason = "; ".join(filter(None, parts))
    return Choice(
        artifact, reason, "", rank, tuple(codes), native, taken, missing, runtime_libraries=brought
    )


def _troubles(
    artifact: Artifact, host: HostFacts, targets: tuple[str, ...] = ()
) -> Iterator[tuple[str, str]]:
    """Yield why an artifact cannot be used here: an error's code and the reason."""
    # An unknown driver or GLIBCXX (ZeroGPU before a GPU is attached) counts as new enough
    platform, cuda, has = artifact.platform, artifact.cuda, f"{host.called} has"
    for name, known in _KNOWN.items():
        if (value := getattr(artifact, name)) not in known:
            yield "NO_ARTIFACT", f"its {name} {value} is unknown to this loader"
    wanted, here = f"{platform.system} {platform.machine}", f"{host.system} {host.machine}"
    if wanted != here:
        yield "PLATFORM_UNSUPPORTED", f"is for {wanted}, {host.called} is {here}"
    if targets and not any(cuda_code(artifact, target) for target in targets):
        no_code = "NO_ARTIFACT_FOR_GPU", f"{_holds(artifact)}: not for {dotted(targets)}"
        yield no_code if cuda else ("NO_ARTIFACT", "has no CUDA code, and there is a GPU")
    glibc, glibcxx = platform.glibc, platform.glibcxx
    if _older(host.glibc or "0", glibc):
        yield "GLIBC_TOO_OLD", f"needs glibc {glibc}, {has} {host.glibc or 'none'}"
    if _older(host.glibcxx, glibcxx):
        yield "GLIBC_TOO_OLD", f"needs GLIBCXX {glibcxx} (libstdc++), {has} {host.glibcxx}"
    on_gpu = targets or artifact.kind == CUDA_RUNTIME
    if cuda and on_gpu and _older(host.driver, cuda.min_driver):
        needs = f"CUDA {cuda.toolkit} needs driver {cuda.min_driver}"
        yield "DRIVER_TOO_OLD", f"{needs}, {has} {host.driver}"


def cuda_code(artifact: Artifact, target: str) -> tuple[str, int] | None:
    """Return ``sass`` or ``ptx``, and how much older the code is: 6 for sm_80 on 8.6; else None.

    SASS runs on its own capability and on later ones of the same major (CUDA C++ programming guide,
    "Binary Compatibility"); ``120a`` on 12.0 alone, ``120f`` within its family. PTX can be compiled
    for its own capability and all later ones, with the same exceptions.
    """
    wanted = int(target.rstrip("af"))
    for kind in ("sass", "ptx") if artifact.cuda else ():
        usable = []
        for arch in getattr(artifact.cuda, kind):
            number = int(arch.rstrip("af"))
            family = kind == "sass" or arch.endswith("f")
            last = number // 10 * 10 + 9 if family else wanted
            if number <= wanted <= (number if arch.endswith("a") else last):
                usable.append(wanted - number)
        if usable:
            return kind, min(usable)
    return None


def _runtimes(manifest: Manifest, host: HostFacts) -> list[Artifact]:
    """Return the libraries for a server that can be used on a host."""
    return [
        one
        for one in manifest.artifacts
        if one.kind == CUDA_RUNTIME
        and not any(_troubles(one, host))
        and not cuda_libraries.split_needs(one.needs, host.libraries)[1]
    ]


def _bringing(
    artifact: Artifact, missing: tuple[str, ...], others: Iterable[Artifact]
) -> Artifact | None:
    """Choose the libraries for a server: of its own toolkit, else of a newer one that has all."""
    own = artifact.cuda.toolkit if artifact.cuda else None  # from 12.0 to 12.9 functions are added
    usable = [
        (one.cuda.toolkit != own, one.size, one.name, one)
        for one in others
        if one.cuda and {*missing} <= {*one.provides} and not _older(one.cuda.toolkit, own)
    ]
    return min(usable)[-1] if usable else None


def _holds(artifact: Artifact) -> str:
    """Describe an artifact's code in a few words."""
    if artifact.cuda is None:
        return f"code for the {artifact.backend.upper()}"
    parts = [dotted(artifact.cuda.sass)] if artifact.cuda.sass else []
    parts += [f"{dotted(artifact.cuda.ptx)} as PTX"] if artifact.cuda.ptx else []
    return f"CUDA {artifact.cuda.toolkit} for {' and '.join(parts) or 'nothing'}"


def dotted(archs: Iterable[str]) -> str:
    """Write compute capabilities as NVIDIA does: ``("90", "120a")`` → ``9.0, 12.0a``."""
    return ", ".join(re.sub(r"^([0-9]+)([0-9][af]?)$", r"\1.\2", arch) for arch in archs)


def _older(one: str | None, other: str | None) -> bool:
    """Compare versions such as 2.36 by their numbers; an unknown one is not older."""
    mine, its = ([int(part) for part in re.findall("[0-9]+", text or "")] for text in (one, other))
    return bool(mine) and mine < its
