"""``BUILD.json``: the record in a tarball of what it was made from and with.

It contains what decides the bytes, and the compilers, but no time, machine's name or folder of the
machine: the same plan with the same compiler gives the same record. Command lines are recorded for
``LAYOUT``, whose folders stand for those of every engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from msgspec import Meta

from farm import MACHINE
from farm.errors import PackError
from farm.inputs import patches
from farm.plan import TARGETS, BuildPlan, Layout, Toolchain
from farm.tarball.parts import Part
from llama_loader import manifest as schema

if TYPE_CHECKING:
    from farm.source import SourceTree

LAYOUT: Final = Layout(
    source=PurePosixPath("/source"),
    build=PurePosixPath("/build"),
    recipe=PurePosixPath("/host_size.cmake"),
    cuda=PurePosixPath("/cuda"),
)
"""The folders in a record's command lines, without the compiler cache, which decides no byte."""
LARGEST: Final = 1 << 20
"""Bytes. A real record has 9 kB; lists of many short words take far more memory than their text."""
_MOST: Final = 1_000
"""Parts, inputs and programs each; the largest record seen has fewer than a hundred."""


class LineRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """The line's promises: checked again whenever the tarball is read."""

    name: schema.Name
    toolkit: schema.Version | None
    min_driver: schema.Version | None
    glibc: schema.Version
    machine: schema.Name = MACHINE


class BuildRecord(msgspec.Struct, frozen=True):
    """Everything in ``BUILD.json``.

    Attributes:
        source: where llama.cpp came from, as in the manifest.
        arch_set, archs, line: what was requested.
        defines: CMake's definitions that name no folder.
        defined: those of them that a person added (``--define``, ``--also``).
        toolchain: the compilers, with the digests of the programs and of the image.
        recipe_sha256: of ``build/cmake/host_size.cmake``, as it was put into the build.
        parts: the parts of the source tree, each with a digest and its licence; None in old
            tarballs.
        commands: the steps' command lines, every flag in them, for ``LAYOUT``.
        environment: the variables of every step.
        inputs: further pinned files that the build read, file name → sha256.
    """

    source: schema.Source
    arch_set: schema.Name
    archs: Annotated[str, Meta(pattern=r"\A[0-9a-z;-]{0,1000}\Z")]
    line: LineRecord
    defines: dict[str, str]
    toolchain: Toolchain
    recipe_sha256: str | None = None
    schema_version: int = 1
    parts: tuple[Part, ...] | None = None
    commands: tuple[tuple[str, ...], ...] = ()
    environment: dict[str, str] = {}
    inputs: dict[str, str] = {}
    defined: dict[str, str] = {}

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets that were built; for old records without commands, the usual ones."""
        for command in self.commands:
            if "--target" in command:
                return command[command.index("--target") + 1 :]
        return TARGETS


def of(
    plan: BuildPlan,
    toolchain: Toolchain,
    *,
    parts: tuple[Part, ...] | None = None,
    inputs: Mapping[str, str] | None = None,
) -> BuildRecord:
    """Record a plan, its compilers, and its inputs."""
    line = plan.line
    return BuildRecord(
        source=source_of(plan.source),
        arch_set=plan.arch_set.name,
        archs=plan.arch_set.archs,
        line=LineRecord(line.name, line.toolkit, line.min_driver, line.glibc, line.machine),
        defines=dict(plan.defines()),
        toolchain=toolchain,
        recipe_sha256=patches.recipe_sha256(),
        parts=parts,
        commands=tuple(step.argv for step in plan.steps(LAYOUT, jobs=1)),
        environment=plan.environment(LAYOUT, ccache_dir=None),
        inputs=dict(sorted((inputs or {}).items())),
        defined=dict(plan.defined),
    )


def source_of(source: SourceTree) -> schema.Source:
    """Record where llama.cpp came from."""
    return msgspec.convert(source, schema.Source, from_attributes=True)


def shown(source: schema.Source) -> str:
    """Return what identifies a source, for an error's sentence."""
    patches = "".join(f", patch {one.name} {one.sha256[:12]}" for one in source.patches)
    return f"b{source.build} ({source.origin}{patches})"


def encode(record: BuildRecord) -> bytes:
    """Return the file's bytes: indented JSON with one final newline."""
    return msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"


def decode(data: bytes, *, what: str) -> BuildRecord:
    """Parse a ``BUILD.json``.

    Raises:
        PackError: it is not one, or larger than any; names ``what`` and the JSON path.
    """
    try:
        record = msgspec.json.decode(data[: LARGEST + 1], type=BuildRecord)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise PackError("BUILD_RECORD_INVALID/json", what=what, error=error) from error
    lists = (record.parts or (), record.inputs, record.toolchain.programs)
    if len(data) > LARGEST or max(map(len, lists)) > _MOST:
        most = f"{LARGEST >> 20} MiB, or {_MOST} parts, inputs or programs"
        raise PackError("BUILD_RECORD_INVALID/long", what=what, most=most)
    return record
