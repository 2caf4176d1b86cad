"""The farm's errors. Exit statuses are a contract: 1 a failed build or publish, 2 usage."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable

from llama_loader.errors import printable


class FarmError(Exception):
    """Root of everything that the farm raises on purpose; a failed build, publish or check.

    Attributes:
        code: short upper-case name that can be searched for, e.g. ``ENGINE_NOT_RUNNING``.
        message: what happened, naming the thing.
        hint: what to do about it, may be empty.
        log: the full log's path, where there is one.
        others: what else was found at the same time (``raise_all``).
    """

    exit_status: ClassVar[int] = 1

    def __init__(self, code: str, message: str, *, hint: str = "", log: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.log = log
        self.others: tuple[FarmError, ...] = ()

    def __reduce__(self) -> tuple[object, ...]:
        """Travel between the hosts of a cluster whole."""
        return _again, (type(self), self.code, self.message, self.hint)

    @property
    def line(self) -> str:
        """All of it in one line."""
        return f"{self.code}: {self.message}{f' ({self.hint})' if self.hint else ''}"

    def render(self) -> str:
        """Return what a person sees: the error line, then hint and log where there are any."""
        # tarballs, ELF files and manifests are foreign text; a log has lines of its own
        message = "\n".join(map(printable, self.message.split("\n")))
        lines = [f"error[{self.code}]: {message}"]
        lines += [f"hint: {self.hint}"] if self.hint else []
        lines += [f"log: {self.log}"] if self.log else []
        return "\n".join([*lines, *(other.render() for other in self.others)])


def _again(kind: type[FarmError], code: str, message: str, hint: str) -> FarmError:
    return kind(code, message, hint=hint)


class UsageError(FarmError):
    """Asked for something that does not exist or cannot be built (exit status 2)."""

    exit_status = 2


class EngineError(FarmError):
    """No engine, or one that cannot do what it must."""


class SourceError(FarmError):
    """llama.cpp's source could not be had, or is not what its pin says."""


class BuildError(FarmError):
    """A step of a build failed."""


class InspectError(FarmError):
    """A binary does not hold, or needs more than, what its architecture set says."""


class PackError(FarmError):
    """A tree could not be packed."""


class PublishError(FarmError):
    """A release could not be published, promoted or rolled back; nothing half-done is visible."""


def raise_all(findings: Iterable[FarmError]) -> None:
    """Raise the findings of a check as one error that shows all of them; nothing without any.

    Wrong usage comes first, so that its exit status (2) counts: what was asked for must change.

    Raises:
        FarmError: the first finding, with the others in it.
    """
    told: dict[tuple[str, str], FarmError] = {}
    for finding in findings:
        for one in (finding, *finding.others):
            told.setdefault((one.code, one.message), one)
    found = sorted(told.values(), key=lambda error: -error.exit_status)
    if found:
        found[0].others = tuple(found[1:])
        raise found[0]
