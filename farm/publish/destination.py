"""The places that a release can go to, told apart once, and what each of them can do."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from farm.errors import PublishError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from farm.publish.parts import Known, Part, Plan

_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)

_PROJECT: Final = re.compile(r"[\w.-]{1,100}/[\w.-]{1,100}", re.ASCII)
_COUNTED: Final = re.compile(r"([^0-9]+)|([0-9]+)")
_RESERVED: Final = re.compile(r"channels|channel-.*", re.IGNORECASE)


class Signed(NamedTuple):
    """A channel's manifest, and its minisign signature."""

    manifest: bytes
    signature: bytes


class Destination(Protocol):
    """One place. Everything that it raises on purpose is a ``FarmError``."""

    where: str
    """As a person wrote it."""
    project: str
    """``OWNER/REPO``, as signatures of its channels name it; ``local/FOLDER`` of a folder."""

    def require_there(self) -> None:
        """See that the place exists, and may be read.

        Raises:
            FarmError: it does not, or may not.
        """

    def require_writable(self) -> None:
        """See, as far as that shows without writing, that a release can be published here.

        Raises:
            FarmError: it cannot.
        """

    def present(self, release: str) -> Mapping[str, Known]:
        """Return the finished parts of a release that are there, visible or not yet."""

    def publish(
        self,
        plan: Plan,
        check: Callable[[Part, Iterable[bytes]], None],
        tell: Callable[[str], None],
    ) -> None:
        """Send what is new, read everything back, then make it visible; the manifest last."""

    def read(self, release: str, name: str) -> Iterator[bytes]:
        """Read a published file.

        Raises:
            PublishError: ``NOT_PUBLISHED``: there is none.
        """

    def manifest_url(self, release: str) -> str:
        """Return the URL that loaders read a release at."""

    def download_url(self, release: str, name: str) -> str:
        """Return the URL that pip and browsers read a file of a release at."""

    def releases(self) -> tuple[str, ...]:
        """Return the visible releases, oldest first; by their names where nothing else tells."""

    def artifact_base(self, release: str) -> str:
        """Return what stands before a file's name in a channel's manifest: where it lies."""

    def channel_url(self, channel: str) -> str:
        """Return the URL that loaders read a channel at."""

    def channel_file(self, channel: str, name: str) -> bytes | None:
        """Read a file of a channel; None where there is none."""

    def channel_serials(self, channel: str) -> tuple[int, ...]:
        """Return the serials that were promoted to a channel, in order."""

    def channels(self) -> tuple[str, ...]:
        """Return the channels' names."""

    def put_channel(self, channel: str, serial: int, signed: Signed) -> None:
        """Make a signed manifest the channel's present one, and keep it under its serial.

        Raises:
            PublishError: ``CHANNEL_MOVED``: another one was promoted under that serial meanwhile.
        """


def require_name(kind: str, name: str | None) -> str:
    """Return a release's or channel's name, which becomes a folder, a tag, part of a URL.

    Raises:
        UsageError: it cannot be one.
    """
    if kind == "release" and name and _RESERVED.fullmatch(name):
        raise UsageError(
            "NAME_INVALID", f"{name!r} is not a release's name: places keep their channels there"
        )
    if not name or not _NAME.fullmatch(name) or ".." in name:
        raise UsageError(
            "NAME_INVALID",
            f"{name!r} is not a {kind}'s name" if name else f"no {kind} was named",
            hint="letters, digits, '.', '_' and '-', 64 at most: b11549-1, stable",
        )
    return name


def project(name: str | None) -> str | None:
    """Return a project's name as signatures have it; None where none is given.

    Raises:
        UsageError: it is not ``OWNER/REPO``.
    """
    if name is not None and not _PROJECT.fullmatch(name):
        raise UsageError("NAME_INVALID", f"--project {name!r} is not OWNER/REPO")
    return name


def moved(channel: str, serial: int, where: str) -> PublishError:
    """Return the error of a promotion that another one overtook."""
    return PublishError(
        "CHANNEL_MOVED",
        f"channel {channel} of {where} came to serial {serial} meanwhile, by another promotion",
        hint="invoke status shows what it says now",
    )


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Sort releases as a person counts: b9999-1 comes before b11549-1, and that before b11549-2."""
    return tuple(sorted(names, key=_counted))


def _counted(name: str) -> list[tuple[int, str]]:
    return [(int(number or 0), word) for word, number in _COUNTED.findall(name)]
