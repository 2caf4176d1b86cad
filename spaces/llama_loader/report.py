"""Pure: what the commands found, as text for people and as plain data for ``--json``."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from llama_loader import selection
from llama_loader import trust as trusted
from llama_loader.devices import DeviceChoice, Listing
from llama_loader.errors import printable
from llama_loader.events import Note, Stage, summed
from llama_loader.gpus import Gpu
from llama_loader.host import HostFacts
from llama_loader.loader import Prepared
from llama_loader.selection import Choice
from llama_loader.self_test import SelfTest
from llama_loader.server import Server
from llama_loader.settings import Settings


def plain(value: object) -> Any:
    """Return dataclasses, tuples and paths as what JSON has."""
    return msgspec.to_builtins(value, enc_hook=str)


def host_lines(facts: HostFacts) -> list[str]:
    """Describe the host, a line for each fact."""
    gpus = [
        f"{gpu.name}, compute capability {dotted(gpu)}"
        + (f", {gpu.memory / 1e9:.0f} GB" if gpu.memory else "")
        for gpu in facts.gpus
    ]
    some = facts.cpus < facts.machine_cpus
    cpus = f"{facts.cpus} of {facts.machine_cpus}" if some else str(facts.cpus)
    visible = "unset" if facts.visible_devices is None else repr(facts.visible_devices)
    return [
        "host",
        f"  system: {facts.system} {facts.machine}, {cpus} CPUs, {facts.memory / 1e9:.0f} GB",
        f"  glibc: {facts.glibc or 'none'}, GLIBCXX {facts.glibcxx or 'unknown'}",
        f"  python: {facts.python} ({sys.executable})",
        f"  driver: {facts.driver or 'none'}",
        f"  gpus: {'; '.join(gpus)} (by {facts.gpu_source})" if gpus else "  gpus: none",
        f"  zerogpu: {'yes' if facts.zerogpu else 'no'}",
        f"  CUDA_VISIBLE_DEVICES: {visible}",
        *(f"  complaint: {one}" for one in facts.complaints),
        *(
            f"  library: {one.soname} {one.version or '(version unknown)'} in {one.folder}"
            f" ({one.origin})"
            for one in facts.libraries
        ),
    ]


def dotted(gpu: Gpu) -> str:
    """Return a GPU's compute capability as NVIDIA writes it."""
    return selection.dotted([gpu.capability]) if gpu.capability else "unknown"


@dataclass(frozen=True)
class Chosen:
    """A choice as ``--json`` shows it: names, and a verdict for each artifact."""

    artifact: str
    reason: str
    runs_on: str
    native: bool
    missing: tuple[str, ...]
    libraries: dict[str, str]
    runtime_libraries: str | None
    verdicts: tuple[selection.Considered, ...]


def choice(made: Choice | None) -> Chosen | None:
    """Return a choice by its names; None for none."""
    if made is None:
        return None
    return Chosen(
        artifact=made.artifact.name,
        reason=made.reason,
        runs_on=made.runs_on,
        native=made.native,
        missing=made.missing,
        libraries={one.soname: str(one.folder) for one in made.libraries},
        runtime_libraries=made.runtime_libraries.name if made.runtime_libraries else None,
        verdicts=made.verdicts,
    )


def choice_lines(release: str | None, made: Chosen, stages: Iterable[Stage]) -> list[str]:
    """Describe the choice among a release's artifacts, and what it took."""
    verdicts = [f"  {one.name}: {one.reason}" for one in made.verdicts]
    took = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in summed(stages))
    return [f"release {release}", *verdicts, f"  took: {took}"]


def trust(settings: Settings, prepared: Prepared) -> str:
    """Say what vouches for a runtime's bytes: pinned, signed, or what was compared instead."""
    if prepared.choice is None:
        return "pinned" if settings.sha256 else "not checked"
    if settings.manifest_sha256:
        return "pinned"
    if settings.manifest_url:
        return "digests match, not pinned"
    return "signed" if trusted.read(trusted.release_file()).public_key else "pinned"


def notes(prepared: Prepared) -> list[Note]:
    """Return the notes about a runtime that was only fetched."""
    error = prepared.lacking if prepared.choice else None
    return [Note(error.code, error.message, error.hint)] if error else []


def fetched(
    settings: Settings, prepared: Prepared, verdict: SelfTest | None = None
) -> dict[str, Any]:
    """Return what ``fetch --json`` prints."""
    by = trust(settings, prepared)
    installed = prepared.installed
    return {
        "folder": str(installed.folder),
        "sha256": installed.sha256,
        "release": prepared.release,
        "artifact": installed.artifact.name if installed.artifact else None,
        "verified": by in {"pinned", "signed"},
        "trust": by,
        "choice": plain(choice(prepared.choice)),
        "libraries": {one.soname: str(one.folder) for one in prepared.libraries},
        "test_run": plain(verdict),
        "timeline": plain(prepared.timeline.stages),
    }


def served(
    settings: Settings, prepared: Prepared, server: Server, model: Path, key: str | None
) -> dict[str, Any]:
    """Return what ``serve --json`` prints before its ``ready`` line; ``key`` may be a made one."""
    return {
        **fetched(settings, prepared),
        "url": server.url,
        "api_key": key,
        "pid": server.pid,
        "model": str(model),
        "devices": list(server.plan.devices),
        "layers_on_gpu": server.report.offloaded,
        "layers": server.report.layers,
        "fitted": server.plan.fitted,
        "repacked": server.plan.repacked,
        "buffers": server.report.buffers,
    }


def devices(listing: Listing, chosen: DeviceChoice) -> dict[str, Any]:
    """Return what ``devices --json`` prints; memory in bytes."""
    return {
        "devices": plain(listing.devices),
        "chosen": list(chosen.names),
        "reason": chosen.reason,
        "seconds": listing.seconds,
    }


def device_lines(listing: Listing) -> str:
    """Write devices as llama-server does, so that the text can be compared."""
    lines = []
    for one in listing.devices:
        total = [f"{one.total // 1024**2} MiB"] if one.total is not None else []
        free = [f"{one.free // 1024**2} MiB free"] if one.free is not None else []
        memory = f" ({', '.join(total + free)})" if total or free else ""
        lines.append(printable(f"  {one.name}: {one.description}{memory}"))
    return "\n".join(["Available devices:", *(lines or ["  (none)"])])


def chosen(choice: DeviceChoice) -> str:
    """Say which devices were chosen, and why."""
    return f"{', '.join(choice.names) or 'the CPU'} ({choice.reason})"
