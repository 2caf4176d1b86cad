"""Channels: a signed manifest names the current one of the published releases.

A channel's manifest is a release's, with the channel's own serial, which only grows, an expiry, and
URLs that lead to the release. The place keeps every one under its serial. They are the history of
promotions, and tell a rollback the previous release.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from itertools import chain
from typing import Final, NamedTuple

import msgspec

from farm import trust
from farm.errors import FarmError, PublishError
from farm.inputs import pins
from farm.options import Promoting
from farm.publish import places, publishing
from farm.publish.places import Destination, Signed, require_name
from farm.release import MANIFEST
from farm.trust import Signer
from llama_loader import manifest as schema
from llama_loader.errors import LoaderError
from llama_loader.manifest import Artifact, Manifest
from llama_loader.trust import signed_for

DAYS: Final = 90
"""How long a promotion is valid: long enough for holidays, and short enough that Spaces notice
within a season if a mirror withholds newer promotions."""
_NOT_OURS: Final = frozenset({"SIGNED_BY_ANOTHER_KEY", "SIGNATURE_DAMAGED"})
_SKEW: Final = timedelta(minutes=5)
"""How far the clocks of two machines may differ."""
_ELSEWHERE: Final = 20
"""Promotions of each other channel with which a release is compared."""


@dataclass(frozen=True)
class Promotion:
    """The result of a promotion."""

    channel: str
    release: str
    before: str | None
    serial: int
    expires: datetime
    url: str
    others: tuple[str, ...] = ()  # the place's other channels, where this one is new


@dataclass(frozen=True)
class Channel:
    """A channel of one place, with the key and the project that it must be signed by and for.

    Attributes:
        place: where channel and releases are.
        name: the first promotion makes it.
        signer: whose channel it is.
        named: the project in the signature, instead of the place's own ``OWNER/REPO``.
    """

    place: Destination
    name: str
    signer: Signer
    named: str | None = None

    def promote(
        self, release: str, *, days: int = DAYS, at_least: int = 1, checked: str | None = None
    ) -> Promotion:
        """Make a published release the current one of the channel, for ``days``.

        The digests that are signed must be those that were checked, those of the place's files now,
        and those that this key signed before for a release of this name, in any channel here.
        ``checked`` is the sha256 of the manifest that was checked; None signs the published one.
        ``at_least`` is the lowest serial to give, if the place has lost earlier ones; without it
        none may be missing between those that the place keeps.

        Raises:
            PublishError: it is not published, was changed, has a known vulnerability, the channel
                is another key's or project's, was promoted meanwhile, a promotion that the place
                keeps was changed or lost, or this machine's clock is behind the last one.
        """
        present = self.present()
        kept = list(self.kept(present, lost=at_least > 1, older=True))
        before = chain(kept, self._elsewhere())
        signed = next((one for one in before if one.release == release), None)
        known = (one.serial for one in (*kept, present) if one is not None)
        others = () if present else self.place.other_channels(self.name)
        last = max(at_least - 1, *known, 0)
        done = self._promote(release, present, signed, last, days, checked)
        return replace(done, others=others)

    def renew(self, *, days: int = DAYS, checked: str | None = None) -> Promotion:
        """Sign the channel's manifest again, with a higher serial and a later end.

        Its content is what this key signed before: nothing is taken from the release beside it.
        ``checked`` is the digest of the pair that ``due`` found.

        Raises:
            PublishError: there is no channel, it is not the checked one, its newest promotion is
                not the current one, its release was changed or has a known vulnerability, the
                channel is another key's or project's or was signed by an older farm, or this
                machine's clock is behind.
        """
        present = self.newest(checked)
        _require_unchanged(self.place, present)
        return self._sign(present, present, present.serial, days)

    def rollback(self, *, days: int = DAYS) -> Promotion:
        """Make the previous release current again, with a higher serial.

        After a rollback, the previous release is the one that was rolled back.

        Raises:
            PublishError: there is no channel, nothing was promoted to it before, a promotion is
                missing from its history, or its newest promotion is not the current one.
        """
        newest = self.newest()
        before = next((one for one in self.kept(newest) if one.release != newest.release), None)
        if before is None:
            raise PublishError("NOTHING_BEFORE", what=self.what, release=newest.release)
        return self._promote(before.release, newest, before, newest.serial, days)

    @property
    def project(self) -> str:
        """The project that its signatures name."""
        return self.named or self.place.project

    @property
    def what(self) -> str:
        """The channel in an error's sentence."""
        return f"channel {self.name} of {self.place.where}"

    def present(self, *, older: bool = True) -> Manifest | None:
        """Return the current promotion; None for a new channel.

        Its signature may be an ``older`` farm's, which names no project: only a new promotion may
        begin from that.

        A promotion that was cut off between two files leaves a manifest and a signature that do
        not belong together. The numbered pair was written before them, and shows whose the channel
        is.
        """
        serials = self.place.channel_serials(self.name)
        if not serials and self.place.channel_file(self.name, MANIFEST) is None:
            return None
        try:
            return self._signed("manifest", self.what, older=older)
        except PublishError as error:
            if not serials or error.code not in _NOT_OURS:
                raise
            return self.numbered(serials[-1], older=older)

    def newest(self, checked: str | None = None) -> Manifest:
        """Return the current promotion of a channel, which must be its newest, too.

        An account that may write to the place can put an older signed pair back, without the key.

        Raises:
            PublishError: ``CHANNEL_MISSING``; ``CHANNEL_NOT_APPROVED``: it is another one than was
                ``checked``; ``CHANNEL_NOT_SIGNED_FOR``: an older farm signed it;
                ``CHANNEL_NOT_NEWEST``: it is older than one that was promoted, or was cut off
                between its two files.
        """
        found, serials = self.present(older=False), self.place.channel_serials(self.name)
        if found is None or not serials:
            raise missing(self.place, self.name)
        pair = _pair(self.place, self.name, "manifest")
        require_newest(self.place, self.name, pair, found.serial)
        if checked is not None and pair.sha256 != checked:
            raise not_approved(self.place, self.name, pair.sha256)
        if schema.parse(pair.manifest, what=self.what) != found:
            raise _not_newest(self.place, self.name, found.serial)
        return found

    def numbered(self, serial: int, *, older: bool = False) -> Manifest:
        """Read and verify the promotion of a serial: other people can write to the place."""
        what = f"serial {serial} of {self.what}"
        found = self._signed(str(serial), what, older=older)
        if found.serial != serial:
            raise PublishError("CHANNEL_MISMATCH/serial", what=what, serial=found.serial)
        return found

    def _signed(self, name: str, what: str, *, older: bool) -> Manifest:
        content, signature = _pair(self.place, self.name, name)
        comment = trust.require_signed(content, signature, self.signer.public_key, what=what)
        require_signed_for(comment, self.project, self.name, what=what, older=older)
        return schema.parse(content, what=what)

    def kept(
        self, present: Manifest | None, *, lost: bool = False, older: bool = False
    ) -> Iterator[Manifest]:
        """Yield the channel's promotions, the newest first, each of them verified.

        An account that may write to the place can damage or remove what the key signed for a
        release, so that its files are compared with nothing, or add a file with a later number.
        So all up to the ``present`` one must be there, unless the place may have ``lost`` some of
        them. ``older``: an older farm may have signed them.

        Raises:
            PublishError: one is not this channel's, or is missing.
        """
        serials: Sequence[int] = self.place.channel_serials(self.name)
        if present is not None and not lost:
            ends = {*serials, present.serial}
            serials = range(min(ends), max(ends) + 1)
        for serial in reversed(serials):
            try:
                found = self.numbered(serial, older=older)
            except PublishError as error:
                if error.code in {*_NOT_OURS, "CHANNEL_MISMATCH"}:
                    error.hint = (
                        f"{serial}.json or its signature was changed, lost or put there: put back"
                        " what was there, or remove it. If a promotion is lost, invoke promote"
                        " RELEASE --serial N begins above those that the Spaces have seen"
                    )
                raise
            yield found

    def _elsewhere(self) -> Iterator[Manifest]:
        """Yield the newest that this key signed for the place's other channels.

        A channel that is damaged, or signed by another key, is skipped: it stops no promotion here.
        """
        for name in self.place.other_channels(self.name):
            other = replace(self, name=name)
            for serial in self.place.channel_serials(name)[-_ELSEWHERE:]:
                with suppress(FarmError, LoaderError):
                    yield other.numbered(serial, older=True)

    def require_as_signed(self, published: Manifest, signed: Manifest) -> None:
        """Refuse a release whose manifest differs from the signed one in more than addresses."""
        other = {*map(_substance, published.artifacts)} ^ {*map(_substance, signed.artifacts)}
        names = sorted(one.name for one in other)
        if published.source != signed.source:
            names.append(MANIFEST)
        if names:
            than = f"this key signed before (serial {signed.serial})"
            raise _changed(self.place, published.release, names[0], than)

    def _promote(
        self,
        release: str,
        present: Manifest | None,
        signed: Manifest | None,
        last: int,
        days: int,
        checked: str | None = None,
    ) -> Promotion:
        """Sign a published release that is what was checked, and what was signed before."""
        where = self.place.where
        content = self.place.small(release, MANIFEST)
        if checked is not None:
            publishing.require_digest(content, checked, what=f"{release} of {where}")
        published = schema.parse(content, what=f"{release} of {where}")
        if published.release != release:
            named = published.release
            raise PublishError("RELEASE_MISNAMED", where=where, found=named, release=release)
        publishing.names_of(published)
        if signed is not None:  # first, because it hashes no file of the place
            self.require_as_signed(published, signed)
        _require_unchanged(self.place, published)
        base = self.place.artifact_base(release)
        artifacts = tuple(_addressed(one, lambda name: base + name) for one in published.artifacts)
        addressed = msgspec.structs.replace(published, artifacts=artifacts)
        return self._sign(addressed, present, last, days)

    def _sign(self, manifest: Manifest, before: Manifest | None, last: int, days: int) -> Promotion:
        """Sign a manifest under the serial after the last one, and make it the current one."""
        pins.require_no_advisory(manifest.source.build)
        now = _now()
        if before is not None and before.created > now + _SKEW:
            raise PublishError("CLOCK_BEHIND", now=now, name=self.name, created=before.created)
        serial = last + 1
        expires = now + timedelta(days=days)
        pointer = msgspec.structs.replace(manifest, serial=serial, created=now, expires=expires)
        content = schema.dump(pointer)
        schema.parse(content, what=self.what)
        comment = signed_for(self.project, self.name, serial, pointer.release)
        signed = Signed(content, self.signer.sign(content, comment))
        self.place.put_channel(self.name, serial, signed)
        was = before.release if before else None
        url = self.place.channel_url(self.name)
        return Promotion(self.name, pointer.release, was, serial, expires, url)


