"""Fetch a release that is published, and check it before a promotion.

A release is named by a folder, a manifest's URL, or a place and its name there. The manifest bounds
each download. Downloads go to a private folder, which is removed afterwards. The digest of the
manifest that passed is the checks' result. They read the release's own tarballs again, and the
loader starts them as a process, on the CPU. ``nox -s gpu`` tests them on a GPU. Where the signing
key is, nothing is started: a program can read the files and the environments of its user.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

import msgspec
import requests

from farm import durable, loader, release
from farm.errors import FarmError, PackError, PublishError, SourceError, UsageError
from farm.inputs import packages, pins
from farm.inputs.packages import shown
from farm.publish import publishing
from farm.publish.places import Destination
from farm.release import MANIFEST, SCHEMA, SUMS, require_whole
from llama_loader import manifest as schema
from llama_loader.errors import LoaderError, without_secrets
from llama_loader.locations import is_allowed_web
from llama_loader.manifest import LLAMA_SERVER, Artifact, Manifest

Choice = Callable[[Manifest], Artifact]

MODEL: Final = "smollm2"
PROMPT: Final = "The capital of France is"
EXPECTED: Final = " Paris"
_EXPECTED_ERRORS: Final = (
    FarmError,
    LoaderError,
    OSError,  # requests' errors, too
    subprocess.SubprocessError,
    ValueError,
    KeyError,
)
"""The errors of a broken release, of a server that dies, and of its wrong answer."""
_NO_GPU: Final = {"CUDA_VISIBLE_DEVICES": ""}
_HUB: Final = re.compile(
    r"hf://(?P<repo>[^/@?#]+/[^/@?#]+)(?:@(?P<revision>[^/?#]+))?/(?P<path>[^?#]+\.json)"
)


class GateCheck(NamedTuple):
    """One check of the gate, and its result."""

    name: str
    passed: bool
    detail: str


class Report(NamedTuple):
    """All checks of one release; ``manifest_sha256`` identifies its bytes."""

    release: str
    manifest_sha256: str
    checks: tuple[GateCheck, ...]

    def require_passed(self) -> None:
        """Refuse a release that did not pass.

        Raises:
            PublishError: ``GATE_FAILED``, with the names of the checks that failed.
        """
        failed = [check.name for check in self.checks if not check.passed]
        if failed:
            raise PublishError("GATE_FAILED", release=self.release, failed="; ".join(failed))


def run(folder: Path, tell: Callable[[GateCheck], None], *, start: bool = True) -> Report:
    """Check a release folder.

    ``tell`` is told of every check as it is made. With ``start`` its programs are started, too, if
    they match the manifest.

    Raises:
        UsageError: the folder is no release.
    """
    durable.require_own_out(folder)
    content = release.content(folder)
    manifest = schema.parse(content, what=str(folder / MANIFEST))
    made = []
    for check in _checks(folder, content, manifest, start=start):
        tell(check)
        made.append(check)
    return Report(manifest.release, hashlib.sha256(content).hexdigest(), tuple(made))


def check_published(
    destination: Destination, name: str, tell: Callable[[GateCheck], None], *, start: bool = True
) -> Report:
    """Fetch a published release and check it on this machine.

    ``tell`` and ``start`` are as for ``run``.

    Raises:
        PublishError: it is not published, or is not whole.
    """
    what = f"{name} of {destination.where}"
    manifest = schema.parse(destination.small(name, MANIFEST), what=what)
    require_whole(manifest, what)
    names, present = publishing.names_of(manifest), destination.present(name)
    missing = [file for file in names if file not in present]
    if missing:
        raise PublishError("RELEASE_INCOMPLETE", what=what, missing=", ".join(missing))
    sizes = {one.name: one.size for one in manifest.artifacts}
    with tempfile.TemporaryDirectory(prefix="llama-farm-gate-") as place:
        for file in names:
            limit = sizes.get(file, durable.SMALL)
            _write(destination.read(name, file), Path(place) / file, limit, f"{file} of {what}")
        return run(Path(place), tell, start=start)


def require_gate(
    destination: Destination,
    name: str,
    tell: Callable[[GateCheck], None],
    *,
    checked: str | None = None,
) -> str:
    """Return the sha256 of a published manifest that may be signed. Nothing of it is started.

    ``tell`` is as for ``run``. ``checked`` is the sha256 of the manifest that passed the gate
    elsewhere, which `invoke gate` prints; without it the release is fetched and read here.

    Raises:
        PublishError: it is not published, is another manifest (``RELEASE_CHANGED``), or a check
            failed.
    """
    if checked is not None:
        manifest = destination.small(name, MANIFEST)
        publishing.require_digest(manifest, checked, what=f"{name} of {destination.where}")
        return checked
    report = check_published(destination, name, tell, start=False)
    report.require_passed()
    return report.manifest_sha256


def smoke(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Let the loader install each server into an empty store and compute with a tiny model.

    On the CPU, also where there is a GPU: this proves nothing about the kernels in a tarball with
    CUDA; ``nox -s gpu`` does. Gives a line for each.

    Raises:
        FarmError: ``SMOKE_FAILED``: names the tarball, and the loader's error.
    """
    durable.require_own_out(folder)
    for artifact in manifest.artifacts:
        if artifact.kind != LLAMA_SERVER:
            continue
        with tempfile.TemporaryDirectory(prefix="llama-farm-smoke-") as store:
            try:
                fetched = loader.told("fetch", *_only(folder, artifact, store), variables=_NO_GPU)
            except FarmError as error:
                raise FarmError("SMOKE_FAILED", name=artifact.name, why=error.line) from error
        trial = fetched["test_run"]
        if trial is None or trial["devices"]:
            tried = trial and trial["devices"]
            raise FarmError("SMOKE_FAILED/gpu", name=artifact.name, tried=tried)
        yield f"ok {artifact.name}: answers on the CPU in {trial['seconds']:.1f} s"


