"""Finds out whether a model can be served here: facts, choice, checks and hints on one page.

Each check runs, as far as it can, also after a check that failed. The verdict is strict: good
means that the runtime is installed, its libraries are there, llama-server itself lists a device
(or the CPU is allowed), and the model is there or can be had. No secret is on the page, so it can
be pasted into an issue. ``suppose`` answers what another machine would fetch, one that is described
in words such as ``capability=12.0,driver=580,glibc=2.36,torch=cu128``; words that cannot be read
raise ``SettingError``.
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import msgspec

from llama_loader import disk, gpus, host, hub, loader, model, model_file, report, selection
from llama_loader.cuda_libraries import Library
from llama_loader.devices import Listing
from llama_loader.errors import HostError, LoaderError, SettingError, StoreError, printable, safe
from llama_loader.events import Event, Note, Sink, Stage
from llama_loader.gpus import Gpu
from llama_loader.host import SUPPOSED, HostFacts
from llama_loader.loader import Prepared
from llama_loader.self_test import require_known
from llama_loader.server import free_port
from llama_loader.settings import Settings, named

_ROOM: Final = 1_000_000_000
"""Bytes of free disk below which an installation (75 to 190 MB unpacked) becomes doubtful."""
_NO_MODEL: Final = "none is named, and huggingface_hub, which fetches the default, is not installed"
_NEEDED: Final = {
    **dict.fromkeys(("gpu", "store", "runtime"), "settings"),
    "libraries": "runtime",
    "devices": "libraries",
    "test run": "devices",
    **dict.fromkeys(("port", "model"), "settings"),
}
"""The checks after ``settings`` in their order, and the one that each needs to be good."""
_STEMS: Final = ("libcublas", "libcublasLt", "libcudart")
"""CUDA libraries that come with every torch built for CUDA, and that llama-server needs."""
_VERSION: Final = re.compile(r"[0-9]{1,4}(?:\.[0-9]{1,4}){0,3}")
_DEFAULTS: Final = HostFacts("linux", "x86_64", glibc="2.36", gpu_source=SUPPOSED)
"""Debian 12, as ZeroGPU's images have been; no GPU, no CUDA library. An unknown driver or GLIBCXX
counts as new enough, as on ZeroGPU before a GPU is attached."""


@dataclass(frozen=True)
class Check:
    """One check; ``detail`` is what was found, one printable line without secrets.

    Where it is good, the error's ``code`` and ``hint`` are empty and the exit ``status`` is 0.
    """

    name: str
    ok: bool
    detail: str
    code: str = ""
    hint: str = ""
    status: int = 0


@dataclass
class Examination:
    """What ``doctor --json`` prints, in the order in which it was looked at; see ``json_schema``.

    Attributes:
        exit_status: 0 where a model could be served now, else the first failure's.
        settings: each setting, as a number, a truth value or text; a token only as ``set``.
        host, release, choice: null where a check before them failed.
    """

    checks: list[Check] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    ok: bool = True
    exit_status: int = 0
    host: HostFacts | None = None
    settings: dict[str, bool | int | float | str | None] = field(default_factory=dict)
    release: str | None = None
    choice: report.Chosen | None = None
    timeline: list[Stage] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        found: dict[str, Any] = report.plain(self)
        return found

    def as_text(self) -> str:
        """Return the page; foreign text cannot forge a line of it."""
        lines = report.host_lines(self.host) if self.host else []
        if self.choice:
            lines += report.choice_lines(self.release, self.choice, self.timeline)
        lines.append("checks")
        said = [
            (f"{'ok  ' if check.ok else 'FAIL'} {check.name}: {check.detail}", check.hint)
            for check in self.checks
        ]
        said += [(f"note {note.code}: {note.message}", note.hint) for note in self.notes]
        for line, hint in said:
            lines += [f"  {line}", *([f"       hint: {hint}"] if hint else [])]
        unnamed = any(check.detail == _NO_MODEL for check in self.checks)
        blocked = ", whatever the model, until the FAIL lines are solved"
        when = (" once --model PATH names one" if self.ok else blocked) if unnamed else " now"
        lines.append(f"verdict: a model {'can' if self.ok else 'cannot'} be served here{when}")
        return "\n".join(printable(line) for line in lines)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of what ``doctor --json`` prints."""
    found = msgspec.json.schema(Examination, schema_hook=lambda _: {"type": "string"})  # a path
    found["$defs"]["Examination"]["required"] = [one.name for one in fields(Examination)]
    draft = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": draft, "title": "llama_loader doctor --json", **found}


def examine(
    load: Callable[[], Settings],
    *,
    sink: Sink,
    prepare: Callable[..., Prepared] | None = None,
) -> Examination:
    """Look at everything; an error, also of ``load``, is a finding, and is not raised.

    ``prepare`` returns the runtime to look at, by default as ``loader.prepare``.
    """
    return _Visit(load, sink, prepare).found


