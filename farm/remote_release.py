"""A release named by a folder, a manifest or a URL → a folder that ``farm.release`` can read.

The manifest bounds each download. Downloads go to a private folder, which is removed when the
context is left. They are read and never executed.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urljoin, urlsplit

import requests

from farm import durable
from farm.errors import PackError, SourceError, UsageError
from farm.inputs import packages
from farm.inputs.packages import shown
from farm.release import MANIFEST, SCHEMA, SUMS, content, require_whole
from llama_loader import manifest as schema
from llama_loader.locations import is_allowed_web

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from llama_loader.manifest import Artifact, Manifest

    Choice = Callable[[Manifest], Artifact]

_HUB: Final = re.compile(
    r"hf://(?P<repo>[^/@?#]+/[^/@?#]+)(?:@(?P<revision>[^/?#]+))?/(?P<path>[^?#]+\.json)"
)


@contextmanager
def opened(
    release: str, *, sha256: str | None = None, wanted: Choice | None = None
) -> Iterator[Path]:
    """Yield a folder with a release, whole or one artifact of it.

    Args:
        release: a folder, the ``manifest.json`` in it, or a URL (https, file, or http on loopback)
            of either; or ``hf://OWNER/REPO[@REVISION]/PATH``, a manifest on the Hub.
        sha256: the digest that the manifest must have.
        wanted: chooses the one artifact to fetch; without it, all are fetched.

    Raises:
        UsageError: the URL is of another kind, or a local release does not exist.
        SourceError: something cannot be fetched.
        PackError: ``RELEASE_MISMATCH``: the manifest is not the pinned one, or a file is longer
            than the manifest says.
        IntegrityError: the manifest is malformed.
    """
    release = _hub_address(release)
    parts = urlsplit(release)
    if parts.scheme in {"http", "https"}:
        _require_safe(release)
        with tempfile.TemporaryDirectory(prefix="llama-farm-verify-") as name:
            folder = Path(name)
            _fetch_release(release, folder, sha256, wanted)
            yield folder
        return
    if parts.scheme not in {"", "file"}:
        raise UsageError(
            "RELEASE_URL_UNKNOWN",
            f"{release}: neither a folder nor a URL of a manifest",
            hint="it is https://…, file:///…, or hf://OWNER/REPO[@REVISION]/PATH",
        )
    path = Path(unquote(parts.path)) if parts.scheme else Path(release)
    folder = path.parent if path.name == MANIFEST else path
    if sha256 is not None:
        _require_pin(content(folder), sha256, release)
    yield folder


def read_manifest(url: str) -> bytes:
    """Return the bytes of the manifest at a URL: https, file, hf, or http on loopback.

    Raises:
        UsageError: it is another kind of URL.
        SourceError: it cannot be read.
    """
    address = _hub_address(url)
    parts = urlsplit(address)
    if parts.scheme == "file":
        try:
            return durable.read_small(Path(unquote(parts.path)))
        except OSError as error:
            raise SourceError("RELEASE_UNREACHABLE", f"{url}: {error.strerror}") from error
    _require_safe(address)
    with tempfile.TemporaryDirectory(prefix="llama-farm-read-") as name, packages.session() as web:
        _fetch(web, (address,), Path(name) / MANIFEST, schema.MAX_MANIFEST_BYTES)
        return (Path(name) / MANIFEST).read_bytes()


def _hub_address(release: str) -> str:
    """Turn ``hf://`` into the Hub's https address (``HF_ENDPOINT`` names another Hub)."""
    match = _HUB.fullmatch(release)
    if match is None:
        return release
    from huggingface_hub import hf_hub_url  # noqa: PLC0415 - a second to import, and seldom needed

    return hf_hub_url(match["repo"], match["path"], revision=match["revision"])


def _fetch_release(url: str, folder: Path, sha256: str | None, wanted: Choice | None) -> None:
    """Fetch the manifest first, then everything that it names, or the wanted artifact."""
    manifest_url = url if url.endswith(".json") else f"{url.rstrip('/')}/{MANIFEST}"
    with packages.session() as web:
        _fetch(web, (manifest_url,), folder / MANIFEST, schema.MAX_MANIFEST_BYTES)
        fetched = content(folder)
        if sha256 is not None:
            _require_pin(fetched, sha256, manifest_url)
        manifest = schema.parse(fetched, what=manifest_url)
        require_whole(manifest, manifest_url)
        for name in (SCHEMA, SUMS):
            _fetch(web, (urljoin(manifest_url, name),), folder / name, durable.SMALL)
        for artifact in manifest.artifacts if wanted is None else (wanted(manifest),):
            _fetch_artifact(web, artifact, manifest_url, folder)


def _fetch_artifact(
    web: requests.Session, artifact: Artifact, manifest_url: str, folder: Path
) -> None:
    urls = artifact.resolved_urls(manifest_url)
    _fetch(web, urls, folder / artifact.name, artifact.size)
    if artifact.sbom is None:
        return
    sbom_url = schema.resolve(manifest_url, artifact.sbom.url)
    name = Path(urlsplit(sbom_url).path).name
    _fetch(web, (sbom_url,), folder / name, durable.SMALL)


def _fetch(web: requests.Session, urls: tuple[str, ...], place: Path, limit: int) -> None:
    """Fetch the first of several URLs that answers, refusing more than ``limit`` bytes."""
    problems: list[str] = []
    for url in urls:
        try:
            _require_safe(url)
            _copy(web, url, place, limit)
        except UsageError as error:
            problems.append(error.message)
        except requests.RequestException as error:
            problems.append(f"{shown(url)}: {error}")
        else:
            return
    raise SourceError(
        "RELEASE_UNREACHABLE",
        f"{place.name} cannot be fetched: {'; '.join(problems)}",
        hint="is the URL right, and does this machine reach it without a token?",
    )


def _copy(web: requests.Session, url: str, place: Path, limit: int) -> None:
    copied = 0
    with place.open("wb") as out:
        for piece in packages.fetched(web, url):
            copied += len(piece)
            if copied > limit:
                raise PackError("RELEASE_MISMATCH", f"{shown(url)}: is longer than {limit} bytes")
            out.write(piece)


def _require_pin(content: bytes, sha256: str, what: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256.lower():
        raise PackError("RELEASE_MISMATCH", f"{shown(what)}: is {found}, not the pinned {sha256}")


def _require_safe(url: str) -> None:
    """Refuse a URL that is neither https nor http to an address of this machine, not a name.

    ``packages`` does so for redirects.
    """
    if not is_allowed_web(url):
        path = not urlsplit(url).scheme
        needed = "https is needed, or http on loopback"
        raise UsageError(
            "RELEASE_URL_UNSAFE",
            f"{shown(url)}: {'a path is no URL' if path else needed}",
            hint="invoke publish prints the URL of a published release, and invoke serve-release"
            " one for this machine: http://127.0.0.1:PORT/manifest.json",
        )
