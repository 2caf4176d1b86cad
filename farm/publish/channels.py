"""Channels: a signed manifest that says which published release is the present one.

A channel's manifest is a release's, with a serial of the channel's own that only ever grows, an
expiry, and URLs that lead to the release. Every one stays beside it under its serial: who was
promoted when can be read there, and a rollback knows what was before.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Final

import msgspec

from farm import trust
from farm.errors import PublishError
from farm.inputs import advisories
from farm.publish import parts
from farm.publish.destination import Signed
from farm.release import MANIFEST
from llama_loader import manifest as schema
from llama_loader.trust import signed_for

if TYPE_CHECKING:
    from farm.publish.destination import Destination
    from farm.trust import Signer
    from llama_loader.manifest import Artifact, Manifest

DAYS: Final = 90
"""How long a promotion holds. Long enough for holidays, short enough that a channel that somebody
holds back is noticed within a season."""
_SKEW: Final = timedelta(minutes=5)
"""How far two machines' clocks may be apart."""


@dataclass(frozen=True)
class Promotion:
    """What a channel came to point at."""

    channel: str
    release: str
    before: str | None
    serial: int
    expires: datetime
    url: str


def promote(
    destination: Destination,
    release: str,
    channel: str,
    signer: Signer,
    *,
    days: int = DAYS,
    at_least: int = 1,
    project: str | None = None,
    checked: str | None = None,
    signed: Manifest | None = None,
) -> Promotion:
    """Make a published release the channel's present one.

    What is signed are the digests that were checked, that the place's files have now, and all that
    this key has signed before for a release of this name.

    Args:
        destination: where release and channel are.
        release: the release's name.
        channel: the channel's name; the first promotion makes it.
        signer: whose channel it is.
        days: until it expires.
        at_least: the lowest serial to give, where the place has lost those that it gave before.
        project: what the signature names instead of the destination's own ``OWNER/REPO``.
        checked: sha256 of the release's manifest as it was checked; None signs what is published.
        signed: what the key has signed before; None looks for it among the channel's files.

    Raises:
        PublishError: it is not published, was changed, has a known hole, the channel is another
            key's or project's, was promoted meanwhile, or this machine's clock is behind its last
            promotion.
    """
    project = project or destination.project
    published = _read(destination, release, checked)
    _require_unchanged(destination, published)
    signed = signed or _signed_before(destination, channel, release, signer, project)
    if signed is not None:
        _require_as_signed(destination, published, signed, channel)
    advisories.require_none(published.source)
    before, _ = _present(destination, channel, signer, project)
    serial, now = _next(destination, channel, before, at_least)
    pointer = point(published, serial, now, days, destination.artifact_base(release))
    return _sign(destination, channel, pointer, signer, project, before)


def renew(
    destination: Destination,
    channel: str,
    signer: Signer,
    *,
    days: int = DAYS,
    project: str | None = None,
) -> Promotion:
    """Sign what a channel says once more, with a higher serial and a later end.

    What is signed is what this key signed before: nothing is taken from the release beside it.

    Raises:
        PublishError: there is no channel, its release was changed or has a known hole, the channel
            is another key's or project's, or this machine's clock is behind.
    """
    project = project or destination.project
    present, _ = _present(destination, channel, signer, project)
    if present is None:
        raise PublishError("CHANNEL_MISSING", f"{destination.where} has no channel {channel}")
    _require_unchanged(destination, present)
    advisories.require_none(present.source)
    serial, now = _next(destination, channel, present, 1)
    pointer = msgspec.structs.replace(
        present, serial=serial, created=now, expires=now + timedelta(days=days)
    )
    return _sign(destination, channel, pointer, signer, project, present)


def due(destination: Destination, days: int, only: str | None = None) -> tuple[str, ...]:
    """Return the channels that end within so many days, or have ended.

    Args:
        destination: where they are.
        days: from now.
        only: one channel, instead of all.

    Raises:
        PublishError: the place cannot be read.
    """
    end = _now() + timedelta(days=days)
    found = []
    for name in destination.channels():
        content = destination.channel_file(name, MANIFEST)
        if content is None or only not in (None, name):
            continue
        expires = schema.parse(content, what=f"channel {name}").expires
        if expires is not None and expires <= end:
            found.append(name)
    return tuple(found)


