"""What a place of releases has: channels, releases, their ages and sizes, who would get what."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Final

from farm import loader
from farm.errors import UsageError
from farm.release import MANIFEST
from llama_loader import manifest as schema

if TYPE_CHECKING:
    import subprocess
    from datetime import timedelta

    from farm.publish.destination import Destination

_USAGE: Final = 2
_CODE: Final = re.compile(r"^error\[(\w+)\]", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """A channel or a release.

    Attributes:
        name: of the channel, or of the release.
        release: what it points at.
        serial: of the manifest.
        age: since it was promoted, or made.
        left: until it expires; None for never.
        artifacts: how many tarballs.
        size: bytes of all of them.
        gets: what the supposed host would get; None where none was supposed.
    """

    name: str
    release: str
    serial: int
    age: timedelta
    left: timedelta | None
    artifacts: int
    size: int
    gets: str | None


@dataclass(frozen=True)
class Overview:
    """A place."""

    where: str
    channels: tuple[Row, ...]
    releases: tuple[Row, ...]


def of(destination: Destination, suppose: str | None = None) -> Overview:
    """Read every channel's and every release's manifest.

    Raises:
        PublishError: the place cannot be read.
        LoaderError: a manifest is malformed, or ``suppose`` cannot be read.
    """
    destination.require_there()
    channels = {name: destination.channel_file(name, MANIFEST) for name in destination.channels()}
    releases = {name: b"".join(destination.read(name, MANIFEST)) for name in destination.releases()}
    return Overview(
        destination.where,
        tuple(_row(name, content, suppose) for name, content in channels.items() if content),
        tuple(_row(name, content, suppose) for name, content in releases.items()),
    )


def supposed(manifest: bytes, suppose: str) -> str:
    """Say what a host in words would get of a release, and why nothing else; the loader decides.

    Raises:
        UsageError: the host cannot be read.
    """
    done = _ask(manifest, suppose)
    return done.stdout.strip() or done.stderr.strip()


def _row(name: str, content: bytes, suppose: str | None) -> Row:
    found = schema.parse(content, what=name)
    now = datetime.now(timezone.utc)
    return Row(
        name=name,
        release=found.release,
        serial=found.serial,
        age=now - found.created,
        left=None if found.expires is None else found.expires - now,
        artifacts=len(found.artifacts),
        size=sum(artifact.size for artifact in found.artifacts),
        gets=None if suppose is None else _gets(content, suppose),
    )


def _gets(manifest: bytes, suppose: str) -> str:
    """Return the artifact's name, or the error's code."""
    done = _ask(manifest, suppose, "--json")
    if done.stdout:
        name: str = json.loads(done.stdout)["choice"]["artifact"]
        return name
    code = _CODE.search(done.stderr)
    return f"nothing: {code[1]}" if code else "nothing"


def _ask(manifest: bytes, suppose: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Ask the loader, in a process of its own as on the host that is meant."""
    with tempfile.TemporaryDirectory(prefix="llama-farm-suppose-") as folder:
        place = Path(folder) / MANIFEST
        place.write_bytes(manifest)
        pin = hashlib.sha256(manifest).hexdigest()
        named = ("--manifest", place.as_uri(), "--manifest-sha256", pin)
        store = ("--store", str(Path(folder) / "store"))
        done = loader.run("doctor", "--suppose", suppose, *named, *store, *options)
    if done.returncode == _USAGE:
        raise UsageError("SUPPOSE_INVALID", done.stderr.strip().partition(": ")[2])
    return done