def of(asked: Promoting) -> Channel:
    """Return the channel that a verb's options name.

    Raises:
        UsageError: no place, channel or key was given, or one cannot be read.
    """
    place = places.parse(asked.to)
    name, signer = places.require_given("channel", asked.channel, place), trust.signer(asked.key)
    return Channel(place, name, signer, places.project(asked.project))


class Due(NamedTuple):
    """What a channel that ends soon names, and the digest of its manifest and signature."""

    release: str
    serial: int
    sha256: str


def due(
    destination: Destination, days: int, only: str | None = None
) -> tuple[dict[str, Due], list[FarmError]]:
    """Return the channels that end within so many days, or have ended, with what they name.

    Beside them: an error for each channel that cannot be read, or whose current pair is not its
    newest one, whenever they end: no key is at hand, and a changed pair may name any end. It keeps
    no other channel from being renewed.

    ``only`` is one channel, instead of all; ``days`` count from now.

    Raises:
        FarmError: the place cannot be read, or has no such channel.
    """
    destination.require_there()
    names = destination.channels()
    if only is not None and only not in names:
        raise missing(destination, only)
    end = _now() + timedelta(days=days)
    found: dict[str, Due] = {}
    errors: list[FarmError] = []
    for name in names if only is None else (only,):
        pair, failed = state(destination, name)
        if failed is not None:
            errors.append(failed)
            continue
        named = schema.parse(pair.manifest, what=f"channel {name}")
        if named.expires is not None and named.expires <= end:
            found[name] = Due(named.release, named.serial, pair.sha256)
    return found, errors