def _checks(
    folder: Path, content: bytes, manifest: Manifest, *, start: bool
) -> Iterator[GateCheck]:
    build = manifest.source.build

    def verified() -> str:
        notes: list[str] = []
        count = len(release.verify(folder, notes.append, content))
        return "; ".join((f"tarballs read: {count}", *notes))

    def without_hole() -> str:
        pins.require_no_advisory(build)
        return f"b{build} has none of {len(pins.advisories())}"

    read = _check("tarballs, SBOMs and digests are what the manifest says", verified)
    yield read
    yield _check("no known hole of llama.cpp", without_hole)
    if not start or not read.passed:
        return
    yield _check("every tarball computes on the CPU", lambda: "; ".join(smoke(folder, manifest)))
    for artifact in manifest.artifacts:
        if artifact.kind == LLAMA_SERVER:
            asked = partial(_ask, folder, artifact)
            yield _check(f"{artifact.name} answers with a real model", asked)


def _check(name: str, make: Callable[[], str]) -> GateCheck:
    try:
        return GateCheck(name, passed=True, detail=make())
    except _EXPECTED_ERRORS as error:
        told = error.line if isinstance(error, FarmError) else str(error)
        return GateCheck(name, passed=False, detail=told)


def _only(folder: Path, artifact: Artifact, store: str) -> tuple[str, ...]:
    """Return the loader's options for one tarball, pinned, in a store of its own."""
    place = (folder.resolve() / artifact.name).as_uri()
    return ("--url", place, "--sha256", artifact.sha256, "--store", store, "--allow-cpu")


def _ask(folder: Path, artifact: Artifact) -> str:
    """Start one tarball with no GPU in sight, and let it complete a sentence."""
    model = packages.fetch_model(pins.load().model(MODEL))
    with (
        tempfile.TemporaryDirectory(prefix="llama-farm-gate-") as store,
        loader.serving(
            *_only(folder, artifact, store), "--model", str(model), variables=_NO_GPU
        ) as served,
    ):
        said = msgspec.convert(loader.complete(served, PROMPT, 1)["content"], str)
    if not said.startswith(EXPECTED):
        raise FarmError("GATE_WRONG_ANSWER", prompt=PROMPT, said=said)
    return f"{PROMPT}{said}"


@contextmanager
def opened(
    named: str, *, sha256: str | None = None, wanted: Choice | None = None
) -> Iterator[tuple[Path, bytes]]:
    """Yield a folder with a release, whole or one artifact of it, and its manifest's bytes.

    Only these bytes are the pinned ones: others may write to a folder meanwhile.

    Args:
        named: a folder, the ``manifest.json`` in it, or a URL (https, file, or http on loopback)
            of either; or ``hf://OWNER/REPO[@REVISION]/PATH``, a manifest on the Hub.
        sha256: the digest that the manifest must have.
        wanted: chooses the one artifact to fetch; without it, all are fetched.

    Raises:
        UsageError: the URL is of another kind, or a local release does not exist.
        SourceError: something cannot be fetched.
        PackError: ``RELEASE_MISMATCH``: the manifest is not the pinned one, or a file is longer
            than the manifest lists.
        IntegrityError: the manifest is malformed.
    """
    address, parts = _address(named)
    if parts.scheme in {"http", "https"}:
        _require_safe(address)
        with tempfile.TemporaryDirectory(prefix="llama-farm-verify-") as name:
            folder = Path(name)
            yield folder, _fetch_release(address, folder, sha256, wanted)
        return
    if parts.scheme not in {"", "file"}:
        raise UsageError("RELEASE_URL_UNKNOWN", address=shown(address))
    path = Path(unquote(parts.path)) if parts.scheme else Path(address)
    folder = path.parent if path.name == MANIFEST else path
    content = release.content(folder)
    if sha256 is not None:
        _require_pin(content, sha256, address)
    yield folder, content


