"""Places of releases (a folder, GitHub Releases, a Hub repository): names, and their interface."""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

import msgspec
import requests

from farm import durable
from farm.errors import FarmError, PublishError, UsageError
from farm.inputs.packages import shown
from farm.release import MANIFEST
from llama_loader.locations import is_allowed_web
from llama_loader.manifest import MAX_MANIFEST_BYTES

if TYPE_CHECKING:
    from farm.publish.publishing import Known, Plan

MOST_PAGES: Final = 1000
"""Pages of a list that a server may send; GitHub's have 100 entries, the Hub's 1,000."""
MOST_LISTED: Final = 32 << 20
"""Bytes of a list's pages together, which may take four times as much in memory: letters beyond
the BMP. GitHub describes a release of 25 files in 40 kB, so 800 of them."""
SIGNATURE: Final = f"{MANIFEST}.minisig"
_SERIAL: Final = re.compile(r"([1-9][0-9]{0,15})\.json", re.ASCII)
_TOKEN: Final = re.compile(r"[!-~]+")
"""Visible ASCII without spaces, the characters that ``Bearer`` takes."""
_REPOSITORY: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)
_PROJECT: Final = re.compile(r"[\w.-]{1,100}/[\w.-]{1,100}", re.ASCII)
_RESERVED: Final = re.compile(r"channels|channel-.*", re.IGNORECASE)
T = TypeVar("T")


class Signed(NamedTuple):
    """A channel's manifest, and its minisign signature."""

    manifest: bytes
    signature: bytes

    @property
    def sha256(self) -> str:
        """The digest of the manifest and its signature, joined."""
        return hashlib.sha256(self.manifest + self.signature).hexdigest()


class Destination(ABC):
    """One place: a folder of files for each release, and one for each channel.

    Everything that it raises on purpose is a ``FarmError``.
    """

    where: str
    """As a person wrote it."""
    project: str
    """``OWNER/REPO``, as signatures of its channels name it; ``local/FOLDER`` of a folder."""
    channel_folder: str = "channels/"
    """The beginning of the name of a channel's folder."""

    @abstractmethod
    def require_there(self) -> None:
        """Check that the place exists and can be read."""

    @abstractmethod
    def require_writable(self) -> None:
        """Check, as far as possible without writing, that a release can be published here."""

    @abstractmethod
    def present(self, release: str) -> Mapping[str, Known]:
        """Return the finished parts of a release that the place has, visible or not."""

    @abstractmethod
    def publish(self, plan: Plan, tell: Callable[[str], None]) -> None:
        """Send the new parts, read everything back, then make it visible; the manifest last.

        Raises:
            PublishError: it was cut off, or the place has other bytes than those that were sent. No
                visible file refers to a missing one; publishing again sends only what is missing.
        """

    @abstractmethod
    def read(self, folder: str, name: str) -> Iterator[bytes]:
        """Read a published file of a release's folder, or of a channel's.

        Raises:
            PublishError: ``NOT_PUBLISHED``: there is none.
        """

    @abstractmethod
    def names(self, folder: str) -> Iterable[str]:
        """Return the names of the published files in a folder; none if there is no folder."""

    @abstractmethod
    def folders(self) -> Iterable[str]:
        """Return the folders that a file ``shows``, oldest first; by name if age is unknown."""

    @abstractmethod
    def put_channel(self, channel: str, serial: int, signed: Signed) -> None:
        """Make a signed manifest the channel's current one, and keep it under its serial.

        Raises:
            PublishError: ``CHANNEL_MOVED``: another one was promoted under that serial meanwhile.
        """

    @abstractmethod
    def download_url(self, folder: str, name: str) -> str:
        """Return the URL that pip and browsers read a file at."""

    def shows(self, folder: str, name: str) -> bool:
        """Return whether a file makes its folder a release or a channel.

        A channel that lost its manifest is one, too, so that its loss is seen.
        """
        numbered = folder.startswith(self.channel_folder) and _SERIAL.fullmatch(name)
        return name == MANIFEST or bool(numbered)

    def releases(self) -> tuple[str, ...]:
        """Return the visible releases, oldest first; by name if their age is unknown."""
        found = (one for one in self.folders() if "/" not in one)
        return tuple(one for one in found if not one.startswith(self.channel_folder))

    def channels(self) -> tuple[str, ...]:
        """Return the channels' names."""
        start = self.channel_folder
        found = (one.removeprefix(start) for one in self.folders() if one.startswith(start))
        return tuple(sorted(one for one in found if "/" not in one))

    def other_channels(self, channel: str) -> tuple[str, ...]:
        """Return the names of all channels but one."""
        return tuple(one for one in self.channels() if one != channel)

    def manifest_url(self, release: str) -> str:
        """Return the URL that loaders read a release at."""
        return self.download_url(release, MANIFEST)

    def channel_url(self, channel: str) -> str:
        """Return the URL that loaders read a channel at."""
        return self.download_url(f"{self.channel_folder}{channel}", MANIFEST)

    def artifact_base(self, release: str) -> str:
        """Return the URL before a file's name in a channel's manifest.

        It is relative, so it is right in every mirror of the place.
        """
        return f"../../{release}/"

    def small(self, folder: str, name: str) -> bytes:
        """Read a manifest or a signature, of at most 4 MiB.

        Raises:
            PublishError: ``NOT_PUBLISHED``, ``FILE_TOO_LARGE``.
        """
        return small(self.read(folder, name), f"{name} of {folder} at {self.where}")

    def channel_file(self, channel: str, name: str) -> bytes | None:
        """Read a file of a channel; None where there is none."""
        try:
            return self.small(f"{self.channel_folder}{channel}", name)
        except FarmError as error:
            if error.code not in {"NOT_PUBLISHED", "DESTINATION_MISSING"}:
                raise
            return None

    def channel_serials(self, channel: str) -> tuple[int, ...]:
        """Return the serials that were promoted to a channel, in order."""
        names = self.names(f"{self.channel_folder}{channel}")
        return tuple(sorted(int(match[1]) for name in names if (match := _SERIAL.fullmatch(name))))

    def not_published(self, folder: str, name: str) -> PublishError:
        """Return the error of a missing file; of a release, with the newest ones that there are."""
        hint = ""
        if name == MANIFEST and not folder.startswith(self.channel_folder):
            others = self.releases()[::-1]
            named = ", ".join([*others[:5], *(["…"] if others[5:] else [])])
            hint = f"there is: {named}" if named else "no release is there: invoke publish"
        return PublishError("NOT_PUBLISHED", where=self.where, name=name, folder=folder, hint=hint)

    def moved(self, channel: str, serial: int) -> PublishError:
        """Return the error of a promotion that another one overtook."""
        return PublishError("CHANNEL_MOVED", channel=channel, where=self.where, serial=serial)


