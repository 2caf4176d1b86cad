"""Build a published tarball again from its ``BUILD.json``, and compare every byte.

The commands of a record are never run: this checkout's own plan must give the same commands
(docs/decisions/0030-rebuild-from-own-recipe.md).
"""

from __future__ import annotations

import re
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from farm import execute, pipeline, release, source, targets
from farm.engines.docker import DockerImages, connect
from farm.errors import BuildError, EngineError, SourceError, UsageError
from farm.inputs import images, patches, pins, recipe, toolkit
from farm.options import BuildRequest
from farm.pack import read_inventory
from farm.plan import BuildPlan
from farm.remote_release import opened
from farm.reproduce import KEPT, clean_tree, compare
from farm.tarball import build_record, parts
from llama_loader.manifest import LLAMA_SERVER

if TYPE_CHECKING:
    from farm.options import RebuildRequest
    from farm.plan import Engine, Toolchain
    from farm.source import Source
    from farm.tarball.build_record import BuildRecord, SourceRecord
    from farm.terminal.progress import BuildReport
    from llama_loader.manifest import Artifact, Manifest

OUT: Final = pipeline.STATE / "rebuilt"
"""Where the rebuilt tarball stays."""
_PYPI: Final = re.compile(
    r"pypi:(?P<file>(?P<package>[^#/]+)-(?P<version>[^#/-]+)\.tar\.gz)#(?P<subdir>.+)"
)
_GIT: Final = re.compile(r"git\+(?P<remote>.+)@(?P<ref>[^@]+)")
_MAX_ARCHIVE: Final = 1 << 30
"""Bytes of a source archive; the largest seen has 77 MB. Its digest is what is checked."""


def rebuild(asked: RebuildRequest, report: BuildReport) -> None:
    """Verify the artifact, build it again without a compiler cache, and compare every byte.

    Raises:
        UsageError: the release has no such artifact, or not one alone.
        SourceError: the release or the source is missing, or is not the recorded one.
        PackError: the release is not what its manifest says.
        EngineError: the image or the compiler is missing.
        BuildError: ``NOT_IDENTICAL``, ``RECIPE_DIFFERS``, ``COMPILER_DIFFERS``, or a step failed.
    """

    def wanted(manifest: Manifest) -> Artifact:
        return choose(manifest, asked.artifact)

    with opened(asked.release, sha256=asked.sha256, wanted=wanted) as folder:
        manifest = release.load(folder)
        listed = wanted(manifest)
        release.verify_artifact(folder, manifest, listed, report.say)
        report.say(f"published: {listed.name}, as its manifest says")
        published = folder / listed.name
        record = build_record.decode(read_inventory(published).build_json, what=listed.name)
        rebuilt = _build(record, listed, asked, report)
        found = compare(published, rebuilt, KEPT / "rebuilt", report.say)
    if found:
        raise BuildError(
            "NOT_IDENTICAL",
            f"{listed.name}: {len(found)} of its {len(listed.files)} files differ when it is built "
            "again",
            hint=f"the rebuilt tarball is {rebuilt}",
        )
    report.say(f"identical: {listed.name}, {listed.size} bytes, sha256 {listed.sha256}")


def choose(manifest: Manifest, name: str | None) -> Artifact:
    """Return the artifact of that name; without one, the only server of the release.

    Raises:
        UsageError: ``ARTIFACT_UNKNOWN``, ``ARTIFACT_NOT_BUILT`` or ``ARTIFACT_NEEDED``.
    """
    servers = {one.name: one for one in manifest.artifacts if one.kind == LLAMA_SERVER}
    known = f"{manifest.release} has {', '.join(servers)}"
    if name is None:
        if len(servers) == 1:
            return next(iter(servers.values()))
        raise UsageError(
            "ARTIFACT_NEEDED", f"which of {len(servers)} artifacts?", hint=f"--artifact: {known}"
        )
    if name in servers:
        return servers[name]
    if any(one.name == name for one in manifest.artifacts):
        raise UsageError(
            "ARTIFACT_NOT_BUILT",
            f"{name} holds NVIDIA's own libraries: it was packed, not compiled",
            hint="invoke cuda-runtime packs it from the pinned wheels",
        )
    raise UsageError("ARTIFACT_UNKNOWN", f"the release has no {name}", hint=known)


def _build(
    record: BuildRecord, listed: Artifact, asked: RebuildRequest, report: BuildReport
) -> Path:
    tree = source_of(record.source, asked.source, remote=asked.remote)
    if tree.note:
        report.say(tree.note)
    _require_parts(record, tree.tree)
    plan = plan_of(record, tree, listed.format)
    report.say(f"source: llama.cpp b{tree.build} from {tree.origin}")
    is_of_wheels = record.toolchain.engine == "local" and bool(record.inputs)
    request = BuildRequest(
        line=plan.line.name,
        engine=record.toolchain.engine,
        image=_image(record.toolchain, asked, report),
        toolkit=asked.toolkit or (toolkit.WHEELS if is_of_wheels else None),
        jobs=asked.jobs,
        cached=False,
    )
    with (
        tempfile.TemporaryDirectory(prefix="llama-farm-rebuild-") as name,
        closing(pipeline.choose_engine(request, plan.line, report)) as engine,
    ):
        strict = asked.image is None
        _require_same_compilers(plan, engine, record.toolchain, report, strict=strict)
        folder = Path(name) / "rebuilt"
        folder.mkdir()

        def told(found: Toolchain) -> Toolchain:
            """Return the facts with the image's recorded name: a name decides no byte."""
            same = found.image_digest is not None
            same = same and found.image_digest == record.toolchain.image_digest
            return replace(found, image=record.toolchain.image) if same else found

        clean_tree(plan, engine, request, report, folder, told=told)
        return release.pack_tree(folder, OUT, listed.format)


