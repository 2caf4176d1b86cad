"""Channels: a signed manifest names the current one of the published releases.

A channel's manifest is a release's, with the channel's own serial, which only grows, an expiry, and
URLs that lead to the release. The place keeps every one under its serial. They are the history of
promotions, and tell a rollback the previous release.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Final

import msgspec

from farm import trust
from farm.errors import PublishError
from farm.inputs import pins
from farm.publish import publishing
from farm.publish.places import Signed
from farm.release import MANIFEST
from llama_loader import manifest as schema
from llama_loader.trust import signed_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from farm.publish.places import Destination
    from farm.trust import Signer
    from llama_loader.manifest import Artifact, Manifest

DAYS: Final = 90
"""How long a promotion is valid: long enough for holidays, and short enough that Spaces notice
within a season if a mirror withholds newer promotions."""
_OTHER_KEY: Final = "SIGNED_BY_ANOTHER_KEY"
_SKEW: Final = timedelta(minutes=5)
"""How far the clocks of two machines may differ."""


@dataclass(frozen=True)
class Promotion:
    """The result of a promotion."""

    channel: str
    release: str
    before: str | None
    serial: int
    expires: datetime
    url: str


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
        self,
        release: str,
        *,
        days: int = DAYS,
        at_least: int = 1,
        checked: str | None = None,
        signed: Manifest | None = None,
    ) -> Promotion:
        """Make a published release the current one of the channel.

        The digests that are signed must be those that were checked, those of the place's files now,
        and those that this key signed before for a release of this name.

        Args:
            release: the release's name.
            days: until it expires.
            at_least: the lowest serial to give, if the place has lost the earlier ones.
            checked: sha256 of the manifest that was checked; None signs the published one.
            signed: what the key signed before; None reads it from the channel's files.

        Raises:
            PublishError: it is not published, was changed, has a known vulnerability, the channel
                is another key's or project's, was promoted meanwhile, or this machine's clock is
                behind its last promotion.
        """
        published = _read(self.place, release, checked)
        _require_unchanged(self.place, published)
        signed = signed or self.signed_before(release)
        if signed is not None:
            self.require_as_signed(published, signed)
        addressed = _with_addresses(published, self.place.artifact_base(release))
        return self.sign(addressed, self.present(), days, at_least)

    def renew(self, *, days: int = DAYS) -> Promotion:
        """Sign the channel's manifest again, with a higher serial and a later end.

        Its content is what this key signed before: nothing is taken from the release beside it.

        Raises:
            PublishError: there is no channel, its newest promotion is not the current one, its
                release was changed or has a known vulnerability, the channel is another key's or
                project's, or this machine's clock is behind.
        """
        present = self.newest()
        _require_unchanged(self.place, present)
        return self.sign(present, present, days)

    def rollback(self, *, days: int = DAYS) -> Promotion:
        """Make the previous release current again, with a higher serial.

        After a rollback, the previous release is the one that was rolled back.

        Raises:
            PublishError: there is no channel, nothing was promoted to it before, a promotion is
                missing from its history, or its newest promotion is not the current one.
        """
        before = self.before(self.newest())
        return self.promote(before.release, days=days, signed=before)

    @property
    def project(self) -> str:
        """The project that its signatures name."""
        return self.named or self.place.project

    @property
    def what(self) -> str:
        """The channel in an error's sentence."""
        return f"channel {self.name} of {self.place.where}"

    def present(self) -> Manifest | None:
        """Return the current promotion; None for a new channel.

        A promotion that was cut off between two files leaves a manifest and a signature that do
        not belong together. The numbered pair was written before them, and tells whose the channel
        is.
        """
        serials = self.place.channel_serials(self.name)
        if not serials and self.place.channel_file(self.name, MANIFEST) is None:
            return None
        try:
            return self._signed("manifest", self.what)
        except PublishError as error:
            if not serials or error.code != _OTHER_KEY:
                raise
            return self.numbered(serials[-1])

    def newest(self) -> Manifest:
        """Return the current promotion of a channel, which must be its newest, too.

        Whoever may write to the place can put an older signed pair back, without the key.

        Raises:
            PublishError: ``CHANNEL_MISSING``; ``CHANNEL_NOT_NEWEST``: it is older than one that was
                promoted, or was cut off between its two files.
        """
        found, serials = self.present(), self.place.channel_serials(self.name)
        if found is None or not serials:
            raise PublishError("CHANNEL_MISSING", f"{self.place.where} has no channel {self.name}")
        newest = serials[-1]
        if found.serial != newest or self._pair("manifest") != self._pair(str(newest)):
            raise PublishError(
                "CHANNEL_NOT_NEWEST",
                f"{self.what} names {found.release} (serial {found.serial}), which is not its"
                f" promotion to serial {newest}",
                hint="that one was cut off, or older files were put back: find out which, then"
                " invoke promote RELEASE",
            )
        return found

    def numbered(self, serial: int) -> Manifest:
        """Read and verify the promotion of a serial: other people can write to the place."""
        what = f"serial {serial} of {self.what}"
        found = self._signed(str(serial), what)
        if found.serial != serial:
            raise PublishError(
                "CHANNEL_MISMATCH",
                f"{what} is the promotion to serial {found.serial}",
                hint="other files were put there; invoke promote RELEASE names the release",
            )
        return found

    def _signed(self, name: str, what: str) -> Manifest:
        content, signature = self._pair(name)
        comment = trust.require_signed(content, signature, self.signer.public_key, what=what)
        require_signed_for(comment, self.project, self.name, what=what)
        return schema.parse(content, what=what)

    def _pair(self, name: str) -> Signed:
        files = (f"{name}.json", f"{name}.json.minisig")
        return Signed(*(self.place.channel_file(self.name, file) or b"" for file in files))

    def before(self, present: Manifest) -> Manifest:
        """Return the release before the current one; after a rollback, the rolled-back release."""
        history = [s for s in self.place.channel_serials(self.name) if s < present.serial]
        for serial in range(present.serial - 1, min(history, default=present.serial) - 1, -1):
            found = self.numbered(serial)
            if found.release != present.release:
                return found
        raise PublishError(
            "NOTHING_BEFORE",
            f"{self.what} has had no release but {present.release}",
            hint="invoke promote RELEASE makes another one current",
        )

    def signed_before(self, release: str) -> Manifest | None:
        """Return what this key signed last for a release; files of other keys do not count."""
        for serial in reversed(self.place.channel_serials(self.name)):
            try:
                signed = self.numbered(serial)
            except PublishError:
                continue
            if signed.release == release:
                return signed
        return None

    def require_as_signed(self, published: Manifest, signed: Manifest) -> None:
        """Refuse a release whose manifest differs from the signed one in more than addresses."""
        other = {*map(_substance, published.artifacts)} ^ {*map(_substance, signed.artifacts)}
        names = sorted(one.name for one in other)
        if published.source != signed.source:
            names.append(MANIFEST)
        if names:
            what = f"serial {signed.serial} of channel {self.name} was signed for"
            raise _changed(self.place, published.release, names[0], what)

    def sign(
        self, manifest: Manifest, before: Manifest | None, days: int, at_least: int = 1
    ) -> Promotion:
        """Sign a manifest under the channel's next serial, and make it the current one."""
        pins.require_no_advisory(manifest.source.build)
        now = _now()
        if before is not None and before.created > now + _SKEW:
            raise PublishError(
                "CLOCK_BEHIND",
                f"it is {now:%Y-%m-%d %H:%M} here, but channel {self.name} was promoted at"
                f" {before.created:%Y-%m-%d %H:%M}",
                hint="set this machine's clock: the expiry is counted from it",
            )
        serials = self.place.channel_serials(self.name)
        serial = max((at_least - 1, *serials, before.serial if before else 0)) + 1
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