def read_manifest(url: str) -> bytes:
    """Return the bytes of the manifest at a URL: https, file, hf, or http on loopback.

    Raises:
        UsageError: it is another kind of URL.
        SourceError: it cannot be read.
    """
    address, parts = _address(url)
    if parts.scheme == "file":
        try:
            return durable.read_small(Path(unquote(parts.path)))
        except OSError as error:
            why = error.strerror
            raise SourceError("RELEASE_UNREACHABLE/file", url=url, strerror=why) from error
    _require_safe(address)
    with tempfile.TemporaryDirectory(prefix="llama-farm-read-") as name, packages.session() as web:
        _fetch(web, (address,), Path(name) / MANIFEST, schema.MAX_MANIFEST_BYTES)
        return (Path(name) / MANIFEST).read_bytes()


def _address(named: str) -> tuple[str, SplitResult]:
    """Return an address and its parts; ``hf://`` becomes the Hub's (``HF_ENDPOINT``'s) https."""
    if match := _HUB.fullmatch(named):
        from huggingface_hub import hf_hub_url  # noqa: PLC0415 - a second to import, seldom needed

        named = hf_hub_url(match["repo"], match["path"], revision=match["revision"])
    try:
        return named, urlsplit(named)
    except ValueError as error:
        raise UsageError("RELEASE_URL_UNKNOWN", address=shown(named)) from error


def _fetch_release(url: str, folder: Path, sha256: str | None, wanted: Choice | None) -> bytes:
    """Fetch and return the manifest, then everything that it names, or the wanted artifact."""
    manifest_url = url if url.endswith(".json") else f"{url.rstrip('/')}/{MANIFEST}"
    with packages.session() as web:
        _fetch(web, (manifest_url,), folder / MANIFEST, schema.MAX_MANIFEST_BYTES)
        fetched = release.content(folder)
        if sha256 is not None:
            _require_pin(fetched, sha256, manifest_url)
        manifest = schema.parse(fetched, what=manifest_url)
        require_whole(manifest, manifest_url)
        for name in (SCHEMA, SUMS):
            _fetch(web, (urljoin(manifest_url, name),), folder / name, durable.SMALL)
        for artifact in manifest.artifacts if wanted is None else (wanted(manifest),):
            urls = artifact.resolved_urls(manifest_url)
            _fetch(web, urls, folder / artifact.name, artifact.size)
            if artifact.sbom is not None:
                sbom_url = schema.resolve(manifest_url, artifact.sbom.url)
                _fetch(web, (sbom_url,), folder / artifact.sbom.url, durable.SMALL)
    return fetched


def _fetch(web: requests.Session, urls: tuple[str, ...], place: Path, limit: int) -> None:
    """Fetch the first of several URLs that answers, refusing more than ``limit`` bytes.

    All of them have the time of one.
    """
    problems: list[str] = []
    end = time.monotonic() + packages.DEADLINE
    for url in urls:
        if time.monotonic() >= end:
            problems.append(f"{len(urls) - len(problems)} more URLs: no time is left")
            break
        try:
            _require_safe(url)
            _write(packages.fetched(web, url, end), place, limit, shown(url))
        except UsageError as error:
            problems.append(error.message)
        except requests.RequestException as error:
            place.unlink(missing_ok=True)
            problems.append(without_secrets(f"{url}: {error}"))
        else:
            return
    raise SourceError("RELEASE_UNREACHABLE", name=place.name, problems="; ".join(problems))


def _write(blocks: Iterable[bytes], place: Path, limit: int, what: str) -> None:
    with place.open("xb") as out:
        for block in blocks:
            with durable.writing(place, hint="TMPDIR names a folder with more space"):
                out.write(block)
            if out.tell() > limit:
                raise PackError("RELEASE_MISMATCH/longer", what=what, limit=limit)


def _require_pin(content: bytes, sha256: str, what: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256.lower():
        raise PackError("RELEASE_MISMATCH", what=shown(what), found=found, sha256=sha256)


def _require_safe(url: str) -> None:
    """Refuse what is neither https nor http to an address of this machine, as for redirects."""
    if not is_allowed_web(url):
        code = "RELEASE_URL_UNSAFE" if ":" in url else "RELEASE_URL_UNSAFE/path"
        raise UsageError(code, url=shown(url))
