"""``BUILD.json``: what a tarball was made from and with. Travels inside it.

Only what decides the bytes, and who compiled; no time, no machine's name, no folder of this
machine: the same plan with the same compiler gives the same record.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from farm import recipe
from farm.engines.base import Toolchain
from farm.errors import PackError

if TYPE_CHECKING:
    from farm.plan import BuildPlan


class SourceRecord(msgspec.Struct, frozen=True):
    """The manifest's ``source``, as it was at build time."""

    project: str
    version: str | None
    build: int
    commit: str | None
    origin: str
    sha256: str | None


class LineRecord(msgspec.Struct, frozen=True):
    """The line's promises: checked again whenever the tarball is read."""

    name: str
    toolkit: str | None
    min_driver: str | None
    glibc: str


class BuildRecord(msgspec.Struct, frozen=True):
    """Everything in ``BUILD.json``."""

    source: SourceRecord
    arch_set: str
    archs: str
    line: LineRecord
    defines: dict[str, str]
    toolchain: Toolchain
    recipe_sha256: str | None = None
    schema_version: int = 1


def of(plan: BuildPlan, toolchain: Toolchain) -> BuildRecord:
    """Record a plan and who carried it out."""
    source, line = plan.source, plan.line
    return BuildRecord(
        source=SourceRecord(
            project=source.project,
            version=source.version,
            build=source.build,
            commit=source.commit,
            origin=source.origin,
            sha256=source.sha256,
        ),
        arch_set=plan.arch_set.name,
        archs=plan.arch_set.archs,
        line=LineRecord(line.name, line.toolkit, line.min_driver, line.glibc),
        defines=dict(plan.defines()),
        toolchain=toolchain,
        recipe_sha256=recipe.sha256(),
    )


def encode(record: BuildRecord) -> bytes:
    """Return the file's bytes: indented JSON with one final newline."""
    return msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"


def decode(data: bytes, *, what: str) -> BuildRecord:
    """Parse a ``BUILD.json``.

    Raises:
        PackError: it is not one; names ``what`` and the JSON path.
    """
    try:
        return msgspec.json.decode(data, type=BuildRecord)
    except msgspec.DecodeError as error:
        raise PackError("BUILD_RECORD_INVALID", f"{what}: BUILD.json: {error}") from error
