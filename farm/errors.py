"""The farm's errors. Exit statuses are a contract: 1 a failed build or publish, 2 usage."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import ClassVar, Final

from llama_loader.errors import advice, printable, sentence

_SENTENCES: Final = json.loads(Path(__file__).with_name("sentences.json").read_text("utf-8"))
"""``what`` happened and the ``hint`` by code, with ``{names}`` of values."""


class FarmError(Exception):
    """The root of all errors that the farm raises on purpose.

    Attributes:
        code: short upper-case name that can be searched for, e.g. ``ENGINE_NOT_RUNNING``.
        message: what happened, with the name of the file, option or server.
        hint: what to do about it, may be empty.
        log: the full log's path, where there is one.
        others: what else was found at the same time (``raise_all``).

    The words are those of ``sentences.json``, filled in with ``values``, unless a ``message`` is
    given. A code that has several sentences is given with the case: ``KEY_MISSING/file``.
    """

    exit_status: ClassVar[int] = 1

    def __init__(
        self,
        code: str,
        message: str | None = None,
        *,
        hint: str = "",
        log: str | None = None,
        **values: object,
    ) -> None:
        if message is None:
            code, message, hint = sentence(code, hint, values, _SENTENCES)
        hint = advice(message, hint)
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.log = log
        self.others: tuple[FarmError, ...] = ()

    def __reduce__(self) -> tuple[object, ...]:
        """Let pickle carry all fields between the hosts of a cluster."""
        return partial(type(self), self.code, self.message, hint=self.hint), ()

    @property
    def line(self) -> str:
        """The whole error in one line."""
        return f"{self.code}: {self.message}{f' ({self.hint})' if self.hint else ''}"

    def render(self) -> str:
        """Return the text for a person: the error line, then the hint and the log, if any."""
        lines = [f"error[{self.code}]: {self.message}"]
        lines += [f"hint: {self.hint}"] if self.hint else []
        lines += [f"log: {self.log}"] if self.log else []
        return "\n".join([*map(shown, lines), *(other.render() for other in self.others)])


def remark(code: str, kind: str = "note", **values: object) -> str:
    """Return a line about what a person must know, with the words of a sentence: ``note[CODE]``."""
    named, what, _ = sentence(code, "", values, _SENTENCES)
    return f"{kind}[{named}]: {what}"


def shown(text: str) -> str:
    """Return a text for a terminal: without what that acts on, further lines of it indented.

    Tarballs, ELF files, manifests and servers are foreign: no text of theirs begins a line.
    """
    return "\n    ".join(map(printable, text.split("\n")))


class UsageError(FarmError):
    """The request names something that does not exist or cannot be built (exit status 2)."""

    exit_status = 2


class EngineError(FarmError):
    """No engine answers, or the engine cannot do what is needed."""


class SourceError(FarmError):
    """llama.cpp's source cannot be fetched, or differs from its pin."""


class BuildError(FarmError):
    """A step of a build failed."""


class InspectError(FarmError):
    """A binary lacks code that its architecture set names, or needs more than its line promises."""


class PackError(FarmError):
    """A tree could not be packed."""


class PublishError(FarmError):
    """A release could not be published, promoted or rolled back; nothing half-done is visible."""


def raise_all(findings: Iterable[FarmError]) -> None:
    """Raise the findings of a check as one error that shows all; without findings, do nothing.

    Wrong usage comes first, so that its exit status (2) counts: the request must change.
    """
    told: dict[tuple[str, str], FarmError] = {}
    for finding in findings:
        for one in (finding, *finding.others):
            told.setdefault((one.code, one.message), one)
    found = sorted(told.values(), key=lambda error: -error.exit_status)
    if found:
        found[0].others = tuple(found[1:])
        raise found[0]
