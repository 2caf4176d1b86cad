"""Tables and lines of publishing, for people. No decisions."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.table import Table

from farm.errors import PublishError
from farm.terminal.show import megabytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from farm.publish.channels import Promotion
    from farm.publish.deploy_space import Changes
    from farm.publish.gate import Check, Report
    from farm.publish.parts import Plan
    from farm.publish.pin_space import Archive
    from farm.terminal.status import Overview, Row


WARNED: Final = timedelta(days=21)
"""How long before a channel's end there is a warning; the loader's warning begins then, too."""


def line(text: str) -> None:
    """Print one line to stdout, at once: uploads take long."""
    print(text, flush=True)


def plan(planned: Plan) -> None:
    """Print what publishing would do."""
    line(
        f"{planned.release} → {planned.where}: {len(planned.there)} files are there,"
        f" {len(planned.new)} to send, {megabytes(planned.size)}"
    )
    for part in planned.parts:
        word = "send " if part in planned.new else "there"
        line(f"  {word} {part.name}  {megabytes(part.size)}  sha256 {part.sha256}")


def promotion(done: Promotion) -> None:
    """Print what a channel came to point at."""
    before = f" (before: {done.before})" if done.before else ""
    line(
        f"channel {done.channel} → {done.release}{before}, serial {done.serial}, until"
        f" {done.expires:%Y-%m-%d}"
    )
    line(done.url)


def check(made: Check) -> None:
    """Print one check of the gate as it is made."""
    word = {True: "ok", False: "FAILED", None: "not made"}[made.passed]
    line(f"{word:8} {made.name}: {made.detail}")


def gate(report: Report) -> None:
    """Print the end of the gate.

    Raises:
        PublishError: a check failed.
    """
    if report.failed:
        raise PublishError(
            "GATE_FAILED", f"{report.release} did not pass: {'; '.join(report.failed)}"
        )
    line(f"{report.release} may be published and promoted")
    line(f"promote these bytes: invoke promote {report.release} --sha256 {report.manifest_sha256}")


def pin(written: Mapping[str, Any]) -> None:
    """Print what stands in ``release.json`` now."""
    line(json.dumps(written, indent=2))


def archive(found: Archive) -> None:
    """Print what an archive holds and needs, and what each supposed host says of it."""
    artifact, cuda = found.artifact, found.artifact.cuda
    line(f"{artifact.name}: {megabytes(found.size)}, sha256 {found.sha256}")
    if cuda is None:
        line("  no CUDA code: it runs on the CPU alone")
    else:
        code = f"machine code for {', '.join(cuda.sass) or 'nothing'}"
        line(f"  {code}, PTX for {', '.join(cuda.ptx) or 'nothing'}")
    glibcxx = f", GLIBCXX {artifact.platform.glibcxx}" if artifact.platform.glibcxx else ""
    line(f"  needs glibc {artifact.platform.glibc}{glibcxx}, {', '.join(artifact.needs)}")
    for host, said, can_run in found.answers:
        line(f"  {'can run' if can_run else 'CANNOT run'} on {host}")
        for told in said.splitlines():
            line(f"    {told.strip()}")


def deployment(changes: Changes) -> None:
    """Print what a deployment adds, changes, deletes and keeps in a Space."""
    planned, size = changes.deployment, changes.deployment.size / 1e3
    new = " (new)" if changes.head is None else ""
    line(f"Space {planned.space}{new}: {len(planned.files)} files, {size:.0f} kB, gradio")
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
    if planned.volume is not None:
        line(f"  mount {planned.volume.to_uri()}")


def overview(found: Overview) -> None:
    """Print the channels and releases of a place."""
    console = Console(highlight=False)
    console.print(found.where)
    for title, rows in (("channel", found.channels), ("release", found.releases)):
        if rows:
            console.print(_table(title, rows))
        else:
            console.print(f"no {title}s")
    for row in found.channels:
        if row.left is not None and row.left <= WARNED:
            line(
                f"warning[CHANNEL_EXPIRES]: channel {row.name} {_ends(row)}: Spaces that follow it"
                f" warn, and take no release after that; invoke renew --channel {row.name}"
            )
    supposed = [row for row in (*found.channels, *found.releases) if row.gets]
    if supposed:
        console.print("that host gets")
    for row in supposed:
        console.print(f" {row.name}: {row.gets}", soft_wrap=True)


def _table(title: str, rows: Iterable[Row]) -> Table:
    table = Table(title, "release", "serial", "age", "expires in", "tarballs", "size", box=None)
    for row in rows:
        table.add_row(
            row.name,
            row.release,
            str(row.serial),
            _span(row.age),
            _left(row),
            str(row.artifacts),
            megabytes(row.size),
        )
    return table


def _ends(row: Row) -> str:
    return "has expired" if _left(row) == "expired" else f"expires in {_left(row)}"


def _left(row: Row) -> str:
    if row.left is None:
        return ""
    return _span(row.left) if row.left.total_seconds() > 0 else "expired"


def _span(span: timedelta) -> str:
    """Return days, or hours where it is less than two of them."""
    hours = int(span.total_seconds() // 3600)
    return f"{hours} h" if abs(hours) < 48 else f"{hours // 24} days"  # noqa: PLR2004 - two days
