"""A published artifact → the same one, built again here from its ``BUILD.json``; do they agree?"""

from __future__ import annotations

import tempfile
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from farm import execute, pipeline, release
from farm.engines.docker import DockerImages, connect
from farm.errors import BuildError, EngineError, UsageError
from farm.pack import read_inventory
from farm.remote_release import opened
from farm.reproduce import clean_build, recorded_plan
from farm.reproduce.reproducibility import compare_tarballs
from farm.request import BuildRequest
from farm.tarball import build_record
from llama_loader.manifest import LLAMA_SERVER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from farm.engines.base import Engine, LineSink, Toolchain, Workspace
    from farm.plan import BuildPlan
    from farm.reproduce.reproducibility import Difference
    from farm.tarball.build_record import BuildRecord
    from farm.terminal.report import BuildReport
    from llama_loader.manifest import Artifact, Manifest

OUT: Final = pipeline.STATE / "rebuilt"
"""Where the rebuilt tarball stays."""


@dataclass(frozen=True)
class RebuildRequest:
    """What a person asked for.

    Attributes:
        release: a folder, a manifest, or the URL of either.
        artifact: its name; may be left out where the release has one server.
        sha256: what the manifest's bytes must come to.
        source: the tree, for what was built from a folder.
        remote: the repository that its source is taken from, where that is not llama.cpp's own.
        image: another devel image; what its compiler makes is compared all the same.
        toolkit: as for ``invoke build-cuda``.
        jobs: compilers at a time.
    """

    release: str
    artifact: str | None = None
    sha256: str | None = None
    source: Path | None = None
    remote: str | None = None
    image: str | None = None
    toolkit: str | None = None
    jobs: int | None = None


def rebuild(asked: RebuildRequest, report: BuildReport) -> None:
    """Verify the artifact, build it again without a compiler cache, and compare every byte.

    Raises:
        UsageError: the release has no such artifact, or not one alone.
        SourceError: the release or the source cannot be had, or is not the recorded one.
        PackError: the release is not what its manifest says.
        EngineError: the image or the compiler cannot be had.
        BuildError: ``NOT_IDENTICAL``, ``RECIPE_DIFFERS``, ``COMPILER_DIFFERS``, or a step failed.
    """

    def wanted(manifest: Manifest) -> Artifact:
        return choose(manifest, asked.artifact)

    with opened(asked.release, sha256=asked.sha256, wanted=wanted) as folder:
        manifest = release.load(folder)
        listed = wanted(manifest)
        release.verify_artifact(folder, manifest, listed, report.note)
        report.say(f"published: {listed.name}, as its manifest says")
        published = folder / listed.name
        record = build_record.decode(read_inventory(published).build_json, what=listed.name)
        rebuilt = _build(record, listed, asked, report)
        _tell(listed, compare_tarballs(published, rebuilt), rebuilt, report)


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
    tree = recorded_plan.source_of(record.source, asked.source, remote=asked.remote)
    if tree.note:
        report.note(tree.note)
    recorded_plan.require_parts(record, tree.tree)
    plan = recorded_plan.plan_of(record, tree, listed.format)
    report.say(f"source: llama.cpp b{tree.build} from {tree.origin}")
    request = BuildRequest(
        line=plan.line.name,
        engine=record.toolchain.engine,
        image=_image(record, asked, report),
        toolkit=recorded_plan.toolkit_of(record, asked.toolkit),
        jobs=asked.jobs,
        cached=False,
    )
    with (
        tempfile.TemporaryDirectory(prefix="llama-farm-rebuild-") as name,
        closing(pipeline.choose_engine(request, plan.line, report)) as engine,
    ):
        checked = _SameCompilers(engine, record.toolchain, report, strict=asked.image is None)
        folder = Path(name) / "rebuilt"
        folder.mkdir()
        clean_build.tree(plan, checked, request, report, folder, told=_named_as(record.toolchain))
        return release.pack_tree(folder, OUT, listed.format)


def _image(record: BuildRecord, asked: RebuildRequest, report: BuildReport) -> str | None:
    """Return the devel image by a name that the engine has it under.

    Raises:
        EngineError: ``IMAGE_UNAVAILABLE`` or ``IMAGE_DIFFERS``.
    """
    toolchain = record.toolchain
    if toolchain.engine != "docker":
        return asked.image
    if asked.image is not None:
        report.note(
            f"note[OTHER_IMAGE]: built on {toolchain.image} ({toolchain.image_digest}), rebuilt on "
            f"{asked.image}"
        )
        return asked.image
    with closing(connect()) as client:
        images = DockerImages(client)
        if toolchain.image_digest and images.find(toolchain.image_digest):
            return toolchain.image_digest
        reference = toolchain.image or ""
        found = images.find(reference) or images.pull(reference)
    if found.id == toolchain.image_digest:
        return reference
    raise EngineError(
        "IMAGE_DIFFERS",
        f"it was built on {reference} as {toolchain.image_digest}; here that name is {found.id}",
        hint="--image IMG builds on another one and says what comes out differently",
    )


def _named_as(recorded: Toolchain) -> Callable[[Toolchain], Toolchain]:
    """Tell of a toolchain as the record does.

    An image is called by its recorded name if it is that very image: a name decides no byte. Of
    the programs those are told that the record has: an older farm looked at fewer.
    """

    def told(found: Toolchain) -> Toolchain:
        same = found.image_digest is not None and found.image_digest == recorded.image_digest
        programs = {
            name: found.programs[name] for name in recorded.programs if name in found.programs
        }
        return replace(found, image=recorded.image if same else found.image, programs=programs)

    return told


@dataclass(frozen=True)
class _SameCompilers:
    """An engine whose compilers are looked at before anything is compiled."""

    engine: Engine
    recorded: Toolchain
    report: BuildReport
    strict: bool

    @property
    def name(self) -> str:
        """The engine's."""
        return self.engine.name

    def identity(self, plan: BuildPlan) -> str:
        """Return the engine's."""
        return self.engine.identity(plan)

    @contextmanager
    def open(self, plan: BuildPlan, sink: LineSink) -> Iterator[Workspace]:
        """Open a workspace.

        Raises:
            EngineError: ``COMPILER_DIFFERS``: another program would compile.
        """
        with self.engine.open(plan, sink) as workspace:
            self._check(execute.programs(plan, workspace))
            yield workspace

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()

    def _check(self, found: dict[str, str]) -> None:
        recorded = self.recorded.programs
        other = sorted(name for name in recorded if recorded[name] != found.get(name))
        if not other:
            return
        said = (
            f"{', '.join(other)} of {self.recorded.compiler} are not the programs that BUILD.json "
            "names"
        )
        if self.strict:
            raise EngineError(
                "COMPILER_DIFFERS",
                f"another compiler is here: {said}",
                hint="the distribution may have newer packages by now; in a container, --image IMG "
                "builds all the same and says what comes out differently",
            )
        self.report.note(f"note[COMPILER_DIFFERS]: {said}")


def _tell(
    listed: Artifact, found: tuple[Difference, ...], rebuilt: Path, report: BuildReport
) -> None:
    if not found:
        report.say(f"identical: {listed.name}, {listed.size} bytes, sha256 {listed.sha256}")
        return
    for difference in found:
        report.say(f"  differs: {difference.render()}")
    files = len({difference.path for difference in found})
    raise BuildError(
        "NOT_IDENTICAL",
        f"{listed.name}: {files} of its {len(listed.files)} files differ when it is built again",
        hint=f"the rebuilt tarball is {rebuilt}",
    )
