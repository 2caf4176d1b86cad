"""Print tables and lines for people, and parse the values of options. No decisions."""

from __future__ import annotations

import json
import math
import shlex
import sys
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Final

from rich.filesize import decimal

from farm.errors import remark, shown
from llama_loader.errors import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from huggingface_hub import SpaceHardware

    from farm.publish.channels import Promotion
    from farm.publish.deploy_space import Changes
    from farm.publish.gate import GateCheck, Report
    from farm.publish.pin_space import Archive, CheckedPin
    from farm.publish.publishing import Plan
    from farm.targets import Targets
    from farm.terminal.status import Leavings, Overview, Row
    from llama_loader.manifest import Artifact, Manifest

WARNED: Final = timedelta(days=21)
"""How long before a channel's end there is a warning; the loader's warning begins then, too."""


def line(text: str) -> None:
    """Print text to stdout, at once: uploads take long."""
    print(shown(text), flush=True)


def note(text: str) -> None:
    """Print text to stderr, beside the command's result."""
    print(shown(text), file=sys.stderr)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, narrowest: int = 0) -> None:
    """Print texts from outside in columns, the first one ``narrowest`` characters wide or more.

    rich, which ``invoke --list`` need not load, would read ``[/x]`` in a text as its own markup.
    """
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    first, *others = columns
    table = Table(Column(first, overflow="fold", min_width=narrowest), *others, box=None)
    for cells in rows:
        table.add_row(*(Text(printable(cell)) for cell in cells))
    Console(highlight=False).print(table)


def targets(rows: Targets) -> None:
    """Print the lines, sets and groups of build/targets.toml, and what a release holds."""
    lines = []
    for name, row in rows.lines.items():
        span = row.span if row.is_cuda else ""
        lines.append((name, row.toolkit or "", span, row.min_driver or "", row.image))
    for major, cuda in rows.cuda.items():
        span = f"{cuda.oldest} to {cuda.newest[-1][1]}"
        lines.append((f"cu{major}N", f"{major}.N", span, cuda.min_driver, "any with its nvcc"))
    _table(("line", "CUDA", "architectures", "driver", "devel image"), lines)
    line("")
    sets = [(name, row.archs or "none", row.format) for name, row in rows.sets.items()]
    _table(("set", "CMAKE_CUDA_ARCHITECTURES", "format"), sets)
    line("")
    _table(("group", "sets"), [(name, ", ".join(sets)) for name, sets in rows.groups.items()])
    line("")
    _table(("release", "sets"), [(name, ", ".join(sets)) for name, sets in rows.release.items()])


def release_rows(rows: Targets) -> None:
    """Print the sets of a release as one line of JSON, the matrix of a GitHub workflow."""
    print(json.dumps({"include": rows.release_rows()}))


def status(manifest: Manifest) -> None:
    """Print a release's artifacts and the size of their parts, in MB (10^6 bytes)."""
    from llama_loader.manifest import LLAMA_SERVER

    line(f"{manifest.release}  llama.cpp {manifest.source.version} build {manifest.source.build}")
    rows = []
    for artifact in manifest.artifacts:
        sizes = [decimal(artifact.size), decimal(artifact.unpacked_size)]
        gpu = sum(one.size for one in artifact.files if one.path.endswith("libggml-cuda.so"))
        host = sum(one.size for one in artifact.files) - gpu
        is_server = artifact.kind == LLAMA_SERVER
        sizes += [decimal(gpu), decimal(host)] if is_server else ["", ""]
        rows.append((artifact.name, *sizes, _holds(artifact)))
    columns = ("artifact", "download", "unpacked", "GPU code", "host code", "holds")
    _table(columns, rows, narrowest=24)


def leavings(left: Leavings) -> None:
    """Print what the farm left on this machine and in the engine, and the sum."""
    for thing in left.things:
        stays = f"  (stays: {thing.kept})" if thing.kept else ""
        line(f"{decimal(thing.size):>12}  {thing.name}{stays}")
    if left.engine:
        note(f"note[ENGINE_NOT_ASKED]: {left.engine}")
    line(f"{decimal(left.size):>12}  in all")