def not_approved(destination: Destination, name: str, found: str) -> PublishError:
    """Return the error of a channel that a person did not see before it is signed."""
    return PublishError("CHANNEL_NOT_APPROVED", name=name, where=destination.where, found=found)


def missing(destination: Destination, name: str) -> PublishError:
    """Return the error of a channel that is not there, with the names of those that are."""
    names: tuple[str, ...] = ()
    with suppress(FarmError):  # the place itself may be missing
        names = destination.other_channels(name)
    hint = f"there is {', '.join(names)}" if names else "invoke promote makes one"
    return PublishError("CHANNEL_MISSING", hint=hint, where=destination.where, name=name)


def state(destination: Destination, name: str) -> tuple[Signed, FarmError | None]:
    """Return a channel's pair, empty if none can be read, and why it cannot be renewed; no key."""
    found, failed = Signed(b"", b""), None
    try:
        require_name("channel", name)
        newest = destination.channel_serials(name)[-1:]
        pair = _pair(destination, name, "manifest")
        if [pair] != [_pair(destination, name, str(serial)) for serial in newest]:
            failed = _not_newest(destination, name, *newest)
        schema.parse(pair.manifest, what=f"channel {name}")
        found = pair
    except (FarmError, LoaderError, OSError) as error:
        told = f"channel {name!r} of {destination.where} cannot be renewed: {error}"
        hint = "repair it or remove it"
        failed = failed or PublishError("CHANNEL_UNREADABLE", told, hint=hint)
    return found, failed


