"""Publish a release folder: verify, plan, send, read back, make visible."""

from __future__ import annotations

from typing import TYPE_CHECKING

from farm import durable, release
from farm.errors import PublishError
from farm.inputs import advisories
from farm.publish import gate, parts, places

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from farm.publish.destination import Destination
    from farm.publish.parts import Known, Part, Plan
    from llama_loader.manifest import Manifest


def prepare(
    folder: Path,
    destination: Destination,
    note: Callable[[str], None] = print,
    *,
    wheel: Path | None = None,
) -> Plan:
    """Verify a release folder and say what publishing it would do.

    Args:
        folder: the release.
        destination: where it is to go.
        note: takes one line about what an old tarball does not tell.
        wheel: the wheel ``llama-space``, which is published beside the manifest.

    Raises:
        UsageError: it is no release folder, or its name cannot be published.
        PackError: a tarball is not what the manifest says.
        PublishError: its llama.cpp has a known hole, other bytes are published already, or its
            report is of another manifest.
    """
    release.verify(folder, note)
    manifest, found = parts.of_folder(folder)
    _require_verified(manifest, found)
    name = places.require_name("release", manifest.release)
    advisories.require_none(manifest.source)
    if manifest.source.build_assumed:
        note(
            f"note[BUILD_ASSUMED]: b{manifest.source.build} is what the builder said; "
            "the source did not tell"
        )
    more = [] if wheel is None else [parts.of_file(wheel)]
    for part in found:
        if part.name == parts.GATE:
            content = durable.read_small(part.path)
            gate.of_these_bytes(content, durable.read_small(found[-1].path), what=str(folder))
            more.append(part)
    present = destination.present(name)
    return parts.plan(name, destination.where, _with(more, found, present, note), present)


def passed(folder: Path, plan: Plan) -> str | None:
    """Return the sha256 of a folder's manifest whose own report passed; None without a report.

    Raises:
        PublishError: the report is of another manifest, or a check failed.
    """
    report, published = folder / parts.GATE, plan.parts[-1]
    if not report.is_file():
        return None
    manifest = durable.read_small(published.path)
    parts.require_digest(manifest, published.sha256, what=str(folder))
    gate.require_passed(durable.read_small(report), manifest, what=str(folder))
    return published.sha256


def requirement(plan: Plan, destination: Destination) -> str | None:
    """Return the line of ``requirements.txt`` that installs the published wheel, hash included.

    None for a release without a wheel.
    """
    for part in plan.parts:
        if part.name.endswith(".whl"):
            url = destination.download_url(plan.release, part.name)
            return f"llama-space @ {url}#sha256={part.sha256}"
    return None


def publish(plan: Plan, destination: Destination, tell: Callable[[str], None]) -> str:
    """Carry a plan out; returns the manifest's URL.

    Raises:
        PublishError: it broke off, or what is there is not what was sent. Nothing visible points
            at something missing, and publishing again sends only what is missing.
    """
    destination.publish(plan, parts.compare, tell)
    return destination.manifest_url(plan.release)


def _require_verified(manifest: Manifest, found: Iterable[Part]) -> None:
    """Compare what will be sent with the manifest: a file may change after it was verified."""
    digests = {one.name: one.sha256 for one in manifest.artifacts}
    for part in found:
        if digests.get(part.name, part.sha256) != part.sha256:
            raise PublishError(
                "RELEASE_CHANGED",
                f"{part.path} has changed since it was verified",
                hint="publish a folder that no other program writes to",
            )


def _with(
    more: Iterable[Part],
    found: Iterable[Part],
    present: Mapping[str, Known],
    note: Callable[[str], None],
) -> tuple[Part, ...]:
    """Add the wheel and the report before the manifest, unless they were published already.

    What is published never changes: another wheel or report of the same release stays here.
    """
    extra = {part.name: part for part in more}
    for part in list(extra.values()):
        known = present.get(part.name)
        if known is not None and known.visible and not known.is_of(part):
            note(f"{part.name} stays as it was published: the one here has other bytes")
            del extra[part.name]
    *others, manifest = (part for part in found if part.name != parts.GATE)
    return (*others, *extra.values(), manifest)
