"""Finds out whether a model can be served here: facts, choice, checks and hints on one page.

Each check runs whatever the checks before it found, as far as it can. The verdict is strict: good
means that the runtime is installed, its libraries are there, llama-server itself lists a device
(or the CPU is allowed), and the model is there or can be had. No secret is on the page, so it can
be pasted into an issue. The doctor never raises: what it cannot look at is a finding.
"""

from __future__ import annotations

import shutil
import struct
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from llama_loader import cuda_libraries, gguf_header, host, loader, model, report
from llama_loader.errors import HostError, LoaderError, SettingError, StoreError, printable, safe
from llama_loader.events import Note
from llama_loader.settings import PREFIX, unknown_variables

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from llama_loader.devices import Listing
    from llama_loader.events import Event, Sink
    from llama_loader.host import HostFacts
    from llama_loader.loader import Prepared
    from llama_loader.settings import Settings

_ROOM: Final = 1_000_000_000
"""Bytes of free disk below which an installation (75 to 190 MB unpacked) becomes doubtful."""
_TOO_SLOW_HINT: Final = (
    "no GPU is attached: check that the Space's hardware is ZeroGPU; on ZeroGPU a GPU comes only"
    " inside a decorated function, and may have to wait in the queue"
)
_SETTINGS: Final = {
    "DEVICE_LIST_FAILED": f"{PREFIX}LLAMA_CPP_MANIFEST_URL",
    "DEVICE_LIST_GARBLED": f"{PREFIX}LLAMA_CPP_MANIFEST_URL",
    "DISK_NEARLY_FULL": "HF_HOME",
    "FILE_NOT_FOUND": f"{PREFIX}GGUF_FILENAME",
    "INVALID_DEVICE": f"{PREFIX}LLAMA_DEVICE=auto",
    "MODEL_GATED": "HF_TOKEN",
    "NO_GPU": f"{PREFIX}ALLOW_CPU=1",
    "OFFLINE": f"{PREFIX}OFFLINE=0",
    "RELEASE_NOT_CHOSEN": f"{PREFIX}LLAMA_CPP_MANIFEST_URL",
    "REPOSITORY_INVALID": f"{PREFIX}GGUF_REPO_ID",
    "REPOSITORY_NOT_FOUND": f"{PREFIX}GGUF_REPO_ID",
    "REVISION_NOT_FOUND": f"{PREFIX}GGUF_REVISION",
    "STORE_FAILED": "HF_HOME",
}
"""What to change about a failure, where one variable decides it."""
_CLIP: Final = struct.pack("<Q20sIQ4s", 20, b"general.architecture", 8, 4, b"clip")
"""The metadata of a multimodal projector (mmproj), as its header holds it."""
_HEAD: Final = 4096


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        detail: what was found, one printable line without secrets.
        code: of the error, empty where the check is good.
        status: the exit status that its failure means, 0 for none.
        setting: the variable (perhaps with its value) or the command that changes the failure;
            empty where none does.
    """

    name: str
    ok: bool
    detail: str
    code: str = ""
    hint: str = ""
    status: int = 0
    setting: str = ""


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
        """Return the page; foreign text cannot forge a line of it."""
        lines = report.host_lines(self.facts) if self.facts else []
        lines += report.choice_lines(self.prepared) if self.prepared else []
        lines.append("checks")
        for check in self.checks:
            lines.append(f"  {'ok  ' if check.ok else 'FAIL'} {check.name}: {check.detail}")
            lines += [f"       hint: {check.hint}"] if check.hint else []
        for note in self.notes:
            lines.append(f"  note {note.code}: {note.message}")
            lines += [f"       hint: {note.hint}"] if note.hint else []
        good = self.exit_status == 0
        lines.append(f"verdict: a model {'can' if good else 'cannot'} be served here now")
        return "\n".join(printable(line) for line in lines)


def examine(load: Callable[[], Settings], *, sink: Sink) -> Examination:
    """Look at everything; never raises a loader's or a system's error.

    Args:
        load: reads the settings; their errors are a finding like any other.
        sink: told of progress.
    """
    found = Examination()
    read: list[Settings] = []

    def settings_are_read() -> str:
        read.append(load())
        return "all variables can be read"

    if _tried(found, "settings", settings_are_read):
        found.settings = _shown(read[0])
        _examine(found, read[0], _noting(found, sink))
    return found


def _examine(found: Examination, settings: Settings, sink: Sink) -> None:
    for note in unknown_variables():
        sink(note)

    def gpu() -> str:
        found.facts = host.detect(settings)
        return _gpu(found.facts, settings)

    def runtime() -> str:
        found.prepared = loader.prepare(settings, sink=sink)
        installed = found.prepared.installed
        name = installed.artifact.name if installed.artifact else settings.url
        return f"{name}, {report.trust(settings, found.prepared)}, in {installed.folder}"

    _tried(found, "gpu", gpu)
    _tried(found, "store", lambda: _store(settings.store))
    if _tried(found, "runtime", runtime) and found.prepared is not None:
        _runtime(found, found.prepared, settings, sink)
    _tried(found, "model", lambda: _model(settings))


def _tried(found: Examination, name: str, check: Callable[[], str]) -> bool:
    """Run a check; its sentence, or its error, goes on the page."""
    try:
        found.checks.append(Check(name, ok=True, detail=safe(check())))
    except (OSError, LoaderError) as error:
        failed = error
        if not isinstance(failed, LoaderError):
            failed = StoreError("SYSTEM", f"cannot look at the {name}: {error}")
        found.checks.append(
            Check(
                name,
                ok=False,
                detail=safe(failed.message),
                code=failed.code,
                hint=safe(failed.hint),
                status=failed.exit_status,
                setting=failed.setting or _SETTINGS.get(failed.code, ""),
            )
        )
        return False
    return True


def _shown(settings: Settings) -> dict[str, Any]:
    shown = asdict(settings)
    del shown["inherited"]
    shown["hf_token"] = "set" if settings.hf_token else None
    return {name: _plain(value) for name, value in shown.items()}


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, bool | int | float) else safe(str(value))


def _gpu(facts: HostFacts, settings: Settings) -> str:
    named = ", ".join(f"{gpu.name} ({report.dotted(gpu)})" for gpu in facts.gpus)
    if facts.gpus and facts.gpu_source != "zerogpu":
        return f"{named}, driver {facts.driver or 'unknown'}, by {facts.gpu_source}"
    what = f"none attached now; ZeroGPU documents {named}" if named else "no NVIDIA GPU found"
    if settings.allow_cpu or settings.cpu_chosen:
        return f"{what}; the CPU is allowed"
    raise HostError("NO_GPU", "; ".join([what, *facts.complaints]), hint=_TOO_SLOW_HINT)


def _store(root: Path) -> str:
    try:
        place = next(folder for folder in (root, *root.parents) if folder.exists())
        free = shutil.disk_usage(place).free
    except PermissionError:
        return f"{root} is not this user's; a private temporary folder is used instead"
    except OSError as error:
        raise StoreError("STORE_FAILED", f"{root}: {error.strerror}") from error
    if free < _ROOM:
        raise StoreError(
            "DISK_NEARLY_FULL",
            f"{free / 1e6:.0f} MB free at {root}",
            hint="free some space, or use another store (HF_HOME, or --store)",
        )
    return f"{root}, {free / 1e9:.1f} GB free"


def _runtime(found: Examination, prepared: Prepared, settings: Settings, sink: Sink) -> None:
    def libraries() -> str:
        loader.require_libraries(settings, prepared)
        taken = [f"{one.soname} in {one.folder}" for one in prepared.libraries]
        return ", ".join(taken) or "none needed"

    listings: list[Listing] = []

    def listed() -> str:
        listings.append(loader.list_devices(settings, prepared))
        path = model.at_hand(model.from_settings(settings))
        return report.chosen(loader.choose_devices(settings, prepared, path, listing=listings[0]))

    def tried() -> str:
        return report.test_run_line(loader.try_runtime(settings, prepared, listings[0], sink=sink))

    if not _tried(found, "libraries", libraries):
        packages = " ".join(cuda_libraries.packages(prepared.missing))
        found.checks[-1] = replace(found.checks[-1], setting=f"pip install {packages}")
        return
    if not _tried(found, "devices", listed):
        failed = found.checks[-1]
        if failed.code == "NO_DEVICE" and prepared.host.zerogpu:
            # the main process of a ZeroGPU Space never has one: another build would not help
            found.checks[-1] = replace(failed, hint=_TOO_SLOW_HINT)
    elif not settings.no_test_run:
        _tried(found, "test run", tried)


def _model(settings: Settings) -> str:
    """Say which model is set; one that has to be fetched first is no fault if the Hub has it."""
    source = model.from_settings(settings)
    path = source.path or model.at_hand(source)
    if path is None and settings.offline:
        path = model.get(replace(source, sha256=None), settings)
    if path is not None:
        _require_model(path)
        return str(path) if source.path else f"{source.label}, in {path.parent}"
    size = model.size_on_hub(source, settings)
    told = f"{size / 1e9:.1f} GB " if size else ""
    return (
        f"{source.label}, {told}from the Hub ({'with' if settings.hf_token else 'without'} token)"
    )


def _require_model(path: Path) -> None:
    """Look into a file's header: is it a whole model that llama-server can serve?"""

    def refused(code: str, message: str, hint: str) -> SettingError:
        return SettingError(code, message, hint=hint, setting=f"{PREFIX}GGUF_PATH")

    if not path.is_file():
        hint = f"correct {PREFIX}GGUF_PATH, or unset it"
        raise refused("MODEL_MISSING", f"there is no file {path}", hint)
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if _CLIP in head:
        raise refused(
            "MODEL_PROJECTOR",
            f"{path} is a multimodal projector (mmproj), not a language model",
            "name the model's own GGUF file",
        )
    number, count = gguf_header.part(path.name)
    missing = [one for one in gguf_header.parts(path.name) if not path.with_name(one).is_file()]
    if missing or number != 1:
        raise refused(
            "MODEL_INCOMPLETE",
            f"{path} is part of a model in {count} files; missing: {len(missing)}",
            "put all parts into one folder, and name the first one",
        )
    if gguf_header.measure(path, 0) is None:
        raise refused(
            "MODEL_NOT_GGUF",
            f"{path} is no GGUF file, or a damaged one; it begins with {head[:16]!r}",
            "download it again: a web page or a Git LFS pointer may have been saved instead",
        )


def _noting(found: Examination, sink: Sink) -> Sink:
    """Put notes on the page, and pass progress on."""

    def take(event: Event) -> None:
        if isinstance(event, Note):
            found.notes.append(Note(event.code, safe(event.message), safe(event.hint)))
        else:
            sink(event)

    return take
