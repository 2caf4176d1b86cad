"""The checks before a promotion; the digest of the manifest that passed is their result.

They read the release's own tarballs again, and the loader starts them as a process, on the CPU.
``nox -s gpu`` tests them on a GPU.
"""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from farm import durable, loader, release
from farm.errors import FarmError, PublishError
from farm.inputs import packages, pins
from farm.publish import publishing
from llama_loader import manifest as schema
from llama_loader.errors import LoaderError
from llama_loader.manifest import LLAMA_SERVER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from farm.publish.places import Destination
    from llama_loader.manifest import Artifact, Manifest

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


class Check(NamedTuple):
    """One check."""

    name: str
    passed: bool
    detail: str


class Report(NamedTuple):
    """All checks of one release; ``manifest_sha256`` identifies its bytes."""

    release: str
    manifest_sha256: str
    checks: tuple[Check, ...]

    def require_passed(self) -> None:
        """Refuse a release that did not pass.

        Raises:
            PublishError: ``GATE_FAILED``, with the names of the checks that failed.
        """
        failed = [check.name for check in self.checks if not check.passed]
        if failed:
            raise PublishError("GATE_FAILED", f"{self.release} did not pass: {'; '.join(failed)}")


def run(folder: Path, tell: Callable[[Check], None]) -> Report:
    """Check a release folder.

    Args:
        folder: the release.
        tell: told of every check as it is made.

    Raises:
        UsageError: the folder is no release.
    """
    # read once: who may write to the folder could have one manifest checked, and another one hashed
    content = release.content(folder)
    manifest = schema.parse(content, what=str(folder / release.MANIFEST))
    made = []
    for check in _checks(folder, content, manifest):
        tell(check)
        made.append(check)
    return Report(manifest.release, hashlib.sha256(content).hexdigest(), tuple(made))


def check_published(destination: Destination, name: str, tell: Callable[[Check], None]) -> Report:
    """Fetch a published release and check it on this machine.

    Args:
        destination: where it is published.
        name: the release's.
        tell: told of every check as it is made.

    Raises:
        PublishError: it is not published, or is not whole.
    """
    what = f"{name} of {destination.where}"
    manifest = schema.parse(destination.small(name, release.MANIFEST), what=what)
    names, present = publishing.names_of(manifest), destination.present(name)
    missing = [file for file in names if file not in present]
    if missing:
        raise PublishError("RELEASE_INCOMPLETE", f"{what} has no {', '.join(missing)}")
    sizes = {one.name: one.size for one in manifest.artifacts}
    with tempfile.TemporaryDirectory(prefix="llama-farm-gate-") as place:
        for file in names:
            with (Path(place) / file).open("wb") as out:
                for block in destination.read(name, file):
                    out.write(block)
                    if out.tell() > sizes.get(file, durable.SMALL):
                        longer = f"{file} of {what} is longer than its manifest says"
                        raise PublishError("RELEASE_CHANGED", longer)
        return run(Path(place), tell)


def require_gate(
    destination: Destination,
    name: str,
    tell: Callable[[Check], None],
    *,
    checked: str | None = None,
) -> str:
    """Return the sha256 of a published manifest that passed the gate.

    Args:
        destination: where it is published.
        name: the release's.
        tell: told of every check as it is made.
        checked: sha256 of the manifest that passed the gate elsewhere, which `invoke gate` prints;
            without it the release is fetched and checked here.

    Raises:
        PublishError: it is not published, is another manifest (``RELEASE_CHANGED``), or a check
            failed.
    """
    if checked is not None:
        manifest = destination.small(name, release.MANIFEST)
        publishing.require_digest(manifest, checked, what=f"{name} of {destination.where}")
        return checked
    report = check_published(destination, name, tell)
    report.require_passed()
    return report.manifest_sha256


def smoke(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Let the loader install each server into an empty store and compute with a tiny model.

    On the CPU, also where there is a GPU: this proves nothing about the kernels in a tarball with
    CUDA; ``nox -s gpu`` does. Gives a line for each.

    Raises:
        FarmError: ``SMOKE_FAILED``: names the tarball, and what the loader said.
    """
    for artifact in manifest.artifacts:
        if artifact.kind != LLAMA_SERVER:
            continue
        with tempfile.TemporaryDirectory(prefix="llama-farm-smoke-") as store:
            try:
                fetched = loader.told("fetch", *_only(folder, artifact, store), variables=_NO_GPU)
            except FarmError as error:
                raise FarmError("SMOKE_FAILED", f"{artifact.name}: {error.message}") from error
        trial = fetched["test_run"]
        if trial is None or trial["devices"]:
            tried = trial and trial["devices"]
            raise FarmError("SMOKE_FAILED", f"{artifact.name}: was not tried on the CPU: {tried}")
        yield f"ok {artifact.name}: answers on the CPU in {trial['seconds']:.1f} s"


def _checks(folder: Path, content: bytes, manifest: Manifest) -> Iterator[Check]:
    servers = [one for one in manifest.artifacts if one.kind == LLAMA_SERVER]
    yield _check(
        "tarballs, SBOMs and digests are what the manifest says",
        lambda: f"{len(release.verify(folder, lambda _: None, content))} tarballs read",
    )
    yield _check("no known hole of llama.cpp", lambda: _no_advisory(manifest))
    yield _check("every tarball computes on the CPU", lambda: "; ".join(smoke(folder, manifest)))
    for artifact in servers:
        asked = partial(_ask, folder, artifact)
        yield _check(f"{artifact.name} answers with a real model", asked)


def _check(name: str, make: Callable[[], str]) -> Check:
    try:
        return Check(name, passed=True, detail=make())
    except _EXPECTED_ERRORS as error:
        return Check(name, passed=False, detail=str(error))


def _no_advisory(manifest: Manifest) -> str:
    pins.require_no_advisory(manifest.source.build)
    return f"b{manifest.source.build} has none of {len(pins.advisories())}"


def _only(folder: Path, artifact: Artifact, store: str) -> tuple[str, ...]:
    """Return the loader's options for one tarball, pinned, in a store of its own."""
    place = (folder.resolve() / artifact.name).as_uri()
    return ("--url", place, "--sha256", artifact.sha256, "--store", store, "--allow-cpu")


def _ask(folder: Path, artifact: Artifact) -> str:
    """Start one tarball with no GPU in sight, and let it complete a sentence."""
    model = _model()
    with (
        tempfile.TemporaryDirectory(prefix="llama-farm-gate-") as store,
        loader.serving(
            *_only(folder, artifact, store), "--model", str(model), variables=_NO_GPU
        ) as served,
    ):
        said: str = loader.complete(served, PROMPT, 1)["content"]
    if not said.startswith(EXPECTED):
        raise FarmError("GATE_WRONG_ANSWER", f"{PROMPT!r} was completed with {said!r}")
    return f"{PROMPT}{said}"


def _model() -> Path:
    return packages.fetch_model(pins.load().model(MODEL))