def due(destination: Destination, days: int, only: str | None = None) -> dict[str, Manifest]:
    """Return the channels that end within so many days, or have ended, with what they name.

    Args:
        destination: where they are.
        days: from now.
        only: one channel, instead of all.

    Raises:
        PublishError: the place cannot be read.
    """
    end = _now() + timedelta(days=days)
    found = {}
    for name in destination.channels():
        content = destination.channel_file(name, MANIFEST)
        if content is None or only not in (None, name):
            continue
        named = schema.parse(content, what=f"channel {name}")
        if named.expires is not None and named.expires <= end:
            found[name] = named
    return found


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


def _with_addresses(release: Manifest, base: str) -> Manifest:
    """Return a release's manifest for a channel, with URLs below ``base``."""
    artifacts = (
        _addressed(one, lambda url: url if ":" in url else base + url) for one in release.artifacts
    )
    return msgspec.structs.replace(release, artifacts=tuple(artifacts))


def _addressed(artifact: Artifact, address: Callable[[str], str]) -> Artifact:
    """Return an artifact with other URLs, also of its SBOM."""
    sbom = artifact.sbom and msgspec.structs.replace(artifact.sbom, url=address(artifact.sbom.url))
    return msgspec.structs.replace(artifact, urls=tuple(map(address, artifact.urls)), sbom=sbom)


def _read(destination: Destination, release: str, checked: str | None) -> Manifest:
    content = destination.small(release, MANIFEST)
    if checked is not None:
        publishing.require_digest(content, checked, what=f"{release} of {destination.where}")
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


def _substance(artifact: Artifact) -> Artifact:
    """Return an artifact without the URLs' folders, in which a release and its channel differ."""
    return _addressed(artifact, lambda url: url.rpartition("/")[2])


def _changed(destination: Destination, release: str, name: str, than: str) -> PublishError:
    return PublishError(
        "RELEASE_CHANGED",
        f"{name} of {release} at {destination.where} is missing, or is not what {than}",
        hint="find out who changed it: what is published never changes. Publish a new release under"
        " another name",
    )


def _now() -> datetime:
    return datetime.now(timezone.utc).replace(microsecond=0)
