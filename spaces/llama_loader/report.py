"""Pure: what the commands found, as text for people and as plain data for ``--json``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from llama_loader import selection
from llama_loader import trust as trusted
from llama_loader.errors import HostError, printable
from llama_loader.events import Note

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from llama_loader.cuda_libraries import Library
    from llama_loader.devices import Device, DeviceChoice, Listing
    from llama_loader.gpus import Gpu
    from llama_loader.host import HostFacts
    from llama_loader.loader import Prepared
    from llama_loader.selection import Choice
    from llama_loader.self_test import SelfTest
    from llama_loader.server import Server
    from llama_loader.settings import Settings

_PINNED: Final = "pinned"
_SIGNED: Final = "signed"


def fetched(
    settings: Settings, prepared: Prepared, verdict: SelfTest | None = None
) -> dict[str, Any]:
    """Return what ``fetch --json`` prints."""
    by = trust(settings, prepared)
    installed = prepared.installed
    test_run = verdict and {
        "devices": list(verdict.devices),
        "seconds": round(verdict.seconds, 4),
        "by": verdict.by,
        "kept": verdict.kept,
    }
    return {
        "folder": str(installed.folder),
        "sha256": installed.sha256,
        "release": installed.release,
        "artifact": installed.artifact.name if installed.artifact else None,
        "verified": by in {_PINNED, _SIGNED},
        "trust": by,
        "choice": choice(prepared.choice) if prepared.choice else None,
        "libraries": _folders(prepared.libraries),
        "test_run": test_run,
        "timeline": prepared.timeline.as_json(),
    }


def trust(settings: Settings, prepared: Prepared) -> str:
    """Say what vouches for a runtime's bytes: pinned, signed, or what was compared instead."""
    if prepared.choice is None:
        return _PINNED if settings.sha256 else "not checked"
    if settings.manifest_sha256:
        return _PINNED
    if settings.manifest_url:
        return "digests match an unpinned manifest"
    return _SIGNED if trusted.read(trusted.release_file()).public_key else _PINNED


def test_run_line(verdict: SelfTest) -> str:
    """Say in a sentence what a good test run found."""
    what = "a model was served" if verdict.by == "model" else "the tiny model answered rightly"
    where = ", ".join(verdict.devices) or "the CPU"
    when = " at an earlier run" if verdict.kept else f" in {verdict.seconds:.2f} s"
    return f"{what} on {where}{when}"


def served(settings: Settings, prepared: Prepared, server: Server, model: Path) -> dict[str, Any]:
    """What ``serve --json`` prints before its ``ready`` line."""
    report = server.report
    return {
        **fetched(settings, prepared),
        "url": server.url,
        "pid": server.pid,
        "model": str(model),
        "devices": list(server.plan.devices),
        "layers_on_gpu": report.offloaded,
        "layers": report.layers,
        "fitted": server.plan.fitted,
        "repacked": server.plan.repacked,
        "buffers": report.buffers,
    }


def choice(chosen: Choice) -> dict[str, Any]:
    """Return a choice with its reason, and a verdict for each artifact."""
    return {
        "artifact": chosen.artifact.name,
        "reason": chosen.reason,
        "runs_on": chosen.runs_on,
        "native": chosen.native,
        "missing": list(chosen.missing),
        "libraries": _folders(chosen.libraries),
        "runtime_libraries": chosen.runtime_libraries.name if chosen.runtime_libraries else None,
        "verdicts": [asdict(verdict) for verdict in chosen.verdicts],
    }


def _folders(libraries: Iterable[Library]) -> dict[str, str]:
    return {one.soname: str(one.folder) for one in libraries}


def host(facts: HostFacts) -> dict[str, Any]:
    """Return the facts as plain data."""
    return {
        **asdict(facts),
        "libraries": [{**asdict(one), "folder": str(one.folder)} for one in facts.libraries],
        "driver_folders": [str(folder) for folder in facts.driver_folders],
    }


def notes(prepared: Prepared) -> list[Note]:
    """What a person should know about a runtime that was only fetched."""
    if prepared.choice is None or not prepared.missing:
        return []
    try:
        selection.require_libraries(prepared.choice, prepared.host)
    except HostError as error:
        return [Note(error.code, error.message, error.hint)]
    return []


def device_list(found: Sequence[Device]) -> str:
    """Write devices as llama-server does, so that the text can be compared."""
    lines = ["Available devices:"]
    for one in found:
        total = [f"{one.total // 1024**2} MiB"] if one.total is not None else []
        free = [f"{one.free // 1024**2} MiB free"] if one.free is not None else []
        memory = f" ({', '.join(total + free)})" if total or free else ""
        lines.append(printable(f"  {one.name}: {one.description}{memory}"))
    return "\n".join(lines if found else [*lines, "  (none)"])


def chosen(choice: DeviceChoice) -> str:
    """Say which devices were chosen, and why."""
    return f"{', '.join(choice.names) or 'the CPU'} ({choice.reason})"


def devices_json(listing: Listing, chosen: DeviceChoice) -> dict[str, Any]:
    """What ``devices --json`` prints; memory in bytes."""
    return {
        "devices": [asdict(device) for device in listing.devices],
        "chosen": list(chosen.names),
        "reason": chosen.reason,
        "seconds": round(listing.seconds, 4),
    }


def dotted(gpu: Gpu) -> str:
    """Return a GPU's compute capability as NVIDIA writes it."""
    return selection.dotted([gpu.capability]) if gpu.capability else "unknown"


def host_lines(facts: HostFacts) -> list[str]:
    """Describe the host, a line for each fact."""
    gpus = [
        f"{gpu.name}, compute capability {dotted(gpu)}"
        + (f", {gpu.memory / 1e9:.0f} GB" if gpu.memory else "")
        for gpu in facts.gpus
    ]
    some = facts.cpus < facts.machine_cpus
    cpus = f"{facts.cpus} of {facts.machine_cpus}" if some else str(facts.cpus)
    memory = f"{facts.memory / 1e9:.0f} GB"
    visible = "unset" if facts.visible_devices is None else repr(facts.visible_devices)
    return [
        "host",
        f"  system: {facts.system} {facts.machine}, {cpus} CPUs, {memory}",
        f"  glibc: {facts.glibc or 'none'}, GLIBCXX {facts.glibcxx or 'unknown'}",
        f"  python: {facts.python} ({sys.executable})",
        f"  driver: {facts.driver or 'none'}",
        f"  gpus: {'; '.join(gpus) or 'none'} (by {facts.gpu_source})",
        f"  zerogpu: {'yes' if facts.zerogpu else 'no'}",
        f"  CUDA_VISIBLE_DEVICES: {visible}",
        *(
            f"  library: {one.soname} {one.version or '?'} in {one.folder} ({one.origin})"
            for one in facts.libraries
        ),
    ]


def choice_lines(prepared: Prepared) -> list[str]:
    """Describe the choice among a release's artifacts; empty for an archive by URL."""
    if prepared.choice is None:
        return []
    verdicts = [f"  {one.name}: {one.reason}" for one in prepared.choice.verdicts]
    times = [f"{one.name} {one.seconds:.2f} s" for one in prepared.timeline.stages]
    return [f"release {prepared.installed.release}", *verdicts, f"  took: {', '.join(times)}"]