def _holds(artifact: Artifact) -> str:
    from llama_loader.manifest import CUDA_RUNTIME

    if artifact.cuda is None:
        return "no CUDA"
    if artifact.kind == CUDA_RUNTIME:
        return f"CUDA {artifact.cuda.toolkit} libraries"
    ptx = f", PTX {' '.join(artifact.cuda.ptx)}" if artifact.cuda.ptx else ""
    return f"SASS {' '.join(artifact.cuda.sass)}{ptx}"


def plan(planned: Plan, *, each: bool) -> None:
    """Print what publishing does, and with ``each`` every file."""
    line(
        f"{planned.release} → {planned.where}: {len(planned.there)} files are there,"
        f" {len(planned.new)} to send, {decimal(planned.size)}"
    )
    for part in planned.parts if each else ():
        word = "send " if part in planned.new else "there"
        line(f"  {word} {part}  sha256 {part.sha256}")


def promotion(done: Promotion) -> None:
    """Print the release that a channel now names, and a note for a new one beside others."""
    before = f" (before: {done.before})" if done.before else ""
    line(
        f"channel {done.channel} → {done.release}{before}, serial {done.serial}, until"
        f" {done.expires:%Y-%m-%d}"
    )
    line(done.url)
    if done.others:
        note(remark("CHANNEL_NEW", channel=done.channel, named=", ".join(done.others)))


def check(made: GateCheck) -> None:
    """Print one check of the gate as it is made."""
    line(f"{'ok' if made.passed else 'FAILED':8} {made.name}: {made.detail}")


def gate(report: Report, to: str | None = None) -> None:
    """Print the end of the gate; its last word is the digest, which workflows read.

    ``to`` is where the release is published; None if the gate read a folder.

    Raises:
        PublishError: a check failed.
    """
    report.require_passed()
    line(f"{report.release} may be published and promoted")
    place = shlex.quote(to) if to else "PLACE"
    named = f"{report.release} --channel NAME --to {place} --key FILE"
    line(f"promote these bytes: invoke promote {named} --sha256 {report.manifest_sha256}")


def not_started(release: str) -> None:
    """Print a note: programs were not started, as they could read the key; the gate does so."""
    note(remark("NOT_STARTED", release=release))


def pin(written: CheckedPin, file: Path) -> None:
    """Print the content of ``release.json``, and a note with its path and what it cannot run on."""
    for told in json.dumps(written.content, indent=2).split("\n"):
        line(told)
    listed, url = written.manifest, written.content["manifest_url"]
    note(f"wrote {file}{_remarks(listed.release, url, listed.artifacts)}")


def _remarks(name: str, url: str, artifacts: Iterable[Artifact]) -> str:
    """Return what a Space needs, or cannot do, with the release or archive at a URL."""
    told = f"; {name} has no CUDA code: it runs on a Space's CPU alone, with the variable"
    told = "" if any(one.cuda for one in artifacts) else f"{told} YAKULINGO_SPACES_ALLOW_CPU=1"
    is_local = not url.startswith(("https:", "hf:"))
    return f"{told}; only this machine can read its address, and no Space" if is_local else told


def archive(found: Archive) -> None:
    """Print what an archive contains and needs, the verdict for each host, and what pins it.

    Raises:
        PublishError: no host can run it.
    """
    artifact, cuda = found.artifact, found.artifact.cuda
    line(f"{artifact.name}: {decimal(found.size)}, sha256 {found.sha256}")
    if cuda is None:
        line("  no CUDA code: it runs on the CPU alone")
    else:
        code = f"machine code for {', '.join(cuda.sass) or 'nothing'}"
        line(f"  {code}, PTX for {', '.join(cuda.ptx) or 'nothing'}")
    glibcxx = f", GLIBCXX {artifact.platform.glibcxx}" if artifact.platform.glibcxx else ""
    line(f"  needs {', '.join((f'glibc {artifact.platform.glibc}{glibcxx}', *artifact.needs))}")
    for host, said, can_run in found.answers:
        line(f"  {'can run' if can_run else 'CANNOT run'} on {host}")
        for told in said.splitlines():
            line(f"    {told.strip()}")
    for name, value in found.variables().items():
        line(f"{name}={value}")
    told = "set both as variables of the Space, or: invoke space --to OWNER/NAME --url URL"
    note(f"{told}{_remarks(artifact.name, found.url, (artifact,))}")


