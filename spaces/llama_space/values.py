"""The engine's values, and progress as lines of text.

The values are frozen and picklable, because workers send them to the app's process.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, Union

from llama_loader.errors import LoaderError, StoreError, without_secrets
from llama_loader.events import Downloading, Note, Resolving, Stage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llama_loader.events import Event

Phase = Literal["preparing", "ready", "failed", "closed"]
Waiting = Literal["prepare", "queue", "start", "load", "restart", "waiting"]

ENGLISH: Final[Mapping[str, str]] = {
    "resolving": "reading {url}",
    "downloading": "downloading {name}: {amount}",
    "unpacking": "unpacking {name}: {amount}",
    "share": "{done} of {total} ({share})",
    "so_far": "{line} ({seconds} s)",
    "prepare": "preparing",
    "queue": "ZeroGPU lends a GPU as soon as one is free",
    "start": "starting llama-server",
    "load": "llama-server loads the model",
    "restart": "llama-server is started anew",
    "waiting": "waiting for words",
}
"""What the lines are made of. A page in another language has texts of its own by these names."""
_UNITS: Final = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@dataclass(frozen=True)
class Progress:
    """What is being waited for.

    Attributes:
        stage: ``prepare``, ``queue`` (for a GPU), ``start``, ``load`` (the model), ``restart`` or
            ``waiting`` (for the next words).
        event: the loader's latest event about it, without secrets.
        seconds: for how long so far.
    """

    stage: Waiting
    event: Event | None = None
    seconds: float = 0.0

    @property
    def text(self) -> str:
        """A line for a person, in English."""
        return line(self)


@dataclass(frozen=True)
class Piece:
    """A part of an answer: the new words, and whether the answer ends with them.

    ``tokens`` are those generated so far. Both figures are None where the server does not say.
    ``reason`` is why the answer ended, ``stop`` or ``length``; empty before its end.
    """

    text: str
    finished: bool
    tokens: int | None
    tokens_per_second: float | None
    reason: str


@dataclass(frozen=True)
class Failure:
    """An error as a value: raised in a ZeroGPU worker, an exception would cost that worker.

    The fields are those of ``LoaderError``: single lines, without secrets.
    """

    code: str
    message: str
    hint: str
    exit_status: int

    @classmethod
    def of(cls, error: LoaderError | OSError) -> Failure:
        """Return an error as a value; one of the system's is disk trouble."""
        if isinstance(error, OSError):
            hint = "is the disk full, or are too many files open?"
            error = StoreError("SYSTEM", str(error), hint=hint)
        message = " ".join(without_secrets(error.message).split())
        return cls(error.code, message, without_secrets(error.hint), error.exit_status)

    def error(self) -> LoaderError:
        """Return the error that this value stands for, to be raised."""
        kinds = {kind.exit_status: kind for kind in LoaderError.__subclasses__()}
        kind = kinds.get(self.exit_status, LoaderError)
        return kind(self.code, self.message, hint=self.hint)


@dataclass(frozen=True)
class Report:
    """What a worker tells the app's process once a call, before the first piece.

    Attributes:
        running: fields of ``Status``: its runtime, which is not the one that was prepared where
            the GPU is another one, its devices, memory and process.
        warm: the server ran before this call.
        timeline: (stage, seconds) of the server's start.
        notes: what a person should know, without secrets.
    """

    running: Mapping[str, Any]
    warm: bool
    timeline: tuple[tuple[str, float], ...]
    notes: tuple[Note, ...]


@dataclass(frozen=True)
class Figures:
    """One call in numbers; the last item of an answer that ended well.

    Attributes:
        when: seconds since the epoch at its begin.
        first_token: seconds until the first words; None where there were none.
        seconds: how long it took.
        tokens, tokens_per_second, reason: as in the last ``Piece``.
        warm: the server ran already.
        reserved: GPU seconds that ZeroGPU was asked for; 0 outside ZeroGPU.
        used: GPU seconds from the worker's first sign of life to the end; 0 outside ZeroGPU.
    """

    when: float
    first_token: float | None = None
    seconds: float = 0.0
    tokens: int | None = None
    warm: bool = False
    tokens_per_second: float | None = None
    reason: str = ""
    reserved: float = 0.0
    used: float = 0.0


