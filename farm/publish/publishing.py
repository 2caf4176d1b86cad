"""Publish a release folder: verify, plan, send, read back, make visible."""

from __future__ import annotations

from typing import TYPE_CHECKING

from farm import advisories, release
from farm.publish import parts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from farm.publish.destination import Destination
    from farm.publish.parts import Plan


def prepare(folder: Path, destination: Destination) -> Plan:
    """Verify a release folder and say what publishing it would do.

    Raises:
        UsageError: it is no release folder.
        PackError: a tarball is not what the manifest says.
        PublishError: its llama.cpp has a known hole, or other bytes are published already.
    """
    release.verify(folder)
    manifest, found = parts.of_folder(folder)
    advisories.require_none(manifest.source)
    present = destination.present(manifest.release)
    if parts.GATE in present:  # the one report of a release is the published one
        found = tuple(part for part in found if part.name != parts.GATE)
    return parts.plan(manifest.release, destination.where, found, present)


def publish(plan: Plan, destination: Destination, tell: Callable[[str], None]) -> str:
    """Carry a plan out; returns the manifest's URL.

    Raises:
        PublishError: it broke off, or what is there is not what was sent. Nothing visible points
            at something missing, and publishing again sends only what is missing.
    """
    destination.publish(plan, parts.compare, tell)
    return destination.manifest_url(plan.release)
