"""GitHub Releases, through the REST API: one release a tag, a channel is a release of its own.

https://docs.github.com/en/rest/releases. A release is a draft until every asset was read back. A
channel is the release ``channel-NAME``: its ``manifest.json`` is replaced, everything else stays.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from farm.errors import PublishError
from farm.publish import github_api, parts
from farm.publish.destination import SIGNATURE, Destination
from farm.publish.parts import Known
from farm.release import MANIFEST

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from farm.publish.destination import Signed
    from farm.publish.parts import Part, Plan

_NEXT: Final = ".next"
"""Behind the name of an asset that is to take another's place."""


class GitHub(Destination):
    """See ``Destination``."""

    channel_folder = "channel-"

    def __init__(self, repository: str) -> None:
        self.where = f"github:{repository}"
        self.project = self._repository = repository
        self._api = github_api.Api(repository)
        ours = os.environ.get("GITHUB_REPOSITORY") == repository
        self._commit = os.environ.get("GITHUB_SHA") if ours else None  # what a workflow checked out
        self._server = os.environ.get("GITHUB_SERVER_URL", "https://github.com").rstrip("/")

    def require_there(self) -> None:
        """Ask for the repository."""
        self._api.call("GET", "")

    def require_writable(self) -> None:
        """Ask whether a workflow can store its attestations; the token has been asked for.

        Raises:
            PublishError: ``ATTESTATION_UNAVAILABLE``: the repository is private, which needs a plan
                that no request tells; ``FARM_ATTEST_PRIVATE=1`` says that the owner has it.
        """
        private = self._api.call("GET", "").get("private", False)
        attests = os.environ.get("GITHUB_ACTIONS") == "true"  # release.yml does, after the build
        if private and attests and os.environ.get("FARM_ATTEST_PRIVATE") != "1":
            raise PublishError(
                "ATTESTATION_UNAVAILABLE",
                f"{self.where} is private: GitHub attests for private repositories with "
                "Enterprise Cloud only",
                hint="set the repository variable FARM_ATTEST_PRIVATE to 1 if yours has it",
            )

    def present(self, release: str) -> Mapping[str, Known]:
        """Return the uploaded assets of a release or its draft."""
        found = self._release(release)
        return {} if found is None else self._present(found)

    def publish(
        self,
        plan: Plan,
        check: Callable[[Part, Iterable[bytes]], None],
        tell: Callable[[str], None],
    ) -> None:
        """Draft, assets, comparison, publication."""
        release = self._release(plan.release) or self._create(plan.release, draft=True)
        # another publisher may have begun, or finished, since the plan was made
        plan = parts.plan(plan.release, self.where, plan.parts, self._present(release))
        replaced = {part.name for part in plan.new} if release["draft"] else set()
        for asset in self._assets(release):
            if asset["name"] in replaced:  # of a publication that was cut off: never visible
                self._api.call("DELETE", f"/releases/assets/{asset['id']}")
        for part in plan.new:
            tell(str(part))
            self._api.upload(release, part.name, part.path)
        ids = {asset["name"]: asset for asset in self._assets(release)}
        for part in plan.parts:
            if part.name not in ids:
                raise PublishError("READ_BACK_DIFFERS", f"{self.where} did not keep {part.name}")
            with self._api.asset(ids[part.name]) as content:
                check(part, content)
        if release["draft"]:
            self._api.call("PATCH", f"/releases/{release['id']}", json={"draft": False})

    def read(self, folder: str, name: str) -> Iterator[bytes]:
        """Download an asset of a published release."""
        for asset in self._published(folder):
            if asset["name"] == name:
                with self._api.asset(asset) as content:
                    yield from content
                return
        raise self.not_published(folder, name)

    def names(self, folder: str) -> tuple[str, ...]:
        """List the assets of a published release."""
        return tuple(asset["name"] for asset in self._published(folder))

    def releases(self) -> tuple[str, ...]:
        """Return the tags of published releases with a manifest, oldest first."""
        found = [
            one["tag_name"]
            for one in self._api.pages("/releases")
            if not one["draft"]
            and not one["tag_name"].startswith(self.channel_folder)
            and any(asset["name"] == MANIFEST for asset in one["assets"])
        ]
        return tuple(reversed(found))

    def channels(self) -> tuple[str, ...]:
        """Return what follows ``channel-`` in the tags."""
        tags = (one["tag_name"] for one in self._api.pages("/releases") if not one["draft"])
        start = self.channel_folder
        return tuple(sorted(tag.removeprefix(start) for tag in tags if tag.startswith(start)))

    def download_url(self, folder: str, name: str) -> str:
        """Return the public URL of an asset."""
        return f"{self.artifact_base(folder)}{name}"

    def artifact_base(self, release: str) -> str:
        """Return the public URL of a release's assets: a channel's own lie elsewhere."""
        return f"{self._server}/{self._repository}/releases/download/{quote(release)}/"

    def put_channel(self, channel: str, serial: int, signed: Signed) -> None:
        """Upload everything under other names first; what is replaced is gone for two requests."""
        tag = self.channel_folder + channel
        release = self._release(tag) or self._create(tag, draft=False)
        there = {asset["name"]: asset for asset in self._assets(release)}
        if f"{serial}.json" in there:
            raise self.moved(channel, serial)
        stale = there.get(f"{serial}.json.minisig")
        if stale is not None:  # of a promotion that was cut off before its manifest
            self._api.call("DELETE", f"/releases/assets/{stale['id']}")
        pair = {SIGNATURE: signed.signature, MANIFEST: signed.manifest}
        for name, data in pair.items():
            self._api.upload(release, name.replace("manifest", str(serial)), data)
        for name, data in pair.items():
            self._api.upload(release, name + _NEXT, data)
        ids = {asset["name"]: asset for asset in self._assets(release)}
        for name in pair:
            if name in ids:
                self._api.call("DELETE", f"/releases/assets/{ids[name]['id']}")
            path = f"/releases/assets/{ids[name + _NEXT]['id']}"
            self._api.call("PATCH", path, json={"name": name})

    def _present(self, release: Mapping[str, Any]) -> dict[str, Known]:
        visible = not release["draft"]
        return {one["name"]: self._known(one, visible=visible) for one in self._assets(release)}

    def _release(self, tag: str) -> dict[str, Any] | None:
        """Return the published release of a tag, else its oldest draft.

        Drafts are only found by listing, and there may be several of one tag.
        """
        found = [one for one in self._api.pages("/releases") if one["tag_name"] == tag]
        return min(found, key=lambda one: (one["draft"], one["id"]), default=None)

    def _create(self, tag: str, *, draft: bool) -> dict[str, Any]:
        """Make a release; use the existing one if the answer was lost or another was faster.

        A second draft of a tag is no error to GitHub, so it is looked for, and ours taken back.
        """
        body = {"tag_name": tag, "name": tag, "draft": draft, "prerelease": not draft}
        if self._commit is not None:  # without it GitHub tags the default branch of that moment
            body["target_commitish"] = self._commit
        made = self._api.create("/releases", body, lambda: self._release(tag))
        first = self._release(tag) or made
        if first["id"] != made["id"] and made["draft"]:
            self._api.call("DELETE", f"/releases/{made['id']}")
        return first

    def _assets(self, release: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return those that are whole: an upload that was cut off stays as ``starter``."""
        found = self._api.pages(f"/releases/{release['id']}/assets")
        return [asset for asset in found if asset["state"] == "uploaded"]

    def _published(self, tag: str) -> list[dict[str, Any]]:
        """Return the whole assets of a published release; none where there is no such release."""
        release = self._release(tag)
        return [] if release is None or release["draft"] else self._assets(release)

    def _known(self, asset: Mapping[str, Any], *, visible: bool) -> Known:
        """Take GitHub's own digest, else read the asset: those from before 2025-06 have none."""
        algorithm, _, told = str(asset.get("digest") or "").partition(":")
        if algorithm == "sha256":
            return Known(asset["size"], told, visible)
        with self._api.asset(asset) as content:
            return parts.hashed(content, visible=visible)
