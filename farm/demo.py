"""``nox -s demo``: from source to a verified server's first token, on any machine, with a timeline.

Every part is the real one: the build, the tarball, HTTP on loopback, the loader as a process of
its own with an empty store, ``llama-server`` on a real small model.
"""

from __future__ import annotations

import io
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from farm import durable, loader, pipeline, preflight, release, targets
from farm.errors import FarmError, UsageError
from farm.inputs import packages, pins, toolkit
from farm.inputs.images import names_digest
from farm.options import BuildRequest
from farm.pipeline import Made
from farm.publish.gate import EXPECTED, MODEL, PROMPT
from farm.request import choose_source, resolve
from farm.serve import ReleaseServer
from farm.terminal.progress import BuildReport

CUDA_LINE: Final = "cu130"
"""The one line whose toolkit comes as packages, without any image registry."""

SERVER_STAGES: Final = ("start", "first token")
_COLUMNS: Final = 96
_BAR: Final = 48
_COLOURS: Final = {"farm": "blue", "loader": "green", "server": "yellow"}
_TENTH: Final = 0.1
_TEN: Final = 10.0


@dataclass(frozen=True)
class Span:
    """One stage. ``seconds`` is wall time; ``size`` in bytes, None where none moved."""

    name: str
    owner: str
    seconds: float
    size: int | None = None
    note: str = ""

    @property
    def figures(self) -> str:
        """Seconds, and megabytes (10^6) where bytes moved."""
        amount = f" · {self.size / 1e6:.1f} MB" if self.size is not None else ""
        return f"{seconds(self.seconds)}{amount}"


def seconds(value: float) -> str:
    """Write a duration with the digits that are significant."""
    if value < _TENTH:
        return f"{value * 1000:.0f} ms"
    return f"{value:.2f} s" if value < _TEN else f"{value:.0f} s"


def rows(spans: tuple[Span, ...]) -> list[str]:
    """Return one aligned plain line a span, and a total."""
    widest = max(len(span.name) for span in spans)
    lines = [f"  {span.name:<{widest}}  {span.figures:<22}{span.note}".rstrip() for span in spans]
    total = sum(span.seconds for span in spans)
    return [*lines, f"  {'total':<{widest}}  {seconds(total)}"]


def svg(spans: tuple[Span, ...], *, title: str) -> str:
    """Draw the spans one below the other: the farm's, then those of a start.

    A build takes minutes and a loader milliseconds: on one scale only the build could be seen, so
    the farm's rows and the others' have a scale each, and every row carries its figures.
    """
    table = Table("stage", "of", "", "", box=None, width=_COLUMNS)
    for _, members in groupby(spans, key=lambda span: span.owner == "farm"):
        group, begin = list(members), 0.0
        total = sum(span.seconds for span in group) or 1.0
        for span in group:
            bar = Bar(
                total, begin, begin + span.seconds, width=_BAR, color=_COLOURS.get(span.owner, "")
            )
            table.add_row(span.name, span.owner, bar, span.figures)
            begin += span.seconds
        table.add_row("", "", "", f"{seconds(begin)} in all")
    console = Console(record=True, width=_COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(table)
    # rich names fonts of a content network, but a README's picture must load nothing
    picture = console.export_svg(title=title, unique_id="timeline")
    return re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)


