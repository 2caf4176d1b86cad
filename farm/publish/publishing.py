"""Publish a release folder: verify, plan what is sent, send, read back, make visible."""

from __future__ import annotations

import hashlib
import math
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rich.filesize import decimal

from farm import durable
from farm import release as folder_of
from farm.errors import PublishError, remark
from farm.inputs import pins
from farm.publish import places
from farm.publish.places import Destination
from llama_loader import manifest as schema
from llama_loader.manifest import Artifact, Manifest

BLOCK: Final = 1 << 20
"""Bytes of a file that are held at a time."""
_COUNTED: Final = re.compile(r"0*([0-9]{1,999})")


@dataclass(frozen=True)
class ReleaseFile:
    """One file of a release; ``path`` leads to what was opened when it was hashed."""

    name: str
    path: Path = field(compare=False)
    size: int
    sha256: str

    def __str__(self) -> str:
        """Return name and size, for people."""
        return f"{self.name}: {decimal(self.size)}"


@dataclass(frozen=True)
class Known:
    """A file of a place; ``visible``: a loader can read it.

    ``digest`` is its sha256, or hashes it: others may put files of any size there.
    """

    size: int
    digest: str | Callable[[], str]
    visible: bool = True

    @property
    def sha256(self) -> str:
        """Return the digest; a file on this disk is hashed now."""
        return self.digest if isinstance(self.digest, str) else self.digest()

    def is_of(self, part: ReleaseFile | Artifact) -> bool:
        """Return whether the bytes are those of a part; other sizes need no digest."""
        return self.size == part.size and self.sha256 == part.sha256


@dataclass(frozen=True)
class Plan:
    """The work for one release; ``new`` in the order of sending, the manifest last."""

    release: str
    where: str
    there: tuple[ReleaseFile, ...]
    new: tuple[ReleaseFile, ...]

    @property
    def parts(self) -> tuple[ReleaseFile, ...]:
        """All parts, the manifest last."""
        found = (*self.there, *self.new)
        return tuple(sorted(found, key=lambda part: part.name == folder_of.MANIFEST))

    @property
    def size(self) -> int:
        """Bytes to send."""
        return sum(part.size for part in self.new)


def prepare(
    folder: Path,
    destination: Destination,
    note: Callable[[str], None] = print,
    *,
    wheel: Path | None = None,
) -> Plan:
    """Verify a release folder and return what publishing it would do.

    ``note`` takes one line about a fact that an old tarball does not record. The ``wheel``
    ``llama-space`` is published beside the manifest.

    Raises:
        UsageError: it is no release folder, or its name cannot be published.
        PackError: a tarball differs from the manifest.
        PublishError: its llama.cpp has a known vulnerability, or other bytes are published already.
    """
    content = folder_of.content(folder)
    manifest = schema.parse(content, what=str(folder / folder_of.MANIFEST))
    folder_of.verify(folder, note, content)
    sizes = {artifact.name: artifact.size for artifact in manifest.artifacts}
    found = tuple(
        of_file(folder / one, sizes.get(one, durable.SMALL)) for one in names_of(manifest)
    )
    # what is sent is what was verified: others may write to the folder meanwhile
    described = next(part for part in found if part.name == folder_of.SCHEMA)
    digests = folder_of.digests(manifest, content, durable.read_small(described.path))
    digests[folder_of.SUMS] = hashlib.sha256(folder_of.sums(digests)).hexdigest()
    for part in found:
        if digests[part.name] != part.sha256:
            raise PublishError("RELEASE_CHANGED/verified", path=folder / part.name)
    name = places.require_name("release", manifest.release)
    pins.require_no_advisory(manifest.source.build)
    if manifest.source.build_assumed:
        note(remark("BUILD_ASSUMED/publish", build=manifest.source.build))
    present = destination.present(name)
    more = [] if wheel is None else [of_file(wheel)]
    for part in more:
        known = present.get(part.name)
        if known is not None and known.visible and not known.is_of(part):
            note(f"the published {part.name} is kept: the one that was built now has other bytes")
            more = []
    return plan(name, destination.where, (*found[:-1], *more, found[-1]), present)


def requirement(plan: Plan, destination: Destination) -> str | None:
    """Return the line of ``requirements.txt`` that installs the published wheel, hash included.

    None for a release without a wheel.
    """
    for part in plan.parts:
        if part.name.endswith(".whl"):
            url = destination.download_url(plan.release, part.name)
            return f"llama-space @ {url}#sha256={part.sha256}"
    return None