@dataclass(frozen=True)
class Address:
    """Where an OpenAI client finds the server, which refuses requests without the key."""

    base_url: str
    api_key: str = field(repr=False)


@dataclass(frozen=True)
class Status:
    """What is running, as far as this process knows.

    Attributes:
        phase: ``ready`` once everything that needs no GPU is done; ``closed`` after
            ``Engine.close``, until a call starts the server anew; ``failure`` tells why ``failed``.
        release: None for an archive by URL.
        architecture: what its binaries were compiled for (``90``, ``cpu``), None for unknown.
        digest: the tarball's sha256.
        verified: a pin or a signature vouches for the tarball.
        model_sha256: what the model's file was compared with; None where no digest is pinned.
        devices: llama-server's names; empty for the CPU, and before the first start.
        memory: bytes of weights by buffer, in llama-server's words.
        tokens_per_second: of the last answer.
        gpu_seconds_reserved, gpu_seconds_used: sums of what ZeroGPU was asked for, and lent.
        server_pid: of the server of the last call.
        warm: that server runs; ZeroGPU may still choose another GPU for the next call.
        timeline: (stage, seconds) of this start, in order.
        calls: the last ones, oldest first.
        progress: the latest news of the preparation.
        elapsed: seconds since the preparation under way began, else None.
        notes: what a person should know: not as asked, or not verified.
    """

    phase: Phase
    release: str | None = None
    architecture: str | None = None
    digest: str | None = None
    verified: bool = False
    model: str | None = None
    model_sha256: str | None = None
    devices: tuple[str, ...] = ()
    memory: Mapping[str, int] = field(default_factory=dict)
    tokens_per_second: float | None = None
    gpu_seconds_reserved: float = 0.0
    gpu_seconds_used: float = 0.0
    server_pid: int | None = None
    warm: bool = False
    timeline: tuple[tuple[str, float], ...] = ()
    calls: tuple[Figures, ...] = ()
    progress: tuple[Progress, ...] = ()
    elapsed: float | None = None
    failure: Failure | None = None
    notes: tuple[Note, ...] = ()

    @property
    def latest(self) -> Progress:
        """What the preparation does now."""
        return self.progress[-1] if self.progress else Progress("prepare")

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage, such as ``resolve``, ``fetch``, ``model`` or ``start``."""
        return dict(self.timeline)

    @property
    def device(self) -> str | None:
        """Where the model runs: device names, or ``CPU``; None before the first start."""
        if self.devices:
            return ", ".join(self.devices)
        return "CPU" if self.server_pid is not None or self.calls else None


Item = Union[Progress, Piece, Figures, Failure]  # noqa: UP007 - evaluated at run time, on 3.10 too
"""One of the values that ``Engine.events`` yields."""


def line(one: Progress, forms: Mapping[str, str] = ENGLISH) -> str:
    """Return one line about what is being waited for; seconds are left out below one."""
    line = forms[one.stage] if one.event is None else event_line(one.event, forms)
    return forms["so_far"].format(line=line, seconds=int(one.seconds)) if one.seconds >= 1 else line


def event_line(one: Event, forms: Mapping[str, str] = ENGLISH) -> str:
    """Return one line about an event."""
    if isinstance(one, Resolving):
        return forms["resolving"].format(url=without_secrets(one.url))
    if isinstance(one, Note):
        return without_secrets(f"{one.code}: {one.message}{one.hint and f'; {one.hint}'}")
    if isinstance(one, Stage):
        return f"{one.name}: {one.seconds:.1f} s"
    amount = size(one.done)
    if one.total:
        share = f"{one.done / one.total:.0%}"
        amount = forms["share"].format(done=amount, total=size(one.total), share=share)
    kind = "downloading" if isinstance(one, Downloading) else "unpacking"
    return forms[kind].format(name=one.name, amount=amount)


def plain(one: Event) -> Event:
    """Return the event without secrets, so that a page may show it."""
    if isinstance(one, Resolving):
        return Resolving(without_secrets(one.url))
    if isinstance(one, Note):
        return Note(one.code, without_secrets(one.message), without_secrets(one.hint))
    return one


def size(count: int) -> str:
    """Return a number of bytes with three digits and a unit."""
    for unit, name in _UNITS:
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} B"