def _next(
    destination: Destination, channel: str, before: Manifest | None, at_least: int
) -> tuple[int, datetime]:
    """Return the serial and the time of a channel's next manifest."""
    serials = destination.channel_serials(channel)
    serial = max((at_least - 1, *serials, before.serial if before else 0)) + 1
    now = _now()
    if before is not None and before.created > now + _SKEW:
        raise PublishError(
            "CLOCK_BEHIND",
            f"it is {now:%Y-%m-%d %H:%M} here, but channel {channel} was promoted at"
            f" {before.created:%Y-%m-%d %H:%M}",
            hint="set this machine's clock: the expiry is counted from it",
        )
    return serial, now


def _sign(
    destination: Destination,
    channel: str,
    pointer: Manifest,
    signer: Signer,
    project: str,
    before: Manifest | None,
) -> Promotion:
    content = schema.dump(pointer)
    schema.parse(content, what=f"channel {channel}")
    comment = signed_for(project, channel, pointer.serial, pointer.release)
    destination.put_channel(channel, pointer.serial, Signed(content, signer.sign(content, comment)))
    return Promotion(
        channel,
        pointer.release,
        before.release if before else None,
        pointer.serial,
        pointer.expires or pointer.created,
        destination.channel_url(channel),
    )


def rollback(
    destination: Destination,
    channel: str,
    signer: Signer,
    *,
    days: int = DAYS,
    project: str | None = None,
) -> Promotion:
    """Make the release current that was so before the present one, with a higher serial.

    After a rollback, the release before is the one that was rolled back.

    Raises:
        PublishError: there is no channel, nothing was promoted to it before, or its last promotion
            was cut off, so that "before" could mean two releases.
    """
    project = project or destination.project
    present, whole = _present(destination, channel, signer, project)
    if present is None:
        raise PublishError("CHANNEL_MISSING", f"{destination.where} has no channel {channel}")
    if not whole:
        raise PublishError(
            "PROMOTION_CUT_OFF",
            f"channel {channel} of {destination.where}: serial {present.serial} with"
            f" {present.release} was written by halves",
            hint=f"invoke promote {present.release} finishes it; invoke promote RELEASE makes"
            " another one current",
        )
    before = _before(destination, channel, present, signer, project)
    return promote(
        *(destination, before.release, channel, signer), days=days, project=project, signed=before
    )


def point(release: Manifest, serial: int, now: datetime, days: int, base: str) -> Manifest:
    """Return a release's manifest as a channel has it. Pure.

    Args:
        release: as it was published.
        serial: the channel's own, one more than its last.
        now: when it is promoted; stands as ``created``.
        days: until it expires.
        base: what stands before the names of files beside the release's manifest.
    """
    artifacts = tuple(
        msgspec.structs.replace(
            one,
            urls=tuple(_moved(url, base) for url in one.urls),
            sbom=one.sbom and msgspec.structs.replace(one.sbom, url=_moved(one.sbom.url, base)),
        )
        for one in release.artifacts
    )
    return msgspec.structs.replace(
        release,
        serial=serial,
        created=now,
        expires=now + timedelta(days=days),
        artifacts=artifacts,
    )


def require_own(destination: Destination, channel: str, signer: Signer) -> None:
    """Refuse a channel that another key signed, or of another project; a new one is anybody's.

    Raises:
        PublishError: it is not this key's.
    """
    _present(destination, channel, signer, destination.project)


def _present(
    destination: Destination, channel: str, signer: Signer, project: str
) -> tuple[Manifest | None, bool]:
    """Return what the channel says now, and whether it says it whole; another key's is not ours.

    A promotion that was cut off between two files leaves a manifest and a signature that do not
    belong together. The numbered pair was written before them, and says whose the channel is.
    """
    content = destination.channel_file(channel, MANIFEST)
    serials = destination.channel_serials(channel)
    if content is None and not serials:
        return None, True
    what = f"channel {channel} of {destination.where}"
    signature = destination.channel_file(channel, f"{MANIFEST}.minisig") or b""
    try:
        comment = trust.require_signed(content or b"", signature, signer.public_key, what=what)
    except PublishError:
        if not serials:
            raise
        return _numbered(destination, channel, serials[-1], signer, project), False
    require_signed_for(comment, project, channel, what=what)
    return schema.parse(content or b"", what=what), True


