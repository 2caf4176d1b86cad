"""Write ``spaces/release.json``: which release a Space trusts (docs/trust.md)."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import unquote, urlsplit

from farm import PROJECT_ROOT, durable, elf, loader, targets, trust
from farm.errors import FarmError, InspectError, PublishError, UsageError
from farm.inputs.packages import shown
from farm.pack import Inventory, is_elf
from farm.publish import channels, gate
from farm.publish.places import Destination, Signed
from farm.release import MANIFEST
from farm.tarball.archive import Chunking, Digests
from llama_loader import manifest as schema
from llama_loader.manifest import Artifact

FILE: Final = PROJECT_ROOT / "spaces" / "release.json"
BESIDE: Final[dict[str, tuple[str, ...]]] = {
    "--manifest": (),
    "--release": ("--to",),
    "--channel": ("--to", "--public-key", "--project"),
    "--url": ("--suppose", "--allow-cpu"),
}
"""The options that each way to name what is pinned takes beside it."""
_CHANNEL: Final = re.compile(r"/(?:channels/|channel-)([^/]+)/[^/]+\Z")
_URL: Final = "YAKULINGO_SPACES_LLAMA_CPP_URL"
_SHA256: Final = "YAKULINGO_SPACES_LLAMA_CPP_SHA256"
_CHUNK: Final = 8 << 20
"""Bytes; the most that a manifest may say."""
_CUDART: Final = re.compile(r"libcudart\.so\.([0-9]+)")


class CheckedPin(NamedTuple):
    """The content of ``release.json``, and the manifest that it names now."""

    content: dict[str, Any]
    manifest: schema.Manifest


def url(manifest_url: str) -> CheckedPin:
    """Pin the manifest at a URL: https, hf, file, or http on loopback.

    Raises:
        UsageError: it is another kind of URL; ``PIN_IS_CHANNEL``: the next promotion would change
            what is pinned.
        SourceError: it cannot be read.
        IntegrityError: it is no manifest.
    """
    pin = _pin(manifest_url, gate.read_manifest(manifest_url), what=manifest_url)
    if pin.manifest.expires is not None:  # a release's does not expire
        named = _CHANNEL.search(urlsplit(manifest_url).path)
        name = unquote(named[1]) if named else "NAME"
        raise UsageError("PIN_IS_CHANNEL", url=shown(manifest_url), name=name)
    return pin


def release(destination: Destination, name: str) -> CheckedPin:
    """Pin a published release; ``NOT_PUBLISHED`` if there is none."""
    content = destination.small(name, MANIFEST)
    return _pin(destination.manifest_url(name), content, what=f"{name} of {destination.where}")


def channel(
    destination: Destination, name: str, public_key: str, project: str | None = None
) -> CheckedPin:
    """Return the pin of a channel, beginning with its current serial.

    ``project`` is the one that it must be signed for; None for the destination's own.

    Raises:
        PublishError: there is no such channel, it is not signed by that key, or not for this
            channel of this project; ``CHANNEL_NOT_NEWEST``: it is older than one that was promoted.
    """
    content = destination.channel_file(name, MANIFEST)
    what = f"channel {name} of {destination.where}"
    if content is None:
        raise channels.missing(destination, name)
    signature = destination.channel_file(name, f"{MANIFEST}.minisig") or b""
    project = project or destination.project
    comment = trust.require_signed(content, signature, public_key, what=what)
    channels.require_signed_for(comment, project, name, what=what)
    manifest = schema.parse(content, what=what)
    channels.require_newest(destination, name, Signed(content, signature), manifest.serial)
    pinned = {
        "manifest_url": destination.channel_url(name),
        "public_key": public_key,
        "project": project,
        "channel": name,
        "min_serial": manifest.serial,
    }
    return CheckedPin(pinned, manifest)


@dataclass(frozen=True)
class Archive:
    """An archive of llama.cpp, its digest, and the loader's verdict for each supposed host.

    Attributes:
        answers: each host's facts, the loader's text, and whether that host can run it.
    """

    url: str
    sha256: str
    size: int
    artifact: Artifact
    answers: tuple[tuple[str, str, bool], ...]

    def variables(self) -> dict[str, str]:
        """Return the Space's variables that pin it.

        Raises:
            PublishError: ``ARCHIVE_CANNOT_RUN``: no supposed host can run it.
        """
        if not any(can_run for _, _, can_run in self.answers):
            raise PublishError("ARCHIVE_CANNOT_RUN", url=self.url)
        return {_URL: self.url, _SHA256: self.sha256}


def archive(url: str, hosts: Iterable[str], options: tuple[str, ...] = ()) -> Archive:
    """Download an archive as a Space would, and read from its binaries which hosts can run it.

    Nothing of it is executed. ``hosts`` are facts, as the loader's ``--suppose`` takes them;
    ``options`` are the loader's, beside the facts.

    Raises:
        FarmError: it cannot be downloaded, or it is no archive of llama.cpp for Linux.
        UsageError: a host's facts cannot be read.
        IntegrityError: the loader does not read the manifest that this writes: a defect.
    """
    with tempfile.TemporaryDirectory(prefix="llama-farm-archive-") as store:
        fetched = ("--url", url, "--store", store, "--no-test-run")
        try:
            told = loader.told("fetch", *fetched, patience=None)
        except FarmError as error:
            if error.code == "DISK_FULL":  # the loader's hint is about its own store
                error.hint = "free some space, or name a folder with more room in TMPDIR"
            raise
        found: list[elf.Inspection] = []
        for path in (one for one in Path(store).rglob("*") if one.is_file() and is_elf(one)):
            found.append(elf.inspect(path))
            elf.require_few(found, url)
    sizes = {stage["name"]: stage["size"] for stage in told["timeline"]}
    listed = _listed(url, told["sha256"], sizes["fetch"], tuple(found))
    source = schema.Source(
        project="llama.cpp", version=None, build=0, commit=None, origin=url[:1024], sha256=None
    )
    manifest = schema.Manifest(
        schema_version=schema.SCHEMA_VERSION,
        release="archive",
        serial=1,
        created=datetime.now(timezone.utc),
        expires=None,
        source=source,
        artifacts=(listed,),
    )
    written = schema.dump(manifest)
    schema.parse(written, what="the manifest that the farm wrote of the archive")
    answers = []
    for host in hosts:
        done = loader.suppose(written, host, *options)
        said = (done.stdout if done.returncode == 0 else done.stderr).strip()
        answers.append((host, said, done.returncode == 0))
    return Archive(url, told["sha256"], sizes["fetch"], listed, tuple(answers))


def _listed(url: str, sha256: str, size: int, found: tuple[elf.Inspection, ...]) -> Artifact:
    """Describe the archive as a manifest would, so that the loader's own rules can judge it."""
    name = Path(urlsplit(url).path).name
    inventory = Inventory(
        name=name,
        format="tar.zst",  # of a kind that the loader reads: it reads what archives come in, too
        digests=Digests(size, sha256, (sha256,) * -(-size // _CHUNK)),
        files=(schema.FileEntry(path=name, size=0, sha256=sha256, executable=True),),
        inspections=found,
        build_json=b"",
        chunking=Chunking(_CHUNK),
    )
    merged = elf.merge(found)
    cuda = None
    if merged.sass or merged.ptx:
        # the major version is in the name of the cudart that it needs; one that is linked in
        # leaves no name: then no minimum driver is known
        needed = {name for one in found for name in one.needs}
        major = max((m[1] for name in needed if (m := _CUDART.fullmatch(name))), default="0")
        row = targets.load().cuda.get(major)
        driver = row.min_driver if row else "0.0"
        cuda = schema.Cuda(
            toolkit=f"{major}.0", min_driver=driver, sass=merged.sass, ptx=merged.ptx
        )
    try:
        return inventory.entry(cuda)
    except InspectError as error:
        raise PublishError("ARCHIVE_NOT_LINUX", url=url) from error


def write(pin: dict[str, Any], file: Path = FILE) -> None:
    """Write ``release.json`` atomically: at every moment it is the old one or the new one.

    Raises:
        PublishError: it cannot be written.
    """
    try:
        durable.replace(file, f"{json.dumps(pin, indent=2)}\n".encode(), 0o644)
    except OSError as error:
        raise PublishError("PIN_NOT_WRITTEN", file=file, strerror=error.strerror) from error


def manifest_url() -> str:
    """Return the URL of the manifest that ``release.json`` names.

    Raises:
        UsageError: ``PIN_INVALID``: it names none.
    """
    try:
        return str(json.loads(FILE.read_bytes())["manifest_url"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError("PIN_INVALID", file=FILE) from error


def _pin(manifest_url: str, content: bytes, *, what: str) -> CheckedPin:
    pinned = {"manifest_url": manifest_url, "manifest_sha256": hashlib.sha256(content).hexdigest()}
    return CheckedPin(pinned, schema.parse(content, what=what))
