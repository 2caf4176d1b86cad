"""The checks that stand before a promotion, and their report, which is published with the release.

Everything is done with what will be published: tarballs are read again, and started by the loader
in a process of its own. Where there is an NVIDIA GPU, start and speed are measured and kept in the
report; they decide nothing, because no release is built where a GPU is.
"""

from __future__ import annotations

import hashlib
import statistics
import subprocess
import tempfile
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from msgspec import Meta

from farm import durable, loader, release
from farm.errors import FarmError, PublishError
from farm.inputs import advisories, packages, pins
from farm.publish import parts
from farm.publish.parts import GATE
from llama_loader import manifest as schema
from llama_loader.errors import LoaderError
from llama_loader.manifest import LLAMA_SERVER, Sha256

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from farm.publish.destination import Destination
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
_NO_GPU: Final = {"CUDA_VISIBLE_DEVICES": ""}
_ROUNDS: Final = 5
_PROMPT_TOKENS: Final = 512
_TOKENS: Final = 128
_FIRST_TOKEN: Final = 1000
"""Any id that every model has; the prompt is not text, so that its length is known."""

Positive = Annotated[float, Meta(gt=0)]


class Figures(msgspec.Struct, frozen=True):
    """Medians of what was measured on a GPU.

    The two speeds are those that ``llama-bench`` calls pp512 and tg128, by the server's own count:
    what is released is the server, and not the benchmark.

    Attributes:
        gpu: its name.
        first_token: seconds from the loader's start to the first token, the release installed and
            the driver's cache of compiled code empty.
        prompt_tokens_per_second: of a prompt of 512 tokens.
        tokens_per_second: of an answer of 128 tokens.
    """

    gpu: str
    first_token: Positive
    prompt_tokens_per_second: Positive
    tokens_per_second: Positive

    def __str__(self) -> str:
        """Return one line for people."""
        return (
            f"{self.gpu}: {self.first_token:.2f} s to the first token,"
            f" {self.prompt_tokens_per_second:.0f} tokens/s read,"
            f" {self.tokens_per_second:.0f} tokens/s written"
        )


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


def run(folder: Path, tell: Callable[[Check], None]) -> Report:
    """Check a release folder, and write the report into it.

    Args:
        folder: the release.
        tell: told of every check as it is made.

    Raises:
        UsageError: the folder is no release.
        PublishError: the report cannot be written.
    """
    manifest = release.load(folder)
    content = durable.read_small(folder / release.MANIFEST)
    measured: list[Figures] = []
    made = []
    for check in _checks(folder, manifest, measured):
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
    manifest = destination.small(name, release.MANIFEST)
    names = parts.names_of(schema.parse(manifest, what=what))
    present = destination.present(name)
    missing = [file for file in names if file not in present]
    if missing:
        raise PublishError("RELEASE_INCOMPLETE", f"{what} has no {', '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="llama-farm-gate-") as place:
        for file in names:
            with (Path(place) / file).open("wb") as out:
                out.writelines(destination.read(name, file))
        return run(Path(place), tell)


def require_gate(
    destination: Destination,
    name: str,
    tell: Callable[[Check], None],
    *,
    checked: str | None = None,
) -> str:
    """Return the sha256 of a published manifest that passed the gate.

    A report lies unsigned where the release lies, so it counts only for a manifest whose digest the
    caller names. Without a digest, or without a report, the release is fetched and checked here.

    Args:
        destination: where it is published.
        name: the release's.
        tell: told of every check as it is made.
        checked: sha256 of the manifest that passed the gate elsewhere (``invoke gate`` prints it).

    Raises:
        PublishError: it is not published, is another manifest (``RELEASE_CHANGED``), or a check
            failed.
    """
    what = f"{name} of {destination.where}"
    if checked is not None:
        manifest = destination.small(name, release.MANIFEST)
        parts.require_digest(manifest, checked, what=what)
        if GATE in destination.present(name):
            require_passed(destination.small(name, GATE), manifest, what=what)
            return checked
    report = check_published(destination, name, tell)
    if report.failed:
        raise PublishError("GATE_FAILED", f"{what} did not pass: {'; '.join(report.failed)}")
    return report.manifest_sha256


def of_these_bytes(content: bytes, manifest: bytes, *, what: str) -> Report:
    """Read a report that must be of a manifest.

    Raises:
        PublishError: ``GATE_INVALID``: it is none; ``GATE_OF_OTHER_BYTES``.
    """
    try:
        report = msgspec.json.decode(content, type=Report)
    except msgspec.MsgspecError as error:
        raise PublishError("GATE_INVALID", f"{GATE} of {what}: {error}") from error
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
            hint="invoke promote without --sha256 checks it again, here",
        )