def require_signed_for(comment: str, project: str, channel: str, *, what: str) -> None:
    """Check which channel a signature is for; farms before this one did not name a project.

    Raises:
        PublishError: ``CHANNEL_MISMATCH``: it is another channel's or another project's.
    """
    of_another_farm = not comment.startswith("project ")
    if not of_another_farm and not comment.startswith(f"project {project} channel {channel} "):
        raise PublishError(
            "CHANNEL_MISMATCH",
            f"{what} is signed as {comment!r}, not as channel {channel} of {project}",
            hint="name the project with --project if the place was moved; otherwise the files of"
            " another channel were put there",
        )


def _numbered(
    destination: Destination, channel: str, serial: int, signer: Signer, project: str
) -> Manifest:
    """Read what was promoted under a serial; anybody may have put it there, so it is verified."""
    what = f"serial {serial} of channel {channel} of {destination.where}"
    content = destination.channel_file(channel, f"{serial}.json") or b""
    signature = destination.channel_file(channel, f"{serial}.json.minisig") or b""
    comment = trust.require_signed(content, signature, signer.public_key, what=what)
    require_signed_for(comment, project, channel, what=what)
    return schema.parse(content, what=what)


def _before(
    destination: Destination, channel: str, present: Manifest, signer: Signer, project: str
) -> Manifest:
    """Return what was current before the present release; after a rollback, that release."""
    history = [s for s in destination.channel_serials(channel) if s < present.serial]
    for serial in reversed(history):
        found = _numbered(destination, channel, serial, signer, project)
        if found.release != present.release:
            return found
    raise PublishError(
        "NOTHING_BEFORE",
        f"channel {channel} of {destination.where} has had no release but {present.release}",
        hint="invoke promote RELEASE makes another one current",
    )


def _read(destination: Destination, release: str, checked: str | None) -> Manifest:
    content = b"".join(destination.read(release, MANIFEST))
    if checked is not None:
        parts.require_digest(content, checked, what=f"{release} of {destination.where}")
    found = schema.parse(content, what=f"{release} of {destination.where}")
    if found.release != release:
        raise PublishError(
            "RELEASE_MISNAMED",
            f"{destination.where} has {found.release} under the name {release}",
        )
    return found


def _require_unchanged(destination: Destination, published: Manifest) -> None:
    """Compare the tarballs that a place has now with its manifest."""
    present = destination.present(published.release)
    for one in published.artifacts:
        known = present.get(one.name)
        if known is None or (known.size, known.sha256) != (one.size, one.sha256):
            raise _changed(destination, published.release, one.name, "its manifest lists")


def _signed_before(
    destination: Destination, channel: str, release: str, signer: Signer, project: str
) -> Manifest | None:
    """Return what this key signed last for a release; what others put there is none of it."""
    for serial in reversed(destination.channel_serials(channel)):
        try:
            signed = _numbered(destination, channel, serial, signer, project)
        except PublishError:
            continue
        if signed.release == release:
            return signed
    return None


def _require_as_signed(
    destination: Destination, published: Manifest, signed: Manifest, channel: str
) -> None:
    """Refuse a release whose manifest says more, less or other than was signed."""
    other = {*map(_substance, published.artifacts)} ^ {*map(_substance, signed.artifacts)}
    names = sorted(one.name for one in other)
    if published.source != signed.source:
        names.append(MANIFEST)
    if names:
        what = f"serial {signed.serial} of channel {channel} was signed for"
        raise _changed(destination, published.release, names[0], what)


def _substance(artifact: Artifact) -> Artifact:
    """Leave out what differs between a release's manifest and its channel's: the addresses."""
    return msgspec.structs.replace(artifact, urls=(), sbom=None)


def _changed(destination: Destination, release: str, name: str, than: str) -> PublishError:
    return PublishError(
        "RELEASE_CHANGED",
        f"{name} of {release} at {destination.where} is missing, or is not what {than}",
        hint="find out who changed it: what is published never changes. Publish a new release under"
        " another name",
    )


def _now() -> datetime:
    return datetime.now(timezone.utc).replace(microsecond=0)


def _moved(url: str, base: str) -> str:
    return url if ":" in url else base + url
