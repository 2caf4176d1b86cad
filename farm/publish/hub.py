"""The Hugging Face Hub: a model repository, one commit and one tag a release.

``RELEASE/…`` and ``channels/NAME/manifest.json``, as in a folder. A commit is visible as a whole.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import quote

import httpx2
import msgspec
import requests
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    constants,
    get_token,
    hf_hub_url,
    set_client_factory,
)
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined] # in its __all__
from huggingface_hub.utils._http import default_client_factory
from huggingface_hub.utils.tqdm import disable_progress_bars

from farm.errors import PublishError, UsageError
from farm.inputs import packages
from farm.publish import places, publishing
from farm.publish.places import Destination, Signed, endpoint, token
from farm.publish.publishing import Known, Plan
from farm.release import MANIFEST
from llama_loader.locations import HUB

_UNREACHED: Final = (
    httpx2.TransportError,
    requests.ConnectionError,
    requests.Timeout,
    ConnectionError,
    TimeoutError,
)


class _Api(HfApi):
    """Gives each call a deadline: the client's own is for each read, where it has one."""

    def __getattribute__(self, name: str) -> Any:
        """Return a method that raises ``ReadTimeout`` when it takes too long.

        It raises ``PLACE_UNUSABLE`` when the Hub answers what the client does not understand.
        """
        found = super().__getattribute__(name)
        if name.startswith("_") or not callable(found):
            return found
        seconds = packages.DEADLINE if name == "create_commit" else packages.ANSWER

        def whole(*words: Any, **options: Any) -> Any:
            told = found(*words, **options)
            return list(told) if isinstance(told, Iterator) else told

        def ask(*words: Any, **options: Any) -> Any:
            with understood(name):
                return packages.within(seconds, partial(whole, *words, **options))

        return ask


