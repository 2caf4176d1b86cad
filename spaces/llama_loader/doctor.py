"""Everything that decides whether a model can be served here: facts, choice, checks, hints.

Each check is tried whatever the ones before it found, as far as it can be. The verdict is strict:
good means that the runtime is installed and verified, its libraries are here, and llama-server
itself lists a device (or the CPU is allowed). Nothing secret is on the page: it can be pasted
into an issue.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from llama_loader import compatibility, host, launch, model, prepare, report
from llama_loader.errors import HostError, LoaderError, StoreError, without_secrets
from llama_loader.events import Note

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from llama_loader.devices import Listing
    from llama_loader.events import Event, Sink
    from llama_loader.gpus import Gpu
    from llama_loader.host import HostFacts
    from llama_loader.model import ModelSource
    from llama_loader.prepare import Prepared
    from llama_loader.settings import Settings

_ROOM: Final = 1_000_000_000
"""Bytes of free disk below which an installation (75 to 190 MB unpacked) becomes doubtful."""
_TOO_SLOW_HINT: Final = (
    "no GPU is attached: check that the Space's hardware is ZeroGPU; on ZeroGPU a GPU comes only"
    " inside a decorated function, and may have to wait in the queue"
)
"""The seed document's second chapter, 'starts but far too slow'."""


@dataclass(frozen=True)
class Check:
    """One check. ``status`` is the exit status that its failure means; 0 for none."""

    name: str
    ok: bool
    detail: str
    code: str = ""
    hint: str = ""
    status: int = 0