def source_of(record: SourceRecord, folder: Path | None, *, remote: str | None = None) -> Source:
    """Fetch the source that a record names.

    Args:
        record: of the source.
        folder: the tree, if it was built from a folder.
        remote: a repository that the person trusts beside llama.cpp's own.

    Raises:
        SourceError: it cannot be fetched, or is not the recorded one; the error names it.
            ``REMOTE_NOT_TRUSTED``: only the record names its repository, whose build scripts would
            run here. ``PATCHES_DIFFER``: this checkout has other patches.
        UsageError: its repository has no such commit, or ``folder`` is no source tree.
    """
    chosen = patches.recorded(record.patches)
    if folder is not None:
        found = source.from_folder(folder)
    elif match := _PYPI.fullmatch(record.origin):
        found = source.from_archive(_pin(record, match))
    elif (match := _GIT.fullmatch(record.origin)) and record.commit:
        if match["remote"] not in (source.GIT_REMOTE, remote):
            raise SourceError(
                "REMOTE_NOT_TRUSTED",
                f"BUILD.json names {match['remote']!r} for its source, not llama.cpp's own "
                "repository",
                hint="if you trust it, name it: --remote URL; or a tree that you have: "
                "--source DIR",
            )
        found = source.from_ref(record.commit, remote=match["remote"])
    else:
        raise SourceError(
            "SOURCE_NOT_PUBLISHED",
            f"it was built from {record.origin}, which only its builder has",
            hint="--source DIR names that tree; its parts are compared with those of BUILD.json",
        )
    return replace(
        source.patched(found, chosen),
        version=record.version,
        build=record.build,
        commit=record.commit,
        origin=record.origin,
        sha256=record.sha256,
        project=record.project,
        build_assumed=record.build_assumed,
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


def _require_parts(record: BuildRecord, tree: Path) -> None:
    """Refuse a source tree whose parts are not the recorded ones.

    The toolkit's part in the binaries (CUB) is in no source tree.
    """
    if record.parts is None:
        return
    recorded = {part.path: part.sha256 for part in record.parts}
    there = {part.path: part.sha256 for part in parts.survey(tree).parts}
    differing = [path for path in there if recorded.get(path) != there[path]]
    if differing:
        raise SourceError(
            "SOURCE_DIFFERS",
            f"the source is not what BUILD.json names: {', '.join(sorted(differing))} differ",
        )


def plan_of(record: BuildRecord, tree: Source, archive_format: str) -> BuildPlan:
    """Make the plan that a record describes.

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
    own = {
        "defines": dict(plan.defines()),
        "commands": tuple(step.argv for step in plan.steps(build_record.LAYOUT, jobs=1)),
        "environment": plan.environment(build_record.LAYOUT, ccache_dir=None),
        "recipe_sha256": recipe.sha256(),
    }
    differing = [name for name, value in own.items() if getattr(record, name) != value]
    builder = images.BUILDER_DOCKERFILE.name
    is_docker = record.toolchain.engine == "docker"
    if is_docker and record.inputs.get(builder) != images.builder_sha256():
        differing.append(f"inputs.{builder}")
    if differing:
        raise BuildError(
            "RECIPE_DIFFERS",
            f"this checkout of the farm builds in another way: {', '.join(differing)} of BUILD.json"
            " are not its own",
            hint="check out the farm as it was when the release was made",
        )
    return plan


def _image(recorded: Toolchain, asked: RebuildRequest, report: BuildReport) -> str | None:
    """Return the devel image under a name that the engine knows."""
    if recorded.engine != "docker":
        return asked.image
    reference = recorded.image or ""
    if asked.image is not None:
        report.say(
            f"note[OTHER_IMAGE]: built on {reference} ({recorded.image_digest}), rebuilt on "
            f"{asked.image}"
        )
        return asked.image
    with closing(connect()) as client:
        found_by = DockerImages(client)
        if recorded.image_digest and found_by.find(recorded.image_digest):
            return recorded.image_digest
        found = found_by.find(reference) or found_by.pull(reference)
    if found.id == recorded.image_digest:
        return reference
    raise EngineError(
        "IMAGE_DIFFERS",
        f"it was built on {reference} as {recorded.image_digest}; here that name is {found.id}",
        hint="--image IMG builds on another one and says what comes out differently",
    )


def _require_same_compilers(
    plan: BuildPlan, engine: Engine, recorded: Toolchain, report: BuildReport, *, strict: bool
) -> None:
    """Check the compilers' digests before anything is compiled.

    A difference is an error, or a note if the person chose the image.
    """
    with engine.open(plan, report.say) as workspace:
        found = execute.programs(plan, workspace)
    other = sorted({*recorded.programs.items()} ^ {*found.items()})
    if not other:
        return
    names = ", ".join(dict.fromkeys(name for name, _ in other))
    said = f"{names} of {recorded.compiler} are not the programs that BUILD.json names"
    if strict:
        raise EngineError(
            "COMPILER_DIFFERS",
            f"another compiler is here: {said}",
            hint="the distribution may have newer packages by now, or build/pins.toml other "
            "wheels; in a container, --image IMG builds all the same and says what differs",
        )
    report.say(f"note[COMPILER_DIFFERS]: {said}")
