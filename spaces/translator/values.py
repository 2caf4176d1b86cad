"""What goes between the page, the engine and a ZeroGPU worker: frozen, picklable, JSON-able."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Union

from llama_loader.errors import LoaderError, without_secrets

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llama_loader.events import Note

Phase = Literal["preparing", "ready", "failed"]


@dataclass(frozen=True)
class Ask:
    """What the page wants from the model.

    Attributes:
        messages: the chat, as llama-server's ``/v1/chat/completions`` takes it.
        max_tokens: the longest answer.
        temperature: 0 for the likeliest words.
        extra: goes into the request as it is.
    """

    messages: tuple[Mapping[str, Any], ...]
    max_tokens: int
    temperature: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """A part of an answer; ``text`` is what is new.

    Attributes:
        text: the new words; may be empty.
        finished: nothing follows.
        tokens: tokens made so far, None where the server does not say.
        tokens_per_second: None where the server does not say.
        reason: why it ended: ``stop``, ``length``; empty while it goes on.
    """

    text: str
    finished: bool
    tokens: int | None
    tokens_per_second: float | None
    reason: str


@dataclass(frozen=True)
class Progress:
    """The GPU or the server is being got ready, inside a call.

    Attributes:
        stage: ``prepare``, ``queue`` (for a GPU), ``start``, ``restart`` or ``waiting`` (for the
            next words).
        text: a sentence for a person.
    """

    stage: str
    text: str


@dataclass(frozen=True)
class Failure:
    """An expected error, as a value: an exception would cost the ZeroGPU worker its life.

    Attributes:
        code: as in ``error[CODE]``.
        message: what happened, one line without secrets.
        hint: what to do, one line, may be empty.
        exit_status: that of the loader's command line (docs/faults.md).
    """

    code: str
    message: str
    hint: str
    exit_status: int

    @classmethod
    def of(cls, error: LoaderError) -> Failure:
        """Return the loader's error as a value."""
        message = " ".join(without_secrets(error.message).split())
        return cls(error.code, message, without_secrets(error.hint), error.exit_status)


@dataclass(frozen=True)
class Runtime:
    """What was chosen to run.

    Attributes:
        release: the release's name, None for an archive by URL.
        artifact: the tarball's name, None for an archive by URL.
        architecture: what its binaries were made for (``90``, ``cpu``), None for unknown.
        digest: the tarball's sha256.
        verified: False where nothing pinned it.
    """

    release: str | None
    artifact: str | None
    architecture: str | None
    digest: str | None
    verified: bool


@dataclass(frozen=True)
class Report:
    """What a worker tells the app's process, which cannot see it: once a call, before the words.

    Attributes:
        runtime: what it runs; another one than was expected where the GPU is another.
        devices: llama-server's names; empty for the CPU.
        memory: bytes of weights by buffer.
        server_pid, worker_pid: processes.
        warm: the server ran before this call.
        timeline: (stage, seconds) of the server's start.
        notes: what a person should know, without secrets.
    """

    runtime: Runtime
    devices: tuple[str, ...]
    memory: Mapping[str, int]
    server_pid: int | None
    worker_pid: int
    warm: bool
    timeline: tuple[tuple[str, float], ...]
    notes: tuple[Note, ...]


@dataclass(frozen=True)
class Call:
    """One call that is over.

    Attributes:
        when: seconds since the epoch at its begin.
        first_token: seconds until the first words; None where there were none.
        seconds: how long it took.
        tokens: tokens made, None for unknown.
        warm: the server ran already.
    """

    when: float
    first_token: float | None
    seconds: float
    tokens: int | None
    warm: bool


@dataclass(frozen=True)
class State:
    """What is running, as far as this process knows.

    Attributes:
        phase: ``ready`` once everything that needs no GPU is here.
        release, artifact, architecture, digest, verified: the runtime; ``architecture`` is what its
            binaries were made for (``90``, ``cpu``), ``digest`` the tarball's sha256.
        model, model_sha256: the model's file name, and its sha256 where one is pinned.
        devices: llama-server's names; empty for the CPU, and before the first start.
        memory: bytes of weights by buffer, in llama-server's words.
        tokens_per_second: of the last answer.
        server_pid: of the server of the last call.
        warm: the next call finds a server, as far as can be known here.
        timeline: (stage, seconds) of this start, in order.
        calls: the last ones, oldest first.
        progress: the latest events in words.
        elapsed: seconds of the preparation that is under way, else None.
        failure: why ``phase`` is ``failed``.
        notes: what a person should know: not as asked, or not verified.
    """

    phase: Phase
    release: str | None = None
    artifact: str | None = None
    architecture: str | None = None
    digest: str | None = None
    verified: bool = False
    model: str | None = None
    model_sha256: str | None = None
    devices: tuple[str, ...] = ()
    memory: Mapping[str, int] = field(default_factory=dict)
    tokens_per_second: float | None = None
    server_pid: int | None = None
    warm: bool = False
    timeline: tuple[tuple[str, float], ...] = ()
    calls: tuple[Call, ...] = ()
    progress: tuple[str, ...] = ()
    elapsed: float | None = None
    failure: Failure | None = None
    notes: tuple[Note, ...] = ()


Item = Union[Piece, Progress, Failure]  # noqa: UP007 - evaluated at run time, on Python 3.10 too
"""What a stream is made of."""
