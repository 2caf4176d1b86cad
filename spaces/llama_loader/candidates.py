"""One artifact on one machine: what it would serve and with what, or why it cannot. Pure.

``compatibility`` answers each question by itself; here the answers come together, and are given an
order. Which candidate is taken, ``select`` decides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llama_loader import cuda_libraries
from llama_loader.compatibility import (
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
from llama_loader.manifest import CUDA_RUNTIME

if TYPE_CHECKING:
    from collections.abc import Iterable

    from llama_loader.cuda_libraries import Library
    from llama_loader.host import HostFacts
    from llama_loader.manifest import Artifact, Manifest


@dataclass(frozen=True)
class Candidate:
    """An artifact, how far it came, and what it would do here.

    Attributes:
        artifact: the one judged.
        stage, reason: how far it came, and why no further.
        served: the compute capabilities that it has code for.
        weight: what the GPUs of these are worth together (``weights``).
        native: machine code for all that it serves.
        gap: how much older its code is than the GPUs, added up.
        libraries, missing: CUDA libraries that are here, and that are not.
        brings: what of the release brings the missing ones.
    """

    artifact: Artifact
    stage: Stage
    reason: str
    served: tuple[str, ...] = ()
    weight: int = 0
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
            -self.weight,
            not self.native,
            self.lack,
            self.gap,
            self.artifact.size + (self.brings.size if self.brings else 0),
            self.artifact.name,
        )


def judge(
    artifact: Artifact,
    host: HostFacts,
    targets: tuple[str, ...],
    runtimes: tuple[Artifact, ...] = (),
) -> Candidate:
    """Judge one artifact for the GPUs ``targets``; for the CPU where there are none."""
    refused = refused_by_kind(artifact) or refused_by_platform(artifact, host)
    if refused:
        return Candidate(artifact, *refused)
    if targets:
        return _judge_gpu(artifact, host, targets, runtimes)
    trouble = glibc_trouble(artifact, host)
    if trouble:
        return Candidate(artifact, Stage.GLIBC, trouble)
    if artifact.backend == "cuda":
        return Candidate(artifact, Stage.FITS, "built for CUDA; can run on the CPU too")
    return Candidate(artifact, Stage.FITS, "built for the CPU")


def usable_runtimes(manifest: Manifest, host: HostFacts) -> tuple[Artifact, ...]:
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


def weights(host: HostFacts, targets: tuple[str, ...]) -> dict[str, int]:
    """Say what each compute capability is worth: the memory of its GPUs, that a model has to fit.

    Their number where a GPU's memory is unknown, and for one that was only named.
    """
    known = all(gpu.memory for gpu in host.visible)
    sums = {
        target: sum(
            (gpu.memory or 0) if known else 1 for gpu in host.visible if gpu.capability == target
        )
        for target in targets
    }
    return {target: weight or 1 for target, weight in sums.items()}


def _judge_gpu(
    artifact: Artifact,
    host: HostFacts,
    targets: tuple[str, ...],
    runtimes: tuple[Artifact, ...],
) -> Candidate:
    if artifact.cuda is None:
        return Candidate(artifact, Stage.BACKEND, "has no CUDA code, and there is a GPU")
    codes = {target: cuda_code(artifact, target) for target in targets}
    served = tuple(target for target, code in codes.items() if code)
    if not served:
        return Candidate(artifact, Stage.GPU, f"{holds(artifact)}: not for {dotted(targets)}")
    trouble = glibc_trouble(artifact, host)
    if trouble:
        return Candidate(artifact, Stage.GLIBC, trouble)
    native = all(codes[target] == "sass" for target in served)
    trouble = driver_trouble(artifact, host.driver, native=native)
    if trouble:
        return Candidate(artifact, Stage.DRIVER, trouble)
    taken, missing = cuda_libraries.split_needs(artifact.needs, host.libraries)
    worth = weights(host, targets)
    fitting = Candidate(
        artifact,
        Stage.FITS,
        "",
        served,
        weight=sum(worth[target] for target in served),
        native=native,
        gap=sum(gap(artifact, target) for target in served),
        libraries=taken,
        missing=missing,
        brings=_bringing(artifact, missing, runtimes),
    )
    return replace(fitting, reason=_fits_reason(fitting, targets, host.libraries))


def _fits_reason(one: Candidate, targets: tuple[str, ...], libraries: tuple[Library, ...]) -> str:
    slow = "PTX, which the driver compiles at the first start (slow),"
    parts = [f"{'machine code' if one.native else slow} for {dotted(one.served)}"]
    left = tuple(target for target in targets if target not in one.served)
    parts += [f"none for {dotted(left)}"] if left else []
    if one.missing:
        bringing = f", brought by {one.brings.name}" if one.brings else ""
        parts.append(f"{', '.join(one.missing)} missing here{bringing}")
        mismatch = cuda_libraries.unpaired(one.missing, libraries)
        parts += [mismatch] if mismatch else []
    return f"{'; '.join(parts)}; {one.artifact.size / 1e6:.1f} MB"
