"""The engine's values: frozen and picklable, because workers send them to the app's process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Union

from llama_loader.errors import LoaderError, StoreError, without_secrets
from llama_space import event_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llama_loader.events import Event, Note

Phase = Literal["preparing", "ready", "failed", "closed"]
Waiting = Literal["prepare", "queue", "start", "load", "restart", "waiting"]


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
        return event_text.progress(self)


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
    first_token: float | None
    seconds: float
    tokens: int | None
    warm: bool
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