def deployment(changes: Changes, hardware: SpaceHardware | None) -> None:
    """Print what a deployment adds, changes, deletes and keeps in a Space."""
    planned, size = changes.deployment, changes.deployment.size / 1e3
    new = " (new)" if changes.head is None else ""
    line(f"Space {planned.space}{new}: {len(planned.files)} files, {size:.0f} kB, gradio")
    own = f"the Space's own: {changes.hardware or 'the Hub does not tell it'}"
    default = own if changes.head else "zero-a10g (ZeroGPU)"
    line(f"  hardware {hardware.value if hardware else default}")
    ours = "mradermacher/translategemma-" in planned.model
    by = " (mradermacher's quantisation of Google's TranslateGemma)" if ours else ""
    line(f"  model {planned.model}{by}")
    named = hardware.value if hardware else changes.hardware
    if named == "cpu-basic" and "-27b-" in planned.model:
        note(remark("MODEL_TOO_LARGE", "warning"))
    left = sum(one.stat().st_size for one in planned.left_out) / 1e6
    if left > 1:
        ignored = ", ".join(one.name for one in planned.left_out)
        note(remark("FILES_LEFT_OUT", ignored=ignored, left=left))
    for what, names in (
        ("add", changes.added if changes.head else ()),  # of a new Space it is all of spaces/
        ("change", changes.changed),
        ("delete", changes.deleted),
        ("keep, changed there since it was uploaded:", changes.kept),
    ):
        for name in names:
            line(f"  {what} {name}")
    for name in changes.unset:
        line(f"  remove variable {name}")
    for name, value in planned.variables.items():
        line(f"  variable {name}={value}")
    if not planned.names_release:
        note(remark("RELEASE_NOT_CHOSEN"))
    if planned.volume is not None:
        line(f"  mount {planned.volume.to_uri()}")


def overview(found: Overview) -> None:
    """Print the channels and releases of a place."""
    line(found.where)
    for title, rows in (("channel", found.channels), ("release", found.releases)):
        if not rows:
            line(f"no {title} that can be read" if found.failed else f"no {title}s")
            continue
        named = (title,) if title == "release" else (title, "release")
        lines = []
        for row in rows:
            age = _span(datetime.now(timezone.utc) - row.created)
            told = (str(row.serial), age, _left(row), str(row.tarballs), decimal(row.size))
            lines.append((*(row.name, row.release)[: len(named)], *told))
        _table((*named, "serial", "age", "expires in", "tarballs", "size"), lines)
    for row in found.channels:
        if row.left is not None and row.left <= WARNED:
            ends = f"expires in {_left(row)}" if row.left > timedelta(0) else "has expired"
            line(remark("CHANNEL_EXPIRES", "warning", name=row.name, ends=ends))
    for error in found.failed:
        line(f"warning[{error.code}]: {error.message} ({error.hint})")
    supposed = [row for row in (*found.channels, *found.releases) if row.gets]
    if supposed:
        line("that host gets")
    for row in supposed:
        line(f" {row.name}: {row.gets}")


def _left(row: Row) -> str:
    if row.left is None:
        return ""
    return _span(row.left, rounded=math.ceil) if row.left > timedelta(0) else "expired"


def _span(span: timedelta, rounded: Callable[[float], int] = math.floor) -> str:
    """Return days, or hours if it is less than two days."""
    hours = rounded(span.total_seconds() / 3600)
    return f"{hours} h" if abs(hours) < 48 else f"{rounded(hours / 24)} days"  # noqa: PLR2004 - two days