def small(blocks: Iterable[bytes], what: str) -> bytes:
    """Read a file of at most 4 MiB, the largest manifest that a loader takes.

    Raises:
        PublishError: ``FILE_TOO_LARGE``.
    """
    content = b""
    for block in blocks:
        content += block
        if len(content) > MAX_MANIFEST_BYTES:
            raise PublishError("FILE_TOO_LARGE", what=what)
    return content


def endpoint(variable: str, usual: str) -> str:
    """Return the address of a place's API, to which the token is sent.

    Raises:
        UsageError: ``ENDPOINT_REFUSED``: it is neither https nor an address of this machine.
    """
    found = (os.environ.get(variable) or usual).rstrip("/")
    if not is_allowed_web(found):
        raise UsageError("ENDPOINT_REFUSED", variable=variable)
    return found


def understood(kind: type[T], answer: requests.Response) -> T:
    """Parse the JSON that a place's server answers.

    Raises:
        PublishError: ``PLACE_UNUSABLE``: it is not JSON, or not what the server's API documents.
    """
    try:
        return msgspec.json.decode(answer.content, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise unusable(shown(answer.url), str(error)) from error


def listed(
    kind: type[T], first: str, ask: Callable[[str], requests.Response], *own: str
) -> Iterator[T]:
    """Yield the entries of a list on the pages of a server, whose addresses begin with ``own``.

    Args:
        kind: of an entry.
        first: the address of the first page.
        ask: requests a page.
        own: as for ``require_own``.

    Raises:
        PublishError: ``PLACE_UNUSABLE``: the list has no end, or as ``understood`` and
            ``require_own``.
        HTTPError: the server refuses.
    """
    url, entries, size = first, durable.MOST_ENTRIES, MOST_LISTED
    for _ in range(MOST_PAGES):
        with ask(url) as answer:
            answer.raise_for_status()
            found: list[T] = understood(list[kind], answer)  # type: ignore[valid-type]
        entries -= len(found)
        size -= len(answer.content)
        if min(entries, size) < 0:
            break
        yield from found
        if "next" not in answer.links:
            return
        url = require_own(answer.links["next"]["url"], *own)
    raise unusable(shown(first), "its list does not end")


def require_own(url: str, *own: str) -> str:
    """Return an address out of a server's answer, to which the token may be sent.

    Raises:
        PublishError: ``PLACE_UNUSABLE``: it does not begin as the server's own addresses.
    """
    if not url.startswith(own):
        raise unusable(own[0], f"it leads to another server, {shown(url)}, which gets no token")
    return url


def unusable(what: str, why: str) -> PublishError:
    """Return the error of a server that answers otherwise than its API documents."""
    return PublishError("PLACE_UNUSABLE", what=what, why=why)


def token(variable: str) -> str | None:
    """Return the token in a variable, without the line break of a file; None where it is unset.

    A client library would refuse a token that no header can carry, in a message that contains the
    token; this error does not contain it.

    Raises:
        UsageError: ``TOKEN_INVALID``: it cannot be one.
    """
    found = os.environ.get(variable, "").strip()
    if found and not _TOKEN.fullmatch(found):
        raise UsageError("TOKEN_INVALID", variable=variable)
    return found or None


def parse(text: str | None) -> Destination:
    """Return the place that ``--to`` names.

    Raises:
        UsageError: none was given, or it is of another kind.
    """
    if not text:
        raise UsageError("OPTION_MISSING/to")
    from farm.publish.directory import Directory  # noqa: PLC0415 - places are made of this module
    from farm.publish.github import GitHub  # noqa: PLC0415
    from farm.publish.hub import Hub  # noqa: PLC0415

    kind, colon, rest = text.partition(":")
    kind = kind.lower()
    if colon and kind in {"github", "hf"}:
        if not _REPOSITORY.fullmatch(rest) or ".." in rest:
            raise UsageError("DESTINATION_INVALID/name", text=text, kind=kind)
        return GitHub(rest) if kind == "github" else Hub(rest)
    if re.match(r"[a-z][a-z0-9+.-]+:", text, re.IGNORECASE):
        raise UsageError("DESTINATION_INVALID", text=text)
    folder = Path(text).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UsageError("DESTINATION_INVALID/file", text=text)
    # else OWNER/REPO without its hf: would silently become a folder
    if not folder.absolute().parent.is_dir():
        meant = f": hf:{text}?" if _REPOSITORY.fullmatch(text) else ""
        parent = folder.parent
        raise UsageError("DESTINATION_MISSING/parent", text=text, parent=parent, meant=meant)
    return Directory(folder)


def require_name(kind: str, name: str | None) -> str:
    """Return a release's or channel's name, which becomes a folder, a tag, part of a URL.

    Raises:
        UsageError: it cannot be one.
    """
    if kind == "release" and name and _RESERVED.fullmatch(name):
        raise UsageError("NAME_INVALID/reserved", name=name)
    if not name or not _NAME.fullmatch(name) or ".." in name:
        raise UsageError("NAME_INVALID" if name else "NAME_INVALID/none", kind=kind, name=name)
    return name


def require_given(kind: str, name: str | None, place: Destination) -> str:
    """Return the name that ``--release`` or ``--channel`` gives.

    Raises:
        UsageError: it was not given; names what the place has. Or it cannot be one.
    """
    if name:
        return require_name(kind, name)
    there: tuple[str, ...] = ()
    with suppress(FarmError):  # the place may be missing, too, or not answer
        there = place.releases()[:-6:-1] if kind == "release" else place.channels()
    usual = "such as --release b11549-1" if kind == "release" else "such as --channel stable"
    hint = f"there is {', '.join(there)}" if there else usual
    raise UsageError("OPTION_MISSING", option=f"--{kind}", hint=hint)


def project(name: str | None) -> str | None:
    """Return a project's name as signatures contain it; None if none is given.

    Raises:
        UsageError: it is not ``OWNER/REPO``.
    """
    if name is not None and not _PROJECT.fullmatch(name):
        raise UsageError("NAME_INVALID/project", name=name)
    return name