class _Visit:
    """The checks, each a method that returns its sentence; what one finds is there for the next."""

    settings: Settings
    prepared: Prepared
    listing: Listing
    runs = False  # by the test run

    def __init__(
        self, load: Callable[[], Settings], sink: Sink, prepare: Callable[..., Prepared] | None
    ) -> None:
        self._load, self._pass_on, self._prepare = load, sink, prepare
        self.found = Examination()
        self._check("settings", self._settings)
        for name, needed in _NEEDED.items():
            good = {check.name for check in self.found.checks if check.ok}
            if needed in good and not self._is_left_out(name):
                self._check(name, getattr(self, f"_{name.replace(' ', '_')}"))

    def _is_left_out(self, name: str) -> bool:
        if name == "port":  # an engine's own server may have it
            return self.settings.server_port is None or self._prepare is not None
        return name == "test run" and self.settings.no_test_run

    def _check(self, name: str, look: Callable[[], str]) -> None:
        """Run a check; put its sentence, or its error, on the page."""
        try:
            try:
                check = Check(name, ok=True, detail=safe(look()))
            except OSError as error:
                raise StoreError("SYSTEM", name=name, error=error) from error
        except LoaderError as error:
            what, hint = map(self._named, (error.message, error.hint))
            code, status = error.code, error.exit_status
            check = Check(name, ok=False, detail=what, code=code, hint=hint, status=status)
            self.found.ok, self.found.exit_status = False, self.found.exit_status or status
        self.found.checks.append(check)

    def _sink(self, event: Event) -> None:
        """Put notes on the page, and pass progress on."""
        if isinstance(event, Note):
            own = replace(event, message=self._named(event.message), hint=self._named(event.hint))
            self.found.notes.append(own)
        else:
            self._pass_on(event)

    def _named(self, text: str) -> str:
        return named(text, self.settings if hasattr(self, "settings") else None)

    def _settings(self) -> str:
        self.settings = self._load()
        for note in self.settings.unknown:
            self._sink(note)
        shown = asdict(self.settings)
        for name in ("inherited", "unknown", "prefix", "keywords"):
            del shown[name]
        shown["hf_token"] = "set" if self.settings.hf_token else None
        for name, value in shown.items():
            if not isinstance(value, bool | int | float | None):
                several = value if isinstance(value, tuple) else (value,)
                shown[name] = safe(",".join(map(str, several)))
        self.found.settings = shown
        return "all variables can be read"

    def _gpu(self) -> str:
        self.found.host = facts = host.detect(self.settings)
        named = ", ".join(f"{gpu.name} ({report.dotted(gpu)})" for gpu in facts.gpus)
        if facts.gpus and facts.gpu_source != "zerogpu":
            return f"{named}, driver {facts.driver or 'unknown'}, by {facts.gpu_source}"
        what = f"none attached now; ZeroGPU documents {named}" if named else "no NVIDIA GPU found"
        if self.settings.cpu_allowed:
            return f"{what}; the CPU is allowed"
        raise HostError("NO_GPU/here", found="; ".join([what, *facts.complaints]))

    def _store(self) -> str:
        root = self.settings.store
        try:
            place = disk.nearest(root)
            free = shutil.disk_usage(place).free
        except PermissionError:
            return f"{root} is not this user's; a private temporary folder is used instead"
        except OSError as error:
            raise StoreError("STORE_FAILED", root=root, why=error.strerror) from error
        if free < _ROOM:
            raise StoreError("DISK_NEARLY_FULL", megabytes=free / 1e6, root=root)
        return f"{root}, {free / 1e9:.1f} GB free"

    def _runtime(self) -> str:
        prepare = self._prepare or loader.prepare
        self.prepared = prepared = prepare(self.settings, sink=self._sink)
        self.found.release = prepared.release
        self.found.choice = report.choice(prepared.choice)
        self.found.timeline = prepared.timeline.stages  # it grows
        artifact = prepared.installed.artifact
        name = artifact.name if artifact else self.settings.url
        by = report.trust(self.settings, prepared)
        return f"{name}, {by}, in {prepared.installed.folder}"

    def _libraries(self) -> str:
        loader.require_libraries(self.settings, self.prepared)
        taken = [f"{one.soname} in {one.folder}" for one in self.prepared.libraries]
        return ", ".join(taken) or "none needed"

    def _devices(self) -> str:
        settings, prepared = self.settings, self.prepared
        self.listing = loader.list_devices(settings, prepared)
        path = model.at_hand(settings)
        try:
            chosen = loader.choose_devices(settings, prepared, path, listing=self.listing)
        except HostError as error:
            if error.code == "NO_DEVICE" and prepared.host.zerogpu:
                # the main process of a ZeroGPU Space never has one: another build would not help
                raise HostError("NO_DEVICE/main", why=error.message) from error
            raise
        return report.chosen(chosen)

    def _test_run(self) -> str:
        done = loader.try_runtime(self.settings, self.prepared, self.listing)
        self.runs = True
        where = ", ".join(done.devices) or "the CPU"
        return f"the tiny model answered rightly on {where} in {done.seconds:.2f} s"

    def _port(self) -> str:
        return f"{free_port(self.settings.server_port or 0)} is free"

    def _model(self) -> str:
        """Say which model is set; one that is still to be fetched is no fault if the Hub has it."""
        settings, name = self.settings, self.settings.model
        if not settings.model_named and find_spec("huggingface_hub") is None:
            return _NO_MODEL
        path = settings.gguf_path or model.at_hand(settings)
        if path is not None or settings.offline:
            pin = None if settings.no_test_run else settings.gguf_sha256
            path = model.get(replace(settings, offline=True, gguf_sha256=pin))
            if settings.gguf_path is None and not settings.no_test_run:
                model_file.require_as_named(path)
            if self.runs:
                plan = loader.plan_server(settings, self.prepared, path, listing=self.listing)
                require_known(self.prepared, plan)
            return name if settings.gguf_path else f"{name}, in {path.parent}"
        size = hub.size(model.named(settings))
        told = f"{size / 1e9:.1f} GB " if size else ""
        token = "with" if settings.hf_token else "without"
        return f"{name}, {told}from the Hub ({token} token)"