def api() -> HfApi:
    """Return the Hub's client, at ``HF_ENDPOINT``, with ``HF_TOKEN`` or the token of its login.

    Raises:
        UsageError: ``TOKEN_INVALID``, ``ENDPOINT_REFUSED``.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
    # else it looks for variables that the server lists, and reports which of them are set
    constants.HF_HUB_DISABLE_TELEMETRY = True
    address = endpoint("HF_ENDPOINT", HUB)  # the library reads both only once
    set_client_factory(partial(_client, httpx2.URL(address)))
    return _Api(address, token=token("HF_TOKEN"), library_name="llama-server-farm")


def _client(hub: httpx2.URL) -> httpx2.Client:
    """Return what the library sends with: the Hub names addresses, and they get no token.

    Of a large file it names where to send it, and where to say that it was sent (git LFS). Cookies,
    which nothing uses, are not kept.
    """
    client = default_client_factory()
    client.cookies.jar.set_policy(DefaultCookiePolicy(netscape=False))

    def keep_token(request: httpx2.Request) -> None:
        if (request.url.scheme, request.url.netloc) != (hub.scheme, hub.netloc):
            request.headers.pop("Authorization", None)

    client.event_hooks["request"].append(keep_token)
    return client


class Hub(Destination):
    """See ``Destination``. ``HF_TOKEN`` must be allowed to write."""

    def __init__(self, repository: str) -> None:
        self.where = f"hf:{repository}"
        self.project = self._repository = repository
        self._api = api()

    def require_there(self) -> None:
        """Ask for the repository."""
        with hub_errors(self.where):
            self._head()

    def require_writable(self) -> None:
        """Ask the Hub whose token it is: without one, or with a reader's, only reading works.

        Raises:
            UsageError: ``TOKEN_MISSING``, ``TOKEN_INVALID``.
            PublishError: the Hub does not take the token, or does not answer.
        """
        hint = (
            f"set HF_TOKEN to a token that may write to {self._repository}"
            " (https://huggingface.co/settings/tokens), or log in with `hf auth login`"
        )
        if token("HF_TOKEN") is None and get_token() is None:
            raise UsageError("TOKEN_MISSING/hub", hint=hint)
        with hub_errors(self.where, hint), understood("whoami"):
            role = self._api.whoami().get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise UsageError("TOKEN_INVALID/reads", hint=hint)

    def present(self, release: str) -> Mapping[str, Known]:
        """Return the files of a release on the main branch."""
        return self._folder(release, "main")

    def publish(self, plan: Plan, tell: Callable[[str], None]) -> None:
        """Commit, compare at that commit, tag it. The client sends no finished large file twice.

        The commit's parent is the commit that was read: another commit in between makes it fail,
        so nothing is overwritten.
        """
        with hub_errors(self.where):
            self._api.create_repo(self._repository, repo_type="model", exist_ok=True)
            head = self._head()
            there = self._folder(plan.release, head)
            plan = publishing.plan(plan.release, self.where, plan.parts, there)
            for part in plan.new:
                tell(str(part))
            commit = self._commit(
                f"Release {plan.release}",
                {f"{plan.release}/{part.name}": part.path for part in plan.new},
                head,
            )
            for part in plan.parts:
                publishing.compare(part, self._content(f"{plan.release}/{part.name}", commit))
            self._tag(plan, commit)

    def read(self, folder: str, name: str) -> Iterator[bytes]:
        """Download a file of the main branch."""
        with hub_errors(self.where):
            try:
                yield from self._content(f"{folder}/{name}", "main")
            except FileNotFoundError as error:
                raise self.not_published(folder, name) from error

    def names(self, folder: str) -> tuple[str, ...]:
        """List the files in a folder of the main branch."""
        return tuple(self._in(folder))

    def folders(self) -> tuple[str, ...]:
        """Return the folders of the main branch."""
        found = (path.rpartition("/") for path in self._files(""))
        return publishing.in_order({place for place, _, name in found if self.shows(place, name)})

    def download_url(self, folder: str, name: str) -> str:
        """Return the https URL at the release's tag."""
        path = f"{folder}/{name}"
        return hf_hub_url(self._repository, path, revision=folder, endpoint=self._api.endpoint)

    def manifest_url(self, release: str) -> str:
        """Return the manifest's URL at the release's tag."""
        return f"hf://{self._repository}@{release}/{release}/{MANIFEST}"

    def channel_url(self, channel: str) -> str:
        """Return the manifest's URL on the main branch."""
        return f"hf://{self._repository}/{self.channel_folder}{channel}/{MANIFEST}"

    def put_channel(self, channel: str, serial: int, signed: Signed) -> None:
        """Commit the manifest and its signature together."""
        place = f"{self.channel_folder}{channel}"
        with hub_errors(self.where):
            head = self._head()
            if f"{place}/{serial}.json" in self._files(place, head):
                raise self.moved(channel, serial)
            self._commit(
                f"Channel {channel}: serial {serial}",
                {
                    f"{place}/{name}.json{suffix}": data
                    for name in (str(serial), "manifest")
                    for suffix, data in (("", signed.manifest), (".minisig", signed.signature))
                },
                head,
            )

    def _head(self) -> str:
        return str(self._api.repo_info(self._repository).sha)

    def _commit(self, message: str, files: Mapping[str, Path | bytes], parent: str) -> str:
        if not files:
            return parent
        additions = [
            CommitOperationAdd(path, data if isinstance(data, bytes) else str(data))
            for path, data in files.items()
        ]
        done = self._api.create_commit(
            self._repository, additions, commit_message=message, parent_commit=parent
        )
        return str(done.oid)

    def _tag(self, plan: Plan, commit: str) -> None:
        """Tag the release, once: loaders read it by that name, so a tag never moves.

        A file that is added later is on the main branch only.
        """
        refs = self._api.list_repo_refs(self._repository)
        if all(tag.name != plan.release for tag in refs.tags):
            self._api.create_tag(self._repository, tag=plan.release, revision=commit)
        manifest = plan.parts[-1]
        path = f"{plan.release}/{manifest.name}"
        try:
            publishing.compare(manifest, self._content(path, plan.release))
        except FileNotFoundError as error:
            raise PublishError(
                "TAG_IS_ANOTHER_S", where=self.where, release=plan.release, path=path
            ) from error

    def _folder(self, release: str, revision: str) -> Mapping[str, Known]:
        def hashed(path: str, size: int) -> str:
            with hub_errors(self.where):
                return publishing.hashed(self._content(path, revision), size).sha256

        found: dict[str, Known] = {}
        for name, file in self._in(release, revision).items():
            path = f"{release}/{name}"
            digest = file.lfs.oid if file.lfs else partial(hashed, path, file.size)
            found[name] = Known(file.size, digest)
        return found

    def _in(self, folder: str, revision: str = "main") -> dict[str, File]:
        """Return the files of a folder by their names; those of folders in it are others."""
        found = self._files(folder, revision).items()
        there = {path.removeprefix(f"{folder}/"): file for path, file in found}
        return {name: file for name, file in there.items() if "/" not in name}

    def _content(self, path: str, revision: str) -> Iterator[bytes]:
        return content(self._api, self._repository, path, revision)

    def _files(self, folder: str, revision: str = "main") -> dict[str, File]:
        """Return the files below a folder by their paths; none where there is no such folder."""
        with hub_errors(self.where):
            try:
                return tree(self._api, self._repository, revision, folder=folder)
            except FileNotFoundError:
                return {}