def smoke(folder: Path) -> Iterator[str]:
    """Let the loader install each server into an empty store and compute with a tiny model.

    On the CPU, also where there is a GPU: this proves nothing about the kernels in a tarball with
    CUDA; ``nox -s gpu`` does. Gives a line for each.

    Raises:
        UsageError: the folder is no release.
        FarmError: ``SMOKE_FAILED``: names the tarball, and what the loader said.
    """
    for artifact in release.load(folder).artifacts:
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


def _checks(folder: Path, manifest: Manifest, measured: list[Figures]) -> Iterator[Check]:
    servers = [one for one in manifest.artifacts if one.kind == LLAMA_SERVER]
    yield _check(
        "tarballs, SBOMs and digests are what the manifest says",
        lambda: f"{len(release.verify(folder, lambda _: None))} tarballs read",
    )
    yield _check("no known hole of llama.cpp", lambda: _no_advisory(manifest))
    yield _check("every tarball computes on the CPU", lambda: "; ".join(smoke(folder)))
    for artifact in servers:
        asked = partial(_ask, folder, artifact)
        yield _check(f"{artifact.name} answers with a real model", asked)
    name = "start and speed on a GPU"
    found = _check(name, partial(_measured, folder, measured))
    yield found if measured or not found.passed else Check(name, None, found.detail)


def _check(name: str, make: Callable[[], str]) -> Check:
    try:
        return Check(name, passed=True, detail=make())
    except _EXPECTED_ERRORS as error:
        return Check(name, passed=False, detail=str(error))


def _no_advisory(manifest: Manifest) -> str:
    advisories.require_none(manifest.source)
    return f"b{manifest.source.build} has none of {len(advisories.load())}"


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


def _measured(folder: Path, measured: list[Figures]) -> str:
    """Measure where the loader sees a GPU; the figures go into ``measured``."""
    name = gpu()
    if name is None:
        return "no NVIDIA GPU here: not measured"
    measured.append(measure(folder, _model(), name))
    return str(measured[0])


def gpu() -> str | None:
    """Return the first GPU's name, as the loader sees it; None where it sees none.

    Raises:
        FarmError: ``LOADER_FAILED``: it could not say.
    """
    done = loader.run("doctor", "--json", "--offline")
    try:
        gpus = msgspec.json.decode(done.stdout.encode())["host"]["gpus"]
        return str(gpus[0]["name"]) if gpus else None
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        said = done.stderr.strip() or "said nothing of the host"
        raise FarmError("LOADER_FAILED", f"llama_loader doctor: {said}") from error


def measure(folder: Path, model: Path, gpu: str, *, rounds: int = _ROUNDS) -> Figures:
    """Start the release that fits this machine several times, installed before, and let it work.

    Args:
        folder: the release.
        model: a GGUF file.
        gpu: what the figures are said to be of.
        rounds: how often; an odd number has a middle.

    Raises:
        FarmError: it does not start.
    """
    prompt = [_FIRST_TOKEN + number for number in range(_PROMPT_TOKENS)]
    seconds, read, written = [], [], []
    with tempfile.TemporaryDirectory(prefix="llama-farm-gate-") as place:
        manifest = folder.resolve() / release.MANIFEST
        pin = durable.sha256(manifest)
        store = str(Path(place) / "store")
        options = ("--manifest", manifest.as_uri(), "--manifest-sha256", pin, "--store", store)
        loader.told("fetch", *options)
        for number in range(rounds):
            cold = {"CUDA_CACHE_PATH": str(Path(place) / f"compiled-{number}")}
            with loader.serving(*options, "--model", str(model), variables=cold) as served:
                seconds.append(sum(stage["seconds"] for stage in served["timeline"]))
                timings = loader.complete(served, prompt, _TOKENS)["timings"]
            read.append(float(timings["prompt_per_second"]))
            written.append(float(timings["predicted_per_second"]))
    return Figures(
        gpu, statistics.median(seconds), statistics.median(read), statistics.median(written)
    )