def names_of(manifest: Manifest) -> tuple[str, ...]:
    """Return the names of a release's files; the manifest's is the last.

    Raises:
        PublishError: the manifest points elsewhere than beside itself.
    """
    names: dict[str, None] = {}
    for artifact in manifest.artifacts:
        names |= {_beside(url, artifact.name): None for url in artifact.urls}
        if artifact.sbom is not None:
            names[_beside(artifact.sbom.url, None)] = None
    return (*names, folder_of.SCHEMA, folder_of.SUMS, folder_of.MANIFEST)


def plan(
    release: str, where: str, parts: Iterable[ReleaseFile], present: Mapping[str, Known]
) -> Plan:
    """Divide the parts into those that the place has and those to send.

    Other bytes of a publication that was cut off were never visible, so they are replaced.

    Raises:
        PublishError: ``PUBLISHED_DIFFERS``: other bytes are published under a part's name.
    """
    there, new = [], []
    for part in parts:
        known = present.get(part.name)
        if known is None or (not known.visible and not known.is_of(part)):
            new.append(part)
            continue
        if not known.is_of(part):
            differ = (
                f"sha256 {known.sha256}, not {part.sha256}"
                if known.size == part.size
                else f"{known.size} bytes, not {part.size}"
            )
            raise PublishError(
                "PUBLISHED_DIFFERS", where=where, name=part.name, release=release, differ=differ
            )
        there.append(part)
    return Plan(release, where, tuple(there), tuple(new))


def compare(part: ReleaseFile, content: Iterable[bytes]) -> None:
    """Read a published part back.

    Raises:
        PublishError: ``READ_BACK_DIFFERS``: it is not what was sent.
    """
    found = hashed(content, part.size)
    if not found.is_of(part):
        raise PublishError(
            "READ_BACK_DIFFERS",
            name=part.name,
            size=found.size,
            sha256=found.sha256,
            part_size=part.size,
            part_sha256=part.sha256,
        )


def require_digest(manifest: bytes, sha256: str, *, what: str) -> None:
    """Refuse a published manifest that is not the one that was checked.

    Raises:
        PublishError: ``RELEASE_CHANGED``.
    """
    found = hashlib.sha256(manifest).hexdigest()
    if found != sha256.lower():
        raise PublishError("RELEASE_CHANGED/manifest", what=what, found=found, sha256=sha256)


def hashed(content: Iterable[bytes], most: float = math.inf, *, visible: bool = True) -> Known:
    """Return the size and the digest of a file's blocks, up to the one that exceeds ``most``."""
    digest, size = hashlib.sha256(), 0
    for block in content:
        digest.update(block)
        size += len(block)
        if size > most:
            break
    return Known(size, digest.hexdigest(), visible)


def blocks(path: Path) -> Iterator[bytes]:
    """Read a file piece by piece."""
    with durable.open_regular(path) as stream:
        while block := stream.read(BLOCK):
            yield block


def of_file(path: Path, most: int = durable.SMALL) -> ReleaseFile:
    """Open and hash a file of at most ``most`` bytes, and describe it as a part of a release.

    The part keeps it open: what its name leads to later is never sent.

    Raises:
        PublishError: it cannot be read, is a link, or is larger: nothing of that is hashed.
    """
    try:
        stream = durable.open_regular(path, follow=False, most=most)
        opened = durable.opened(stream.fileno())
        found = hashed(blocks(opened), most)
    except OSError as error:
        why = error.strerror
        raise PublishError("RELEASE_INCOMPLETE/unreadable", path=path, strerror=why) from error
    part = ReleaseFile(path.name, opened, found.size, found.sha256)
    weakref.finalize(part, stream.close)
    return part


def _beside(url: str, name: str | None) -> str:
    """Return a relative URL that is a plain file name; refuse any other."""
    if "/" in url or ":" in url or (name is not None and url != name):
        raise PublishError("MANIFEST_POINTS_ELSEWHERE", url=url)
    return url


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Sort releases by their numbers: b9999-1, then b11549-1, then b11549-2."""

    def counted(name: str) -> str:  # a list of its numbers would take 150 times its memory
        return _COUNTED.sub(lambda number: f"{len(number[1]):03}{number[1]}", name)

    return tuple(sorted(names, key=counted))