@dataclass
class Demo:
    """One run.

    Attributes:
        arch_set, engine, image: as of ``BuildRequest``.
        figure: where the timeline's picture goes.
        all_cpus: build the CPU variants of other machines, too.
        out: where the release stays: a folder of the demo's own.
    """

    arch_set: str
    engine: str
    image: str | None
    figure: Path
    all_cpus: bool = False
    out: Path = Path("dist/demo")
    _spans: list[Span] = field(default_factory=list)

    def run(self, report: BuildReport) -> None:
        """Do everything, show the answer and the timeline.

        Raises:
            FarmError: a stage failed, or the model's answer is wrong.
        """
        with tempfile.TemporaryDirectory(prefix="llama-farm-demo-") as folder:
            out, own = self.out, Path(folder) / "release"
            request = self._request(out, report)
            made = self._build(request, report)
            model = packages.fetch_model(pins.load().model(MODEL))
            # alone: --out may hold other sets, too
            made.tarball.copy(own / made.tarball.path.name)
            release.write(own)
            pin = durable.sha256(own / release.MANIFEST)
            with ReleaseServer(own) as server:
                named = f"{server.url}{release.MANIFEST}"
                trusted = ("--manifest", named, "--manifest-sha256", pin)
                answer = self._use(trusted, model, Path(folder) / "store", report)
        spans = tuple(self._spans)
        for line in ("", f"  {PROMPT}{answer}", "", *rows(spans), ""):
            report.say(line)
        self.figure.parent.mkdir(parents=True, exist_ok=True)
        picture = svg(spans, title="From source to the first token")
        durable.replace(self.figure, picture.encode(), 0o644)
        report.say(f"  picture: {self.figure}")
        _say_next(request, model, report)
        if not answer.startswith(EXPECTED):
            raise FarmError("DEMO_WRONG_ANSWER", prompt=PROMPT, answer=answer)

    def _build(self, request: BuildRequest, report: BuildReport) -> Made:
        started = time.monotonic()
        tree = choose_source(request)
        pin = pins.load().source
        self._spans.append(Span("source", "farm", time.monotonic() - started, pin.size))
        report.say(f"source: llama.cpp b{tree.build}, {len(list(tree.tree.rglob('*')))} files")
        (made,) = preflight.build(request, report)
        self._spans.append(Span("build", "farm", made.build_seconds))
        self._spans.append(Span("pack", "farm", made.pack_seconds, made.tarball.size))
        return made

    @property
    def _line(self) -> str:
        return "cpu" if self.arch_set == "cpu" else CUDA_LINE

    def _request(self, out: Path, report: BuildReport) -> BuildRequest:
        is_cpu = self.arch_set == "cpu"
        resolve(BuildRequest(arch_set=self.arch_set, line=self._line))
        request = BuildRequest(
            arch_set=self.arch_set,
            line=self._line,
            engine=self.engine,
            image=self.image,
            out=out,
            this_cpu=not self.all_cpus,
        )
        if self.engine != "local" and self.image is None:
            try:
                request = pipeline.with_image(request, self._line, report)
            except UsageError as error:
                report.say(f"note[{error.code}]: {error.message}; building without a container")
                request = replace(request, engine="local")
        if is_cpu or request.image is not None:
            return request
        try:
            row = targets.load().line(self._line)
            if row.accepts_toolkit(toolkit.locate().version):
                return request
        except UsageError as error:
            report.say(f"note[{error.code}]: {error.message}; taking NVIDIA's wheels")
        return replace(request, toolkit=toolkit.WHEELS)

    def _use(self, trusted: tuple[str, ...], model: Path, store: Path, report: BuildReport) -> str:
        options = (*trusted, "--store", str(store), "--allow-cpu")
        fetched = loader.told("fetch", *options)
        self._spans += _spans(fetched, "loader")
        report.say(f"installed: {fetched['artifact']}, every byte verified")
        with loader.serving(*options, "--model", str(model)) as served:
            self._spans += _spans(served, "server", only=SERVER_STAGES)
            return str(loader.complete(served, PROMPT, 1)["content"])


def _say_next(request: BuildRequest, model: Path, report: BuildReport) -> None:
    """Print the next commands for the release, and the model that the demo used."""
    out, line = request.out, request.line
    full = (
        "build-cpu" if line == "cpu" else f"build-cuda --arch-set {request.arch_set} --line {line}"
    )
    if request.engine == "local":
        full += " --engine local"
        full += f" --toolkit {request.toolkit}" if request.toolkit else ""
    elif request.image and not names_digest(request.image):
        full += f" --image {request.image}"
    manifest = (out / release.MANIFEST).absolute().as_uri()
    told = f"""
  the release stays in {out}; the next commands:
    python3 -m pip install --require-hashes -r requirements.lock
    invoke verify {out}
    invoke serve-release --folder {out}
    invoke publish --to DIR --folder {out}
    cd spaces && python3 -m llama_loader serve --allow-cpu --manifest {manifest} --model {model}
  a release for every processor: invoke {full}
  (takes what this compiled from the cache)"""
    for line in told.splitlines():
        report.say(line)


def _spans(told: Mapping[str, Any], owner: str, only: tuple[str, ...] = ()) -> list[Span]:
    """Return the stages that the loader timed; a repeated stage becomes one span."""
    found: dict[str, Span] = {}
    for stage in told["timeline"]:
        name, seconds = stage["name"], stage["seconds"]
        if not only or name in only:
            before = found[name].seconds if name in found else 0.0
            found[name] = Span(name, owner, before + seconds, stage["size"])
    return list(found.values())