@dataclass
class Examination:
    """What was found, in the order in which it was looked at."""

    checks: list[Check] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    facts: HostFacts | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    prepared: Prepared | None = None

    @property
    def exit_status(self) -> int:
        """0 where a model could be served now, else the first failure's."""
        return next((check.status for check in self.checks if not check.ok), 0)

    def as_json(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        prepared = self.prepared
        chosen = prepared.choice if prepared else None
        return {
            "ok": self.exit_status == 0,
            "exit_status": self.exit_status,
            "checks": [asdict(check) for check in self.checks],
            "notes": [asdict(note) for note in self.notes],
            "host": report.host(self.facts) if self.facts else None,
            "settings": self.settings,
            "choice": report.choice(chosen) if chosen else None,
            "timeline": prepared.timeline.as_json() if prepared else [],
        }

    def as_text(self) -> str:
        """Return the page."""
        lines = [*_host_lines(self.facts), *_choice_lines(self.prepared), "checks"]
        for check in self.checks:
            lines.append(f"  {'ok  ' if check.ok else 'FAIL'} {check.name}: {check.detail}")
            lines += [f"       hint: {check.hint}"] if check.hint and not check.ok else []
        for note in self.notes:
            lines.append(f"  note {note.code}: {note.message}")
            lines += [f"       hint: {note.hint}"] if note.hint else []
        good = self.exit_status == 0
        lines.append(f"verdict: a model {'can' if good else 'cannot'} be served here now")
        return "\n".join(lines)


def examine(load: Callable[[], Settings], *, sink: Sink) -> Examination:
    """Look at everything.

    Args:
        load: reads the settings; their errors are a finding like any other.
        sink: told of progress.
    """
    found = Examination()
    settings = _settings(found, load)
    if settings is None:
        return found
    found.facts = host.detect(settings)
    _gpu(found, found.facts, settings)
    _tried(found, "store", lambda: _store(settings.store))
    found.prepared = _prepared(found, settings, _noting(found, sink))
    if found.prepared is not None:
        _runtime(found, found.prepared, settings, _noting(found, sink))
    _model(found, settings)
    return found


def _tried(found: Examination, name: str, check: Callable[[], str]) -> bool:
    """Run a check; its sentence, or its error, goes on the page."""
    try:
        found.checks.append(Check(name, ok=True, detail=without_secrets(check())))
    except LoaderError as error:
        found.checks.append(_failed(name, error))
        return False
    return True


def _failed(name: str, error: LoaderError) -> Check:
    line = error.render().partition("\n")[0].partition(": ")[2]
    return Check(
        name, ok=False, detail=line, code=error.code, hint=error.hint, status=error.exit_status
    )


def _settings(found: Examination, load: Callable[[], Settings]) -> Settings | None:
    try:
        settings = load()
    except LoaderError as error:
        found.checks.append(_failed("settings", error))
        return None
    shown = asdict(settings)
    del shown["inherited"]
    shown["hf_token"] = "set" if settings.hf_token else None
    found.settings = {key: _plain(value) for key, value in shown.items()}
    found.checks.append(Check("settings", ok=True, detail="all variables can be read"))
    return settings


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return without_secrets(str(value))


def _gpu(found: Examination, facts: HostFacts, settings: Settings) -> None:
    named = ", ".join(f"{gpu.name} ({_dotted(gpu)})" for gpu in facts.gpus)
    if facts.gpus and facts.gpu_source != "zerogpu":
        detail = f"{named}, driver {facts.driver or 'unknown'}, by {facts.gpu_source}"
        found.checks.append(Check("gpu", ok=True, detail=detail))
        return
    what = f"none attached now; ZeroGPU documents {named}" if named else "no NVIDIA GPU found"
    allowed = settings.allow_cpu or settings.cpu_chosen
    found.checks.append(
        Check(
            "gpu",
            ok=allowed,
            detail=f"{what}{'; the CPU is allowed' if allowed else ''}",
            code="" if allowed else "NO_GPU",
            hint="" if allowed else _TOO_SLOW_HINT,
            status=0 if allowed else HostError.exit_status,
        )
    )


def _store(root: Path) -> str:
    place = next(folder for folder in (root, *root.parents) if folder.exists())
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise StoreError("STORE_FAILED", f"{place}: {error.strerror}") from error
    if free < _ROOM:
        raise StoreError(
            "DISK_NEARLY_FULL",
            f"{free / 1e6:.0f} MB free at {root}",
            hint="free some space, or use another store (HF_HOME, or --store)",
        )
    return f"{root}, {free / 1e9:.1f} GB free"


def _prepared(found: Examination, settings: Settings, sink: Sink) -> Prepared | None:
    """Resolve, fetch and verify as ``fetch`` would: what is not tried is not known."""
    got: list[Prepared] = []

    def run() -> str:
        got.append(prepare.prepare(settings, sink=sink))
        installed = got[0].installed
        name = installed.artifact.name if installed.artifact else settings.url
        pinned = "verified" if installed.verified else "NOT pinned"
        return f"{name}, {pinned}, in {installed.folder}"

    _tried(found, "runtime", run)
    return got[0] if got else None


def _runtime(found: Examination, prepared: Prepared, settings: Settings, sink: Sink) -> None:
    allowed = settings.allow_cpu or settings.cpu_chosen

    def libraries() -> str:
        launch.require_libraries(prepared, allow_cpu=allowed)
        taken = [f"{one.soname} in {one.folder}" for one in prepared.libraries]
        return ", ".join(taken) or "none needed"

    listings: list[Listing] = []

    def listed() -> str:
        listings.append(launch.list_devices(settings, prepared))
        chosen = launch.would_choose(settings, prepared, listings[0])
        return f"{', '.join(chosen.names) or 'the CPU'} ({chosen.reason})"

    def tried() -> str:
        return report.test_run_line(launch.try_runtime(settings, prepared, listings[0], sink=sink))

    if not _tried(found, "libraries", libraries):
        return
    if not _tried(found, "devices", listed):
        failed = found.checks[-1]
        if failed.code == "NO_DEVICE" and prepared.host.zerogpu:
            # the main process of a ZeroGPU Space never has one: another build would not help
            found.checks[-1] = replace(failed, hint=_TOO_SLOW_HINT)
    elif not settings.no_test_run:
        _tried(found, "test run", tried)


def _model(found: Examination, settings: Settings) -> None:
    """Say which model is set; one that has to be fetched first is no fault."""
    source = model.from_settings(settings)
    if source.path is None:
        _tried(found, "model", lambda: _on_the_hub(source, settings))
        return
    there = source.path.is_file()
    found.checks.append(
        Check(
            "model",
            ok=there,
            detail=f"{source.path}{'' if there else ' is not there'}",
            code="" if there else "MODEL_MISSING",
            hint="" if there else "correct YAKULINGO_SPACES_GGUF_PATH, or unset it",
            status=0 if there else 2,
        )
    )


def _on_the_hub(source: ModelSource, settings: Settings) -> str:
    """Offline it must be in the cache already; online it may still have to come."""
    if settings.offline:
        return f"{source.label}, in {model.get(replace(source, sha256=None), settings).parent}"
    return f"{source.label}, from the Hub ({'with' if settings.hf_token else 'without'} token)"


def _noting(found: Examination, sink: Sink) -> Sink:
    """Notes belong on the page; the rest is progress."""

    def take(event: Event) -> None:
        if isinstance(event, Note):
            plain = without_secrets(event.message), without_secrets(event.hint)
            found.notes.append(Note(event.code, *plain))
        else:
            sink(event)

    return take


def _dotted(gpu: Gpu) -> str:
    return compatibility.dotted([gpu.capability]) if gpu.capability else "unknown"


def _host_lines(facts: HostFacts | None) -> list[str]:
    if facts is None:
        return []
    gpus = [
        f"{gpu.name}, compute capability {_dotted(gpu)}"
        + (f", {gpu.memory / 1e9:.0f} GB" if gpu.memory else "")
        for gpu in facts.gpus
    ]
    cpus = (
        f"{facts.cpus} of {facts.machine_cpus}"
        if facts.cpus < facts.machine_cpus
        else str(facts.cpus)
    )
    rows = [
        (
            "system",
            f"{facts.system} {facts.machine}, {cpus} CPUs, {facts.memory / 1e9:.0f} GB",
        ),
        ("glibc", f"{facts.glibc or 'none'}, GLIBCXX {facts.glibcxx or 'unknown'}"),
        ("python", f"{facts.python} ({sys.executable})"),
        ("driver", facts.driver or "none"),
        ("gpus", f"{'; '.join(gpus) or 'none'} (by {facts.gpu_source})"),
        ("zerogpu", "yes" if facts.zerogpu else "no"),
        (
            "CUDA_VISIBLE_DEVICES",
            repr(facts.visible_devices) if facts.visible_devices is not None else "unset",
        ),
    ]
    rows += [
        ("library", f"{one.soname} {one.version or '?'} in {one.folder} ({one.origin})")
        for one in facts.libraries
    ]
    return ["host", *(f"  {name}: {text}" for name, text in rows)]


def _choice_lines(prepared: Prepared | None) -> list[str]:
    if prepared is None or prepared.choice is None:
        return []
    verdicts = [f"  {one.name}: {one.reason}" for one in prepared.choice.verdicts]
    times = [f"{one.name} {one.seconds:.2f} s" for one in prepared.timeline.stages]
    return [f"release {prepared.installed.release}", *verdicts, f"  took: {', '.join(times)}"]
