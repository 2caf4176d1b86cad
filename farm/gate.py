"""The checks that stand before a promotion, and their report, which is published with the release.

Everything is done with what will be published: tarballs are read again, and started by the loader
in a process of its own. Where there is an NVIDIA GPU, start and speed are measured, too, and may
not be worse than the last release's on the same GPU. Where there is none, the report says so.
"""

from __future__ import annotations

import hashlib
import statistics
import tempfile
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec

from farm import advisories, loader, packages, pins, release, smoke
from farm.errors import FarmError, PublishError
from farm.publish.parts import GATE
from llama_loader.errors import LoaderError
from llama_loader.manifest import LLAMA_SERVER, Sha256

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from llama_loader.manifest import Artifact, Manifest

MODEL: Final = "smollm2"
PROMPT: Final = "The capital of France is"
EXPECTED: Final = " Paris"
TOLERANCE: Final = 0.05
"""How much worse than the last release's a figure may be."""
_ROUNDS: Final = 5
_TOKENS: Final = 256


class Check(msgspec.Struct, frozen=True):
    """One check; ``passed`` is None where it could not be made on this machine."""

    name: str
    passed: bool | None
    detail: str


class Figures(msgspec.Struct, frozen=True):
    """What was measured on a GPU: medians.

    Attributes:
        gpu: its name.
        first_token: seconds from the loader's start to the first token, the release installed.
        tokens_per_second: by the server's own count.
    """

    gpu: str
    first_token: float
    tokens_per_second: float


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


def run(folder: Path, last: Report | None, tell: Callable[[Check], None]) -> Report:
    """Check a release folder, and write the report into it.

    Args:
        folder: the release.
        last: the report of the release before, to compare figures with.
        tell: told of every check as it is made.

    Raises:
        UsageError: the folder is no release.
        PublishError: the report cannot be written.
    """
    manifest = release.load(folder)
    content = (folder / release.MANIFEST).read_bytes()
    figures: list[Figures] = []
    made = []
    for check in _checks(folder, manifest, last, figures):
        tell(check)
        made.append(check)
    report = Report(
        manifest.release,
        hashlib.sha256(content).hexdigest(),
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
        tuple(made),
        figures[0] if figures else None,
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


def require_passed(content: bytes | None, manifest: bytes, *, what: str) -> None:
    """Let a release through only with a report of these very bytes in which nothing failed.

    Raises:
        PublishError: there is none, it is of other bytes, or a check failed.
    """
    hint = "invoke gate --folder DIR, then publish it again"
    if content is None:
        raise PublishError("GATE_MISSING", f"{what} has no {GATE}", hint=hint)
    report = decode(content, what=f"{GATE} of {what}")
    if report.manifest_sha256 != hashlib.sha256(manifest).hexdigest():
        raise PublishError("GATE_OF_OTHER_BYTES", f"{GATE} of {what} is of another manifest")
    if report.failed or not any(check.passed for check in report.checks):
        raise PublishError(
            "GATE_FAILED", f"{what} did not pass: {'; '.join(report.failed)}", hint=hint
        )


def compare(now: Figures, last: Figures | None) -> Check:
    """Compare what was measured with the last release. Pure."""
    name = "not slower than the last release"
    said = f"{now.first_token:.2f} s to the first token, {now.tokens_per_second:.0f} tokens/s"
    if last is None or last.gpu != now.gpu:
        return Check(name, None, f"{said} on {now.gpu}; the last release has no figures of it")
    slower = now.first_token / last.first_token - 1
    fewer = 1 - now.tokens_per_second / last.tokens_per_second
    detail = (
        f"{said}, before {last.first_token:.2f} s and {last.tokens_per_second:.0f} on {now.gpu}"
    )
    return Check(name, slower <= TOLERANCE and fewer <= TOLERANCE, detail)


def _checks(
    folder: Path, manifest: Manifest, last: Report | None, figures: list[Figures]
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
    gpu = _gpu()
    if gpu is None:
        yield Check("not slower than the last release", None, "no NVIDIA GPU here: not measured")
        return
    try:
        figures.append(_measure(folder, gpu))
    except (FarmError, LoaderError, OSError) as error:
        yield Check("not slower than the last release", passed=False, detail=str(error))
        return
    yield compare(figures[0], last.figures if last else None)


def _check(name: str, make: Callable[[], str]) -> Check:
    try:
        return Check(name, passed=True, detail=make())
    except (FarmError, LoaderError, OSError) as error:
        return Check(name, passed=False, detail=str(error))


def _no_advisory(manifest: Manifest) -> str:
    advisories.require_none(manifest.source)
    return f"b{manifest.source.build} has none of {len(advisories.load())}"


def _ask(folder: Path, artifact: Artifact) -> str:
    """Start one tarball with no GPU in sight, and let it complete a sentence."""
    model = packages.fetch_model(pins.load().model(MODEL))
    place = (folder.resolve() / artifact.name).as_uri()
    with (
        tempfile.TemporaryDirectory(prefix="llama-farm-gate-") as store,
        loader.serving(
            *("--url", place, "--sha256", artifact.sha256, "--store", store, "--allow-cpu"),
            *("--model", str(model)),
            variables={"CUDA_VISIBLE_DEVICES": ""},
        ) as served,
    ):
        said: str = loader.complete(served["url"], PROMPT, 1)["content"]
    if not said.startswith(EXPECTED):
        raise FarmError("GATE_WRONG_ANSWER", f"{PROMPT!r} was completed with {said!r}")
    return f"{PROMPT}{said}"


def _gpu() -> str | None:
    """Return the first GPU's name, as the loader sees it."""
    done = loader.run("doctor", "--json", "--offline")
    try:
        gpus = msgspec.json.decode(done.stdout.encode())["host"]["gpus"]
    except (msgspec.DecodeError, KeyError, TypeError):
        return None
    return str(gpus[0]["name"]) if gpus else None


def _measure(folder: Path, gpu: str) -> Figures:
    """Start the release that fits this GPU several times, installed before, and let it write."""
    model = packages.fetch_model(pins.load().model(MODEL))
    seconds, speeds = [], []
    with tempfile.TemporaryDirectory(prefix="llama-farm-gate-") as store:
        manifest = folder.resolve() / release.MANIFEST
        pin = hashlib.sha256(manifest.read_bytes()).hexdigest()
        options = ("--manifest", manifest.as_uri(), "--manifest-sha256", pin, "--store", store)
        loader.told("fetch", *options)
        for _ in range(_ROUNDS):
            with loader.serving(*options, "--model", str(model)) as served:
                seconds.append(sum(stage["seconds"] for stage in served["timeline"]))
                answer = loader.complete(served["url"], PROMPT, _TOKENS)
                speeds.append(float(answer["timings"]["predicted_per_second"]))
    return Figures(gpu, statistics.median(seconds), statistics.median(speeds))