@dataclass(frozen=True)
class Supposition:
    """What a supposed machine would fetch of a release, and why each other artifact not.

    ``failure`` is why nothing could be served there; None if a model could.
    """

    release: str
    supposed: HostFacts
    choice: report.Chosen | None
    verdicts: tuple[selection.Considered, ...]
    failure: HostError | None

    def as_json(self) -> dict[str, Any]:
        """Return all of it as plain data; the failure is in ``code``, ``detail`` and ``hint``."""
        failed = self.failure or HostError("", "")
        names = ("release", "supposed", "choice", "verdicts")
        return {
            "ok": self.failure is None,
            "code": failed.code,
            "detail": failed.message,
            "hint": failed.hint,
            **{name: report.plain(getattr(self, name)) for name in names},
        }

    def as_text(self) -> str:
        """Return it for people; foreign text cannot forge a line of it."""
        lines = [f"release {self.release}"]
        if self.choice is not None:
            lines = [f"would fetch {self.choice.artifact} of {lines[0]}"]
            lines.append(f"  because: {self.choice.reason}")
        lines += [f"  {verdict.name}: {verdict.reason}" for verdict in self.verdicts]
        can = "cannot" if self.failure else "can"
        lines.append(f"verdict: a model {can} be served on that machine")
        return "\n".join(printable(line) for line in lines)


def suppose(text: str, settings: Settings, sink: Sink) -> Supposition:
    """Choose an artifact for the machine that ``text`` describes; only the manifest is fetched."""
    if settings.cuda_arch is not None or settings.url is not None:
        raise SettingError("SETTING_INVALID/suppose")
    facts, chosen, failure = supposed_host(text), None, None
    release, _ = loader.read_manifest(settings, sink)
    try:
        chosen = selection.select(release, facts, allow_cpu=settings.cpu_allowed)
        selection.require_libraries(chosen, facts)
    except HostError as error:
        failure = error
    verdicts = chosen.verdicts if chosen else selection.refusals(release, facts)
    return Supposition(release.release, facts, report.choice(chosen), verdicts, failure)


def supposed_host(text: str) -> HostFacts:
    """Return the machine that a list of ``name=value`` describes, else ``_DEFAULTS``."""
    facts: dict[str, Any] = {}
    for part in (part.strip() for part in text.split(",")):
        name, _, value = part.partition("=")
        field, fact = _fact(name.strip(), value.strip())
        if field == "gpu":
            raise SettingError("SETTING_INVALID/suppose-gpu", part=part, near=gpus.near(value))
        if fact is None or field in facts:
            raise SettingError("SETTING_INVALID/suppose-part", part=part)
        facts[field] = fact
    return replace(_DEFAULTS, **facts)


def _fact(name: str, value: str) -> tuple[str, Any]:
    """Return the field of the facts that one part sets, and its value; None if it is unreadable."""
    if name == "capability" and re.fullmatch(r"[0-9]{1,2}\.?[0-9]", value):
        return "gpus", (Gpu(f"compute capability {value}", value.replace(".", "")),)
    if name == "gpu" and (known := gpus.capability(value)):
        return "gpus", (Gpu(value, known),)
    if name == "torch" and (torch := re.fullmatch("cu([0-9]{2})([0-9])|none", value)):
        place, version = Path("site-packages/nvidia"), f"{torch[1]}.{torch[2]}"
        names = [f"{stem}.so.{torch[1]}" for stem in _STEMS if torch[1]]
        found = (Library(one, place, version, f"torch {value}") for one in names)
        return "libraries", tuple(found)
    if name in {"driver", "glibc", "glibcxx"} and _VERSION.fullmatch(value):
        branch = name == "driver" and "." not in value
        return name, f"{value}.999" if branch else value  # its newest driver
    return name, value if name == "machine" and re.fullmatch(r"\w+", value) else None
