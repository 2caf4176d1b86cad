"""Check a published release before it comes into a channel."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from farm.errors import PublishError
from farm.publish import gate, last_report, parts
from farm.release import MANIFEST
from llama_loader import manifest as schema

if TYPE_CHECKING:
    from collections.abc import Callable

    from farm.publish.destination import Destination
    from farm.publish.gate import Check, Report


def require_gate(
    destination: Destination,
    release: str,
    tell: Callable[[Check], None],
    *,
    checked: str | None = None,
) -> str:
    """Return the sha256 of a published manifest that passed the gate.

    Reports lie unsigned where the release lies, so one counts only for a manifest whose digest the
    caller names. Without a digest, or without a report, the release is fetched and checked here.
    If it passes, the report is published beside it; if not, nothing is, because the cause may be
    this machine.

    Args:
        destination: where it is published.
        release: its name.
        tell: told of every check as it is made.
        checked: sha256 of the manifest that passed the gate elsewhere (``invoke gate`` prints it).

    Raises:
        PublishError: it is not published, is another manifest (``RELEASE_CHANGED``), or a check
            failed.
    """
    what = f"{release} of {destination.where}"
    if checked is not None:
        manifest = b"".join(destination.read(release, MANIFEST))
        parts.require_digest(manifest, checked, what=what)
        if reports := parts.reports(destination.present(release)):
            newest = b"".join(destination.read(release, reports[0]))
            gate.require_passed(newest, manifest, what=what)
            return checked
    report = check(destination, release, tell, publish_failure=False)
    if report.failed:
        raise PublishError("GATE_FAILED", f"{what} did not pass: {'; '.join(report.failed)}")
    return report.manifest_sha256


def check(
    destination: Destination,
    release: str,
    tell: Callable[[Check], None],
    *,
    publish_failure: bool = True,
) -> Report:
    """Fetch a published release, check it on this machine, and publish one more report beside it.

    Args:
        destination: where it is published; earlier releases there are what it is compared with.
        release: its name.
        tell: told of every check as it is made.
        publish_failure: whether a report is published in which something failed. It then stands
            in the way of a promotion until a later one passes.

    Raises:
        PublishError: it is not published, or is not whole, or the report cannot be published.
    """
    manifest = b"".join(destination.read(release, MANIFEST))
    what = f"{release} of {destination.where}"
    names = parts.names_of(schema.parse(manifest, what=what))
    present = destination.present(release)
    missing = [name for name in names if name not in present]
    if missing:
        raise PublishError("RELEASE_INCOMPLETE", f"{what} has no {', '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="llama-farm-gate-") as place:
        folder = Path(place)
        for name in names:
            with (folder / name).open("wb") as out:
                out.writelines(destination.read(release, name))
        report = gate.run(folder, last_report.figures(destination, release), tell)
        if publish_failure or not report.failed:
            _, found = parts.of_folder(folder)
            named = parts.next_report(present)
            wanted = [replace(one, name=named) if one.name == parts.GATE else one for one in found]
            plan = parts.plan(release, destination.where, wanted, present)
            destination.publish(plan, parts.compare, lambda _: None)
    return report
