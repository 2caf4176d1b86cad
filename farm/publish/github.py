"""GitHub Releases, through the REST API: one release a tag, a channel is a release of its own.

https://docs.github.com/en/rest/releases. A release is a draft until every asset was read back. A
channel is the release ``channel-NAME``: its ``manifest.json`` is replaced, everything else stays.
"""

from __future__ import annotations

import hashlib
import os
import re
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from farm.errors import PublishError
from farm.publish import github_api
from farm.publish.parts import Known
from farm.release import MANIFEST

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from farm.publish.destination import Signed
    from farm.publish.parts import Part, Plan

_SERIAL: Final = re.compile(r"([0-9]{1,16})\.json", re.ASCII)
_CHANNEL: Final = "channel-"
_NEXT: Final = ".next"
"""Behind the name of an asset that is to take another's place."""


class GitHub:
    """See ``destination.Destination``."""

    def __init__(self, repository: str) -> None:
        self.where = f"github:{repository}"
        self._repository = repository
        self._api = github_api.Api(repository)
        self._server = os.environ.get("GITHUB_SERVER_URL", "https://github.com").rstrip("/")

    def present(self, release: str) -> Mapping[str, Known]:
        """Return the uploaded assets of a release or its draft."""
        found = self._release(release)
        return {} if found is None else {a["name"]: self._known(a) for a in self._assets(found)}

    def publish(
        self,
        plan: Plan,
        check: Callable[[Part, Iterable[bytes]], None],
        tell: Callable[[str], None],
    ) -> None:
        """Draft, assets, comparison, publication."""
        release = self._release(plan.release) or self._create(plan.release, draft=True)
        for part in plan.new:
            tell(f"{part.name}: {part.size / 1e6:.1f} MB")
            self._api.upload(release, part.name, part.path)
        ids = {asset["name"]: asset for asset in self._assets(release)}
        for part in plan.parts:
            if part.name not in ids:
                raise PublishError("READ_BACK_DIFFERS", f"{self.where} did not keep {part.name}")
            with self._api.asset(ids[part.name]) as content:
                check(part, content)
        if release["draft"]:
            self._api.call("PATCH", f"/releases/{release['id']}", json={"draft": False})

    def read(self, release: str, name: str) -> Iterator[bytes]:
        """Download an asset of a published release."""
        found = self._release(release)
        if found is not None and not found["draft"]:
            for asset in self._assets(found):
                if asset["name"] == name:
                    with self._api.asset(asset) as content:
                        yield from content
                    return
        raise PublishError("NOT_PUBLISHED", f"{self.where} has no {name} of {release}")

    def manifest_url(self, release: str) -> str:
        """Return the asset's public URL."""
        return f"{self.artifact_base(release)}{MANIFEST}"

    def releases(self) -> tuple[str, ...]:
        """Return the tags of published releases with a manifest, oldest first."""
        found = [
            one["tag_name"]
            for one in self._api.pages("/releases")
            if not one["draft"]
            and not one["tag_name"].startswith(_CHANNEL)
            and any(asset["name"] == MANIFEST for asset in one["assets"])
        ]
        return tuple(reversed(found))

    def artifact_base(self, release: str) -> str:
        """Return the public URL of a release's assets."""
        return f"{self._server}/{self._repository}/releases/download/{quote(release)}/"

    def channel_url(self, channel: str) -> str:
        """Return the public URL of a channel's manifest."""
        return f"{self.artifact_base(_CHANNEL + channel)}{MANIFEST}"

    def channel_file(self, channel: str, name: str) -> bytes | None:
        """Download an asset of a channel."""
        for asset in self._channel_assets(channel):
            if asset["name"] == name:
                with self._api.asset(asset) as content:
                    return b"".join(content)
        return None

    def channel_serials(self, channel: str) -> tuple[int, ...]:
        """Return the numbers among the assets' names."""
        names = [asset["name"] for asset in self._channel_assets(channel)]
        return tuple(sorted(int(match[1]) for name in names if (match := _SERIAL.fullmatch(name))))

    def channels(self) -> tuple[str, ...]:
        """Return what follows ``channel-`` in the tags."""
        tags = (one["tag_name"] for one in self._api.pages("/releases") if not one["draft"])
        return tuple(sorted(t.removeprefix(_CHANNEL) for t in tags if t.startswith(_CHANNEL)))

    def put_channel(self, channel: str, serial: int, signed: Signed) -> None:
        """Upload everything under other names first; what is replaced is gone for two requests."""
        tag = _CHANNEL + channel
        release = self._release(tag) or self._create(tag, draft=False)
        there = {asset["name"] for asset in self._assets(release)}
        pair = {f"{MANIFEST}.minisig": signed.signature, MANIFEST: signed.manifest}
        numbered = {name.replace("manifest", str(serial)): data for name, data in pair.items()}
        for name, data in numbered.items():
            if name not in there:
                self._api.upload(release, name, data)
        for name, data in pair.items():
            self._api.upload(release, name + _NEXT, data)
        ids = {asset["name"]: asset for asset in self._assets(release)}
        for name in pair:
            if name in ids:
                self._api.call("DELETE", f"/releases/assets/{ids[name]['id']}")
            path = f"/releases/assets/{ids[name + _NEXT]['id']}"
            self._api.call("PATCH", path, json={"name": name})

    def _release(self, tag: str) -> dict[str, Any] | None:
        """Drafts are only found by listing."""
        found = (one for one in self._api.pages("/releases") if one["tag_name"] == tag)
        return next(found, None)

    def _create(self, tag: str, *, draft: bool) -> dict[str, Any]:
        body = {"tag_name": tag, "name": tag, "draft": draft, "prerelease": not draft}
        created: dict[str, Any] = self._api.call("POST", "/releases", json=body)
        return created

    def _assets(self, release: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return those that are whole: an upload that was cut off stays as ``starter``."""
        found = self._api.pages(f"/releases/{release['id']}/assets")
        return [asset for asset in found if asset["state"] == "uploaded"]

    def _channel_assets(self, channel: str) -> list[dict[str, Any]]:
        release = self._release(_CHANNEL + channel)
        return [] if release is None else self._assets(release)

    def _known(self, asset: Mapping[str, Any]) -> Known:
        """Take GitHub's own digest, else read the asset: those from before 2025-06 have none."""
        algorithm, _, told = str(asset.get("digest") or "").partition(":")
        if algorithm == "sha256":
            return Known(asset["size"], told)
        digest = hashlib.sha256()
        with self._api.asset(asset) as content:
            for block in content:
                digest.update(block)
        return Known(asset["size"], digest.hexdigest())