def _pair(destination: Destination, channel: str, name: str) -> Signed:
    files = (f"{name}.json", f"{name}.json.minisig")
    return Signed(*(destination.channel_file(channel, file) or b"" for file in files))


def require_newest(destination: Destination, channel: str, current: Signed, serial: int) -> None:
    """Compare a channel's current pair with the newest that the place keeps, if it keeps any.

    Raises:
        PublishError: ``CHANNEL_NOT_NEWEST``: an older one was put back, or a promotion was cut off.
    """
    for newest in destination.channel_serials(channel)[-1:]:
        if serial != newest or current != _pair(destination, channel, str(newest)):
            raise _not_newest(destination, channel, newest)


def _not_newest(destination: Destination, channel: str, newest: int = 1) -> PublishError:
    return PublishError(
        "CHANNEL_NOT_NEWEST", channel=channel, where=destination.where, newest=newest
    )


def require_signed_for(
    comment: str, project: str, channel: str, *, what: str, older: bool = False
) -> None:
    """Check which channel a signature is for; an ``older`` farm's names no project.

    Raises:
        PublishError: ``CHANNEL_NOT_SIGNED_FOR``: it is an older farm's; ``CHANNEL_MISMATCH``: it is
            another channel's or another project's.
    """
    if not comment.startswith("project ") and not older:
        raise PublishError("CHANNEL_NOT_SIGNED_FOR", what=what)
    if not comment.startswith((f"project {project} channel {channel} ", f"channel {channel} ")):
        raise PublishError(
            "CHANNEL_MISMATCH", what=what, comment=comment, channel=channel, project=project
        )


def _addressed(artifact: Artifact, address: Callable[[str], str]) -> Artifact:
    """Return an artifact with other URLs, also of its SBOM."""
    sbom = artifact.sbom and msgspec.structs.replace(artifact.sbom, url=address(artifact.sbom.url))
    return msgspec.structs.replace(artifact, urls=tuple(map(address, artifact.urls)), sbom=sbom)


def _require_unchanged(destination: Destination, published: Manifest) -> None:
    """Compare the tarballs that a place has now with its manifest."""
    present = destination.present(published.release)
    for one in published.artifacts:
        known = present.get(one.name)
        if known is None or not known.is_of(one):
            raise _changed(destination, published.release, one.name, "its manifest lists")


def _substance(artifact: Artifact) -> Artifact:
    """Return an artifact without the URLs' folders, in which a release and its channel differ."""
    return _addressed(artifact, lambda url: url.rpartition("/")[2])


def _changed(destination: Destination, release: str, name: str, than: str) -> PublishError:
    where = destination.where
    return PublishError("RELEASE_CHANGED", name=name, release=release, where=where, than=than)


def _now() -> datetime:
    return datetime.now(timezone.utc).replace(microsecond=0)
