"""``BUILD.json`` → the plan that it records, with its source; or what of it is not to be had.

The commands of a record are never run: this checkout's own plan must come to the same ones
(docs/decisions/0030-rebuild-from-own-recipe.md).
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import msgspec

from farm import source, targets
from farm.engines import images
from farm.errors import BuildError, SourceError
from farm.inputs import pins, recipe, toolkit
from farm.plan import BuildPlan
from farm.tarball import build_record, parts

if TYPE_CHECKING:
    from pathlib import Path

    from farm.inputs.pins import PackagePin
    from farm.source import Source
    from farm.tarball.build_record import BuildRecord, SourceRecord

_PYPI: Final = re.compile(
    r"pypi:(?P<file>(?P<package>[^#/]+)-(?P<version>[^#/-]+)\.tar\.gz)#(?P<subdir>.+)"
)
_GIT: Final = re.compile(r"git\+(?P<remote>.+)@(?P<ref>[^@]+)")
_MAX_ARCHIVE: Final = 1 << 30
"""Bytes of a source archive; the largest seen has 77 MB. Its digest is what is checked."""


def source_of(record: SourceRecord, folder: Path | None, *, remote: str | None = None) -> Source:
    """Fetch the source that a record names.

    Args:
        record: of the source.
        folder: the tree, for what was built from a folder that nobody else has.
        remote: the repository that a person trusts beside llama.cpp's own.

    Raises:
        SourceError: it cannot be had, or is not the recorded one; names what is.
            ``REMOTE_NOT_TRUSTED``: it lies in a repository that nobody has named here.
        UsageError: its repository has no such commit, or ``folder`` is no source tree.
    """
    if folder is not None:
        found = source.from_folder(folder)
    elif match := _PYPI.fullmatch(record.origin):
        found = source.from_archive(_pin(record, match))
    elif (match := _GIT.fullmatch(record.origin)) and record.commit:
        _require_trusted(match["remote"], remote)
        found = source.from_ref(record.commit, remote=match["remote"])
    else:
        raise SourceError(
            "SOURCE_NOT_PUBLISHED",
            f"it was built from {record.origin}, which only its builder has",
            hint="--source DIR names that tree; its parts are compared with those of BUILD.json",
        )
    return replace(
        found,
        version=record.version,
        build=record.build,
        commit=record.commit,
        origin=record.origin,
        sha256=record.sha256,
        project=record.project,
        build_assumed=record.build_assumed,
    )


def _require_trusted(recorded: str, named: str | None) -> None:
    """Refuse a repository that only the record names: its build scripts would run here."""
    if recorded not in (source.GIT_REMOTE, named):
        raise SourceError(
            "REMOTE_NOT_TRUSTED",
            f"BUILD.json names {recorded!r} for its source, not llama.cpp's own repository",
            hint="if you trust it, name it: --remote URL; or a tree that you have: --source DIR",
        )


def _pin(record: SourceRecord, match: re.Match[str]) -> pins.SourcePin:
    if record.sha256 is None:
        raise SourceError("SOURCE_NOT_PINNED", f"BUILD.json has no digest for {record.origin}")
    return pins.SourcePin(
        package=match["package"],
        version=match["version"],
        filename=match["file"],
        size=_MAX_ARCHIVE,
        sha256=record.sha256,
        subdir=match["subdir"],
        build=record.build,
        llama_version=record.version or "",
        commit=record.commit,
    )


def require_parts(record: BuildRecord, tree: Path) -> None:
    """Refuse a source tree whose parts are not the recorded ones.

    Raises:
        SourceError: ``SOURCE_DIFFERS``, with the parts' names.
    """
    if record.parts is None:
        return
    recorded = {part.path: part.sha256 for part in record.parts}
    there = {part.path: part.sha256 for part in parts.survey(tree).parts}
    # What the toolkit put into the binaries (CUB) is a part of no source tree.
    differing = [path for path in there if recorded.get(path) != there[path]]
    if differing:
        raise SourceError(
            "SOURCE_DIFFERS",
            f"the source is not what BUILD.json names: {', '.join(sorted(differing))} differ",
        )


def plan_of(record: BuildRecord, tree: Source, archive_format: str) -> BuildPlan:
    """Make the plan that a record tells of.

    Raises:
        UsageError: this checkout does not know the line.
        BuildError: ``RECIPE_DIFFERS``: this checkout would give the compilers other options.
    """
    line = msgspec.structs.replace(
        targets.load().line(record.line.name),
        toolkit=record.line.toolkit,
        min_driver=record.line.min_driver,
        glibc=record.line.glibc,
    )
    arch_set = targets.ArchSet(record.arch_set, record.archs, archive_format)
    plan = BuildPlan(arch_set, line, tree, record.targets, tuple(record.defined.items()))
    _require_same_recipe(record, plan)
    return plan


def _require_same_recipe(record: BuildRecord, plan: BuildPlan) -> None:
    own = {
        "defines": dict(plan.defines()),
        "commands": tuple(step.argv for step in plan.steps(build_record.LAYOUT, jobs=1)),
        "environment": plan.environment(build_record.LAYOUT, ccache_dir=None),
        "recipe_sha256": recipe.sha256(),
    }
    # Records from before a field was there do not tell.
    differing = [
        name for name, value in own.items() if getattr(record, name) not in (value, (), {}, None)
    ]
    if record.toolchain.engine == "docker":
        name = images.BUILDER_DOCKERFILE.name
        if record.inputs.get(name) not in (images.builder_sha256(), None):
            differing.append(f"inputs.{name}")
    if differing:
        raise BuildError(
            "RECIPE_DIFFERS",
            f"this checkout of the farm builds in another way: {', '.join(differing)} of BUILD.json"
            " are not its own",
            hint="check out the farm as it was when the release was made",
        )


def toolkit_of(record: BuildRecord, asked: str | None) -> str | None:
    """Return what ``--toolkit`` takes for the toolkit that a local build used.

    Raises:
        BuildError: ``TOOLKIT_NOT_PINNED``: it was made of other wheels than this checkout pins.
    """
    if asked is not None or record.toolchain.engine != "local" or not record.inputs:
        return asked
    wheels: tuple[PackagePin, ...] = pins.load().toolkit_of(toolkit.WHEELS_LINE)
    own = {pin.filename: pin.sha256 for pin in wheels}
    if own != record.inputs:
        raise BuildError(
            "TOOLKIT_NOT_PINNED",
            f"its toolkit was made of other wheels than those that build/pins.toml has: "
            f"{', '.join(sorted(set(record.inputs) ^ set(own))) or 'with other digests'}",
            hint="check out the farm as it was when the release was made",
        )
    return toolkit.WHEELS
