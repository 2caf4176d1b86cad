"""The checks that stand before a promotion, and their report, which is published with the release.

Everything is done with what will be published: tarballs are read again, and started by the loader
in a process of its own. Where there is an NVIDIA GPU, start and speed are measured, too, and may
not be worse than the last release's on the same GPU. Where there is none, the report says so.
"""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec

from farm import durable, loader, release, smoke
from farm.errors import FarmError, PublishError
from farm.inputs import advisories, packages, pins
from farm.publish import figures as figures_of
from farm.publish.figures import Figures
from farm.publish.parts import GATE
from llama_loader.errors import LoaderError
from llama_loader.manifest import LLAMA_SERVER, Sha256

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

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
"""What a broken release, a server that dies, or its wrong answer looks like."""
_GPU_CHECK: Final = "not slower than the last release"
_AGAIN: Final = 2
"""How often figures that are worse are measured again. On an idle H200 one release had 547 tokens/s
of a model with 135 million weights, and 412 half a minute later."""


class Check(msgspec.Struct, frozen=True):
    """One check; ``passed`` is None where it could not be made on this machine."""

    name: str
    passed: bool | None
    detail: str


class Report(msgspec.Struct, frozen=True):
    """All checks of one release; ``manifest_sha256`` says of which bytes."""

    release: str
    manifest_sha256: Sha256
    checked: str
    checks: tuple[Check, ...]
    figures: Figures | None = None

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that did not pass."""
        return tuple(check.name for check in self.checks if check.passed is False)

    def adds_to(self, published: Report | None) -> bool:
        """Say whether this has figures, or a verdict, that the published report has not.

        The moment of the check and the words of its details are no reason for one more report.
        """
        if published is None or published.manifest_sha256 != self.manifest_sha256:
            return True
        if self.figures is not None and self.figures != published.figures:
            return True
        return self.failed != published.failed


def run(folder: Path, earlier: Iterable[Figures], tell: Callable[[Check], None]) -> Report:
    """Check a release folder, and write the report into it.

    Args:
        folder: the release.
        earlier: figures of the releases before, the newest first; asked for only on a GPU.
        tell: told of every check as it is made.

    Raises:
        UsageError: the folder is no release.
        PublishError: the report cannot be written.
    """
    manifest = release.load(folder)
    content = durable.read_small(folder / release.MANIFEST)
    measured: list[Figures] = []
    made = []
    for check in _checks(folder, manifest, earlier, measured):
        tell(check)
        made.append(check)
    report = Report(
        manifest.release,
        hashlib.sha256(content).hexdigest(),
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
        tuple(made),
        measured[0] if measured else None,
    )
    try:
        (folder / GATE).write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    except OSError as error:
        raise PublishError("GATE_NOT_WRITTEN", f"{folder / GATE}: {error.strerror}") from error
    return report


def decode(content: bytes, *, what: str) -> Report:
    """Read a report.

    Raises:
        PublishError: it is none.
    """
    try:
        return msgspec.json.decode(content, type=Report)
    except msgspec.MsgspecError as error:
        raise PublishError("GATE_INVALID", f"{what}: {error}") from error


def of_these_bytes(content: bytes, manifest: bytes, *, what: str = "the folder") -> Report:
    """Read a report that must be of a manifest.

    Raises:
        PublishError: it is none, or of other bytes.
    """
    report = decode(content, what=f"{GATE} of {what}")
    if report.manifest_sha256 != hashlib.sha256(manifest).hexdigest():
        raise PublishError(
            "GATE_OF_OTHER_BYTES",
            f"{GATE} of {what} is of another manifest",
            hint="invoke gate checks what is there now",
        )
    return report


def require_passed(content: bytes, manifest: bytes, *, what: str) -> None:
    """Let a release through only with a report of these very bytes in which nothing failed.

    Raises:
        PublishError: it is of other bytes, or a check failed.
    """
    report = of_these_bytes(content, manifest, what=what)
    if report.failed or not any(check.passed for check in report.checks):
        raise PublishError(
            "GATE_FAILED",
            f"{what} did not pass: {'; '.join(report.failed) or 'nothing was checked'}",
            hint="invoke gate --to PLACE --release NAME checks it again, and adds a report",
        )


def compare(now: Figures, earlier: Iterable[Figures]) -> Check:
    """Compare what was measured with the last release that was measured on such a GPU. Pure."""
    last = figures_of.last_on(now.gpu, earlier)
    if last is None:
        return Check(_GPU_CHECK, None, f"{now} on {now.gpu}; no earlier release has figures of it")
    worse = figures_of.worse(now, last)
    which = f"{', '.join(worse)}: more than {figures_of.TOLERANCE:.0%} worse. " if worse else ""
    return Check(_GPU_CHECK, not worse, f"{which}{now} on {now.gpu}; before {last}")


def _checks(
    folder: Path, manifest: Manifest, earlier: Iterable[Figures], measured: list[Figures]
) -> Iterator[Check]:
    servers = [one for one in manifest.artifacts if one.kind == LLAMA_SERVER]
    yield _check(
        "tarballs, SBOMs and digests are what the manifest says",
        lambda: f"{len(release.verify(folder, lambda _: None))} tarballs read",
    )
    yield _check("no known hole of llama.cpp", lambda: _no_advisory(manifest))
    yield _check("every tarball computes on the CPU", lambda: "; ".join(smoke.run(folder)))
    for artifact in servers:
        asked = partial(_ask, folder, artifact)
        yield _check(f"{artifact.name} answers with a real model", asked)
    yield _on_the_gpu(folder, earlier, measured)


def _on_the_gpu(folder: Path, earlier: Iterable[Figures], measured: list[Figures]) -> Check:
    """Measure and compare; a machine without a GPU says so, one that fails has failed."""
    try:
        gpu = figures_of.gpu()
        if gpu is None:
            return Check(_GPU_CHECK, None, "no NVIDIA GPU here: not measured")
        last = figures_of.last_on(gpu, earlier)
        measured.append(_measured(folder, gpu, last))
        return compare(measured[0], [last] if last else [])
    except _EXPECTED_ERRORS as error:
        return Check(_GPU_CHECK, passed=False, detail=str(error))


def _measured(folder: Path, gpu: str, last: Figures | None) -> Figures:
    """Measure; again where it is worse than the last, and keep the better: noise only slows."""
    now = figures_of.measure(folder, _model(), gpu)
    for _ in range(_AGAIN):
        if last is None or not figures_of.worse(now, last):
            break
        now = figures_of.best(now, figures_of.measure(folder, _model(), gpu))
    return now


def _check(name: str, make: Callable[[], str]) -> Check:
    try:
        return Check(name, passed=True, detail=make())
    except _EXPECTED_ERRORS as error:
        return Check(name, passed=False, detail=str(error))


def _no_advisory(manifest: Manifest) -> str:
    advisories.require_none(manifest.source)
    return f"b{manifest.source.build} has none of {len(advisories.load())}"


def _ask(folder: Path, artifact: Artifact) -> str:
    """Start one tarball with no GPU in sight, and let it complete a sentence."""
    model = _model()
    place = (folder.resolve() / artifact.name).as_uri()
    with (
        tempfile.TemporaryDirectory(prefix="llama-farm-gate-") as store,
        loader.serving(
            *("--url", place, "--sha256", artifact.sha256, "--store", store, "--allow-cpu"),
            *("--model", str(model)),
            variables={"CUDA_VISIBLE_DEVICES": ""},
        ) as served,
    ):
        said: str = loader.complete(served, PROMPT, 1)["content"]
    if not said.startswith(EXPECTED):
        raise FarmError("GATE_WRONG_ANSWER", f"{PROMPT!r} was completed with {said!r}")
    return f"{PROMPT}{said}"


def _model() -> Path:
    return packages.fetch_model(pins.load().model(MODEL))
