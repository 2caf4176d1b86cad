"""Publish a release folder: verify, plan, send, read back, make visible."""

from __future__ import annotations

from typing import TYPE_CHECKING

from farm import release
from farm.errors import PublishError
from farm.inputs import pins
from farm.publish import parts, places

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
    """Verify a release folder and return what publishing it would do.

    Args:
        folder: the release.
        destination: the place.
        note: takes one line about a fact that an old tarball does not record.
        wheel: the wheel ``llama-space``, which is published beside the manifest.

    Raises:
        UsageError: it is no release folder, or its name cannot be published.
        PackError: a tarball is not what the manifest says.
        PublishError: its llama.cpp has a known vulnerability, or other bytes are published already.
    """
    release.verify(folder, note)
    manifest, found = parts.of_folder(folder)
    _require_verified(manifest, found)
    name = places.require_name("release", manifest.release)
    pins.require_no_advisory(manifest.source)
    if manifest.source.build_assumed:
        note(
            f"note[BUILD_ASSUMED]: the builder gave the number b{manifest.source.build}; "
            "the source did not tell"
        )
    present = destination.present(name)
    more = () if wheel is None else _unpublished(parts.of_file(wheel), present, note)
    return parts.plan(name, destination.where, (*found[:-1], *more, found[-1]), present)


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
    """Carry a plan out; return the manifest's URL.

    Raises:
        PublishError: it was cut off, or the place has other bytes than those that were sent. No
            visible file refers to a missing one; publishing again sends only what is missing.
    """
    destination.publish(plan, parts.compare, tell)
    return destination.manifest_url(plan.release)


def _require_verified(manifest: Manifest, found: Iterable[Part]) -> None:
    """Compare the parts with the manifest again: a file may have changed after it was verified."""
    digests = {one.name: one.sha256 for one in manifest.artifacts}
    for part in found:
        if digests.get(part.name, part.sha256) != part.sha256:
            raise PublishError(
                "RELEASE_CHANGED",
                f"{part.path} has changed since it was verified",
                hint="publish a folder that no other program writes to",
            )


def _unpublished(
    wheel: Part, present: Mapping[str, Known], note: Callable[[str], None]
) -> tuple[Part, ...]:
    """Return the wheel, unless another one of the same release was published already."""
    known = present.get(wheel.name)
    if known is None or not known.visible or known.is_of(wheel):
        return (wheel,)
    note(f"the published {wheel.name} is kept: the one that was built now has other bytes")
    return ()