class Large(msgspec.Struct, frozen=True, gc=False):
    """How the Hub names a large file: by its sha256."""

    oid: str


class File(msgspec.Struct, frozen=True, gc=False):
    """A file or folder of a repository, as the Hub lists it; ``oid`` is git's."""

    type: str
    path: Annotated[str, msgspec.Meta(max_length=1024)]
    oid: str
    size: int = 0
    lfs: Large | None = None


def tree(
    api: HfApi, repository: str, revision: str, *, folder: str = "", repo_type: str = "model"
) -> dict[str, File]:
    """Return the files of a repository, or of a folder of it, by their paths.

    Raises:
        FileNotFoundError: the Hub has no such repository, revision or folder.
        PublishError: ``PLACE_UNUSABLE``: the Hub answers otherwise than its API.
    """
    below = f"/{quote(folder, safe='')}" if folder else ""
    listing = f"{api.endpoint}/api/{repo_type}s/{repository}/tree/{revision}{below}?recursive=true"
    with _session(api) as web:
        found = places.listed(File, listing, web.get, f"{api.endpoint}/")
        return {one.path: one for one in found if one.type == "file"}


def content(
    api: HfApi, repository: str, path: str, revision: str, *, repo_type: str = "model"
) -> Iterator[bytes]:
    """Yield a file's bytes as the Hub has them.

    The Hub's client is not used: it writes to file names that come from the Hub's answer.

    Raises:
        FileNotFoundError: the Hub has no such repository, revision or file.
    """
    url = hf_hub_url(
        repository, path, repo_type=repo_type, revision=revision, endpoint=api.endpoint
    )
    with _session(api) as web:
        yield from packages.fetched(web, url)


@contextmanager
def _session(api: HfApi) -> Iterator[requests.Session]:
    """Yield a session that sends the token to the Hub's host alone."""
    with packages.session() as web:
        web.headers.update(build_hf_headers(token=api.token, library_name=api.library_name))
        try:
            yield web
        except requests.HTTPError as error:
            answer = error.response
            told = f"{packages.shown(answer.url)}: status {answer.status_code}"
            missing = answer.headers.get("X-Error-Code") == "RepoNotFound"
            if missing or answer.status_code == requests.codes.not_found:
                raise FileNotFoundError(told) from error
            raise requests.HTTPError(told, response=answer) from error


@contextmanager
def understood(what: str) -> Iterator[None]:
    """Turn the exceptions of the Hub's client about a malformed answer into one error."""
    try:
        yield
    except HfHubHTTPError:
        raise
    except (TypeError, LookupError, AttributeError, ValueError, RecursionError) as error:
        raise places.unusable(f"the Hub ({what})", f"{type(error).__name__}: {error}") from error


@contextmanager
def hub_errors(where: str, hint: str = "") -> Iterator[None]:
    """Turn errors of the Hub and of the network into one error.

    Raises:
        PublishError: ``HUB_REFUSED``, also for Xet; ``HUB_UNREACHABLE``: the Hub gave no answer.
    """
    try:
        yield
    except _UNREACHED as error:
        host, said = endpoint("HF_ENDPOINT", HUB), packages.cause(error)
        # hf_xet's, of a status: https://github.com/huggingface/huggingface_hub/issues/4507
        code = "HUB_REFUSED/xet" if "HTTP status " in said else "HUB_UNREACHABLE"
        raise PublishError(code, where=where, host=host, said=said) from error
    except (HfHubHTTPError, httpx2.HTTPError, OSError, RuntimeError) as error:
        # RuntimeError: the client raises it for any error in the upload of a large file
        cause = error.__cause__ if isinstance(error, RuntimeError) else None
        told = f"{error}: {cause}" if cause else f"{error}"
        said = textwrap.shorten(told, 300, placeholder=" …")
        raise PublishError("HUB_REFUSED", where=where, said=said, hint=hint) from error
