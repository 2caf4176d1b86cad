"""Build a set twice from nothing, or a published tarball again from its ``BUILD.json``; compare.

No build of a comparison uses a compiler cache or changes the checkout's own trees and journal. The
commands of a record are never run: this checkout's own plan must give the same commands
(docs/decisions/0030-rebuild-from-own-recipe.md).
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from farm import durable, execute, pipeline, release, source, targets
from farm.engines.docker.connection import connect
from farm.engines.docker.inventory import DockerImages
from farm.errors import BuildError, EngineError, PackError, SourceError, UsageError, remark
from farm.inputs import images, patches, pins, toolkit
from farm.kept import KeptTree
from farm.options import BuildRequest, RebuildRequest, require_known
from farm.pack import ROOT, SHIPPED, Packed, is_elf, read_inventory
from farm.plan import TARGETS, BuildEngine, BuildPlan, Toolchain
from farm.publish.gate import opened
from farm.request import ENGINES, RPC, choose_source, definitions, resolve
from farm.source import SourceTree
from farm.tarball import archive, build_record, parts
from farm.tarball.build_record import BuildRecord
from farm.targets import ArchSet, Line
from farm.terminal.progress import BUILT, BuildReport, Fleet
from llama_loader import cgroups
from llama_loader import manifest as schema
from llama_loader.manifest import LLAMA_SERVER, Artifact, Manifest

KEPT: Final = pipeline.STATE / "reproducible"
"""Both versions of the files that differ, for a person to look at."""
OUT: Final = pipeline.STATE / "rebuilt"
"""Where a rebuilt tarball stays."""
_LOGS: Final = pipeline.STATE / "logs"
SIDES: Final = ("first", "second")
_DIFFOSCOPE: Final = "diffoscope"
_DIFFOSCOPE_SECONDS: Final = 600
_EXPLAINED: Final = 8 << 20
"""Bytes of a file that diffoscope reads; of 300 MiB of zeros it takes 3.6 GiB of memory."""
_LIMITED: Final = 'ulimit -v 1048576; ulimit -f 131072; exec "$0" "$@"'
"""diffoscope, with at most 1 GiB of memory (KiB), and 64 MiB in a file (blocks of 512 bytes)."""
_DIFFERENT: Final = 1
"""diffoscope's exit status when it did its work and found differences."""
_FACTS: Final = ("other bytes, sha256", "mode", "time in the archive")
"""What is compared of two members of one name."""
_Facts = tuple[str, str, str]
_OF_PLAN: Final = ("line", "defines", "commands", "environment", "recipe_sha256")
"""The fields of a record that a plan decides."""
_PYPI: Final = re.compile(
    r"pypi:(?P<file>(?P<package>[\w.-]{1,99})-(?P<version>[\w.]{1,99}\.(?P<build>[0-9]{1,6}))\.tar\.gz)#(?P<subdir>[\w./-]*\w)"
)
_GIT: Final = re.compile(r"git\+(?P<remote>.+)@(?P<ref>[^@]+)")
_OPTION: Final = re.compile(rf"(GGML|LLAMA)_\w+=[\w.]*|{patches.CPU_VARIANTS}=\w+(;\w+)*")
"""What a record may define: llama.cpp's own options, and the farm's. CMake's can name programs."""


def prove(request: BuildRequest, report: BuildReport) -> None:
    """Build each set of a request twice and compare the tarballs.

    ``jobs`` of the request is for the first build, the second has one more.

    Raises:
        UsageError: the request names something that does not exist or cannot be built.
        BuildError: ``NOT_REPRODUCIBLE``: the files that differ were reported; or a step failed.
        EngineError: the engine is out of reach or went away.
    """
    require_known("ENGINE_UNKNOWN", "--engine", request.engine, ENGINES[:-1])
    line, sets = resolve(request)
    if line is not None and request.engine != "local" and request.image is None:
        request = replace(pipeline.with_image(request, line.name, report), line=line.name)
    differing = [one.name for one in sets if not _is_same_twice(request, line, one, sets, report)]
    if differing:
        raise BuildError("NOT_REPRODUCIBLE", differing=", ".join(differing), kept=KEPT)


def _is_same_twice(
    request: BuildRequest,
    line: Line | None,
    arch_set: ArchSet,
    sets: tuple[ArchSet, ...],
    report: BuildReport,
) -> bool:
    """Build one of the sets twice; the first build refuses a line that cannot build all of them."""
    made = []
    with tempfile.TemporaryDirectory(prefix="llama-farm-twice-") as name:
        for jobs, side in enumerate(SIDES, request.jobs or cgroups.processors()):
            asked = replace(request, jobs=jobs, fresh=True)
            with (
                closing(pipeline.choose_engine(asked, line, report)) as engine,
                choose_source(asked).private() as own,
            ):
                settled = pipeline.settled(engine, asked, line, report, sets)
                plan = BuildPlan(arch_set, settled, own)
                report.say(f"{plan.key}: {side} build, -j {jobs}, no compiler cache")
                made.append(_tarball(plan, engine, asked, report, Path(name) / side))
        if made[0].sha256 == made[1].sha256:
            report.say(f"identical: {plan.key}, twice the same bytes")
            return True
        compare(made[0].path, made[1].path, KEPT / plan.key, report.say)
    return False


def _tarball(
    plan: BuildPlan,
    engine: BuildEngine,
    request: BuildRequest,
    report: BuildReport,
    place: Path,
    recorded: Toolchain | None = None,
) -> Packed:
    """Build a plan without a compiler cache; return its tarball in ``place``.

    ``recorded``: the compilers of the first build. If the image is theirs, the record gets the name
    that it had then: a name decides no byte.
    """
    # one build as the only set of a table; it is no run whose times are kept
    with (
        tempfile.TemporaryDirectory(prefix="llama-farm-tree-") as folder,
        Fleet(report, {plan.key: None}, many=False) as fleet,
    ):
        kept = KeptTree(plan, "", Path(folder))
        fleet.begin(plan.key, engine.name)
        logs, reporter = _LOGS / place.name, partial(fleet.hear, plan.key)
        with execute.execute(plan, engine, logs=logs, reporter=reporter) as built:
            tools = built.toolchain
            if recorded and tools.image_digest and tools.image_digest == recorded.image_digest:
                tools = replace(tools, image=recorded.image)
            pipeline.keep(kept, replace(built, toolchain=tools), request, report)
        fleet.end(plan.key, BUILT)
        return kept.pack(place)


def rebuild(asked: RebuildRequest, report: BuildReport) -> None:
    """Verify the artifact, build it again without a compiler cache, and compare every byte.

    Raises:
        UsageError: the release has no such artifact, or not one alone.
        SourceError: the release or the source is missing, or is not the recorded one.
        PackError: the release differs from its manifest.
        EngineError: the image or the compiler is missing.
        BuildError: ``NOT_IDENTICAL``, ``RECIPE_DIFFERS``, ``COMPILER_DIFFERS``, or a step failed.
    """

    def wanted(manifest: Manifest) -> Artifact:
        return choose(manifest, asked.artifact)

    with opened(asked.release, sha256=asked.sha256, wanted=wanted) as (folder, content):
        manifest = schema.parse(content, what=asked.release)
        release.require_whole(manifest, asked.release)
        listed = wanted(manifest)
        release.verify_artifact(folder, manifest, listed, report.say)
        report.say(f"published: {listed.name}, as its manifest says")
        published = folder / listed.name
        record = build_record.decode(read_inventory(published).build_json, what=listed.name)
        rebuilt = _build(record, listed, asked, report)
        if rebuilt.sha256 != listed.sha256:
            found = compare(published, rebuilt.path, KEPT / "rebuilt", report.say)
            if not found:
                raise PackError("RELEASE_MISMATCH/replaced", name=listed.name)
            raise BuildError(
                "NOT_IDENTICAL",
                name=listed.name,
                found=len(found),
                files=len(listed.files),
                rebuilt=rebuilt.path,
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
        raise UsageError("ARTIFACT_NEEDED", count=len(servers), known=known)
    if name in servers:
        return servers[name]
    if any(one.name == name for one in manifest.artifacts):
        raise UsageError("ARTIFACT_NOT_BUILT", name=name)
    raise UsageError("ARTIFACT_UNKNOWN", name=name, hint=known)


def _build(
    record: BuildRecord, listed: Artifact, asked: RebuildRequest, report: BuildReport
) -> Packed:
    if asked.engine != record.toolchain.engine:
        raise UsageError("ENGINE_DIFFERS", listed=listed, record=record, asked=asked)
    # a copy that no other user can write to: what is compared and built is one tree
    with source_of(record.source, asked.source, remote=asked.remote).private() as tree:
        for note in (tree.note or "").splitlines():
            report.say(note)
        if record.parts is not None:  # the toolkit's part (CUB) is in no source tree
            recorded = {part.path: part.sha256 for part in record.parts}
            there = {part.path: part.sha256 for part in parts.survey(tree.tree).parts}
            differing = sorted(path for path in there if recorded.get(path) != there[path])
            if differing:
                raise SourceError("SOURCE_DIFFERS", differing=", ".join(differing))
        plan = plan_of(record, tree, listed.format)
        if plan.line.glibc != (own := targets.load().line(plan.line.name).glibc):
            report.say(remark("GLIBC_OF_RECORD", recorded=plan.line.glibc, own=own))
        report.say(f"source: llama.cpp b{tree.build} from {tree.origin}")
        is_of_wheels = record.toolchain.engine == "local" and bool(record.inputs)
        request = BuildRequest(
            line=plan.line.name,
            engine=record.toolchain.engine,
            image=_image(record.toolchain, asked, report),
            toolkit=asked.toolkit or (toolkit.WHEELS if is_of_wheels else None),
            jobs=asked.jobs,
            fresh=True,
        )
        with closing(pipeline.choose_engine(request, plan.line, report)) as engine:
            strict = asked.image is None
            _require_same_compilers(plan, engine, record.toolchain, report, strict=strict)
            return _tarball(plan, engine, request, report, OUT, record.toolchain)


def source_of(
    record: schema.Source, folder: Path | None, *, remote: str | None = None
) -> SourceTree:
    """Fetch the source that a record names, or read its ``folder``, if it was built from one.

    ``remote`` is a repository that the person trusts beside llama.cpp's own.

    Raises:
        SourceError: it cannot be fetched, or is not the recorded one; the error names it.
            ``REMOTE_NOT_TRUSTED``: only the record names its repository or package, whose build
            scripts would run here. ``PATCHES_DIFFER``: this checkout has other patches.
        UsageError: its repository has no such commit, or ``folder`` is no source tree.
    """
    chosen = patches.recorded(record.patches)
    if folder is not None:
        found = source.from_folder(folder)
    elif match := _PYPI.fullmatch(record.origin):
        pin, named = pins.load().source, match["package"]
        if named != pin.package:
            told = "you can unpack it"
            raise SourceError("REMOTE_NOT_TRUSTED", named=named, kind="package", trusting=told)
        if record.sha256 is None:
            raise SourceError("SOURCE_NOT_PINNED", origin=record.origin)
        pin = msgspec.structs.replace(
            pin,
            version=match["version"],
            filename=match["file"],
            size=pins.MOST_SOURCE,  # the record has none; its digest is what is checked
            sha256=record.sha256,
            subdir=match["subdir"],
            build=int(match["build"]),
            llama_version="",  # its own tree tells
            without_patches=(),
        )
        found = source.from_archive(pin)
    elif (match := _GIT.fullmatch(record.origin)) and record.commit:
        named = match["remote"]
        if named not in (source.GIT_REMOTE, remote):
            told = "name it: --remote URL"
            raise SourceError("REMOTE_NOT_TRUSTED", named=named, kind="repository", trusting=told)
        found = source.from_ref(record.commit, remote=named)
    else:
        raise SourceError("SOURCE_NOT_PUBLISHED", origin=record.origin)
    found = replace(source.patched(found, chosen), origin=record.origin)  # a ref may move
    if record.build_assumed:
        found = source.assume_build(found, record.build)
    if folder is not None:  # it tells no sha256, and without a history no build and commit
        build, commit = found.build or record.build, found.commit or record.commit
        whole = replace(found, build=build, commit=commit, sha256=record.sha256)
        note = remark("SOURCE_AS_RECORDED", folder=folder)
        found = found if whole == found else replace(whole, note=note)
    facts = msgspec.structs.asdict(build_record.source_of(found))
    differing = [name for name, it in facts.items() if it != getattr(record, name)]
    if differing:
        raise SourceError("SOURCE_DIFFERS", differing=", ".join(f"its {one}" for one in differing))
    return found


def plan_of(record: BuildRecord, tree: SourceTree, archive_format: str) -> BuildPlan:
    """Make the plan that a record describes.

    Raises:
        UsageError: this checkout does not have the line, or its builds cannot make what
            the record defines.
        BuildError: ``RECIPE_DIFFERS``: this checkout would give the compilers other options, or
            takes what the record adds from a person alone.
    """
    added = [f"{name}={value}" for name, value in record.defined.items()]
    ours = {patches.CPU_VARIANTS: record.defined.get(patches.CPU_VARIANTS)} | RPC
    definitions(f"{name}={value}" for name, value in record.defined.items()
                if ours.get(name) != value)  # fmt: skip
    foreign = [one for one in added if not _OPTION.fullmatch(one)]
    foreign += [one for one in record.targets if one not in (*TARGETS, *SHIPPED)]
    if foreign:
        raise BuildError("RECIPE_DIFFERS/record", foreign=", ".join(foreign)[:200])
    line = targets.load().line(record.line.name)
    line = msgspec.structs.replace(line, glibc=record.line.glibc)  # an image's may be newer
    arch_set = targets.ArchSet(record.arch_set, record.archs, archive_format)
    plan = BuildPlan(arch_set, line, tree, record.targets, tuple(record.defined.items()))
    own = build_record.of(plan, record.toolchain)
    differing = [name for name in _OF_PLAN if getattr(own, name) != getattr(record, name)]
    builder = images.BUILDER_DOCKERFILE.name
    is_docker = record.toolchain.engine == "docker"
    if is_docker and record.inputs.get(builder) != images.builder_sha256():
        differing.append(f"inputs.{builder}")
    if differing:
        raise BuildError("RECIPE_DIFFERS", differing=", ".join(differing))
    return plan


def _image(recorded: Toolchain, asked: RebuildRequest, report: BuildReport) -> str | None:
    """Return the devel image under a name that the engine has.

    The record alone chooses one that ``build/pins.toml`` pins or this user's farm made, no other.
    """
    if recorded.engine != "docker":
        return asked.image
    reference = recorded.image or ""
    if asked.image is not None:
        report.say(remark("OTHER_IMAGE", recorded=recorded, image=asked.image))
        return asked.image
    with closing(connect()) as client:
        store = DockerImages(client)
        found = store.find(recorded.image_digest) if recorded.image_digest else None
        if found is None or not images.is_trusted(found, store):
            if reference not in [pin.reference for pin in pins.load().images]:
                raise EngineError("IMAGE_NOT_TRUSTED", reference=reference)
            found = store.find(reference) or store.pull(reference)
    if found.id == recorded.image_digest:
        return found.id
    raise EngineError("IMAGE_DIFFERS", reference=reference, recorded=recorded, found=found)


def _require_same_compilers(
    plan: BuildPlan, engine: BuildEngine, recorded: Toolchain, report: BuildReport, *, strict: bool
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
        raise EngineError("COMPILER_DIFFERS", said=said)
    report.say(f"note[COMPILER_DIFFERS]: {said}")


def compare(first: Path, second: Path, kept: Path, say: Callable[[str], None]) -> tuple[str, ...]:
    """Compare two release tarballs; return a line for each file that differs.

    The folder ``kept`` is replaced: by both versions of what differs, and diffoscope's report.

    Raises:
        PackError: one of them is damaged, or holds what no release may.
        BuildError: diffoscope failed, or took more than ten minutes.
        OSError: a file cannot be read or written.
    """
    # another user may have replaced a verified one
    if durable.sha256(first, follow=False, most=archive.MAX_BYTES) == durable.sha256(second):
        return ()
    durable.remove(kept)
    one, other = (
        _unpack(tarball, kept / side) for tarball, side in zip((first, second), SIDES, strict=True)
    )
    paths = sorted({*one, *other})
    found = []
    for path in (path for path in paths if one.get(path) != other.get(path)):
        if path not in one or path not in other:
            found.append(f"{path}: only the {'first' if path in one else 'second'} has it")
            continue
        facts = zip(_FACTS, one[path], other[path], strict=True)
        differs = (f"{what} {here} / {there}" for what, here, there in facts if here != there)
        found.append(f"{path}: {next(differs)}")
    if not found:
        order = "members in another order" if [*one] != [*other] else "the same members"
        found = [f"{second.name}: {order}, in other compressed bytes"]
    for line in found:
        say(f"  differs: {line}")
    for path in one.keys() & other.keys():
        if one[path][0] == other[path][0]:
            for side in SIDES:
                (kept / side / path).unlink()
    _explain(kept, say)
    return tuple(found)


def _unpack(tarball: Path, folder: Path) -> dict[str, _Facts]:
    """Unpack a release's tarball, and return the ``_FACTS`` of each member."""
    found = {}
    folder.mkdir(parents=True)
    try:
        with durable.open_regular(tarball, follow=False, most=archive.MAX_BYTES) as raw:
            archive_format = archive.format_of(tarball.name)
            for member in archive.members(raw, archive_format, what=tarball.name, root=ROOT):
                place = folder / member.path
                place.parent.mkdir(parents=True, exist_ok=True)
                with place.open("wb") as out:
                    shutil.copyfileobj(member.stream, out, archive.BLOCK)
                facts = (durable.sha256(place), f"{member.mode:04o}", str(member.mtime))
                found[member.path] = facts
    except archive.DAMAGE as error:
        raise PackError("ARCHIVE_DAMAGED", name=tarball.name, error=error) from error
    return found


def _is_tar(path: Path) -> bool:
    """Whether a small file begins with a tar's header; ``is_tarfile`` may read on for hours."""
    with suppress(tarfile.HeaderError):
        head = path.read_bytes()[: tarfile.BLOCKSIZE]
        return bool(tarfile.TarInfo.frombuf(head, "utf-8", "replace"))
    return False


def _explain(kept: Path, say: Callable[[str], None]) -> None:
    """Let diffoscope write its report on both versions, if it is installed.

    Their author can be another person. So it gets limits, no variable of ours, and of the files the
    small programs and libraries alone: it unpacks an archive to any size, also one that begins as
    a program does. What it started ends with it.
    """
    program, report = shutil.which(_DIFFOSCOPE), kept.absolute() / "diffoscope.txt"
    if program is None:
        say(remark("NO_DIFFOSCOPE", kept=kept))
        return
    for path in filter(Path.is_file, [*kept.rglob("*")]):
        if path.stat().st_size > _EXPLAINED or not is_elf(path) or _is_tar(path):
            aside = kept / "unexplained" / path.relative_to(kept)
            aside.parent.mkdir(parents=True, exist_ok=True)
            path.rename(aside)
            say(remark("NO_DIFFOSCOPE/file", aside=aside, most=_EXPLAINED >> 20))
    options = ("--exclude-directory-metadata=recursive", "--text", str(report), *SIDES)
    path_variable = os.environ.get("PATH", os.defpath)
    with (
        tempfile.TemporaryDirectory(prefix="llama-farm-diffoscope-") as own,
        subprocess.Popen(
            ["/bin/sh", "-c", _LIMITED, program, *options],
            cwd=kept,
            env={"PATH": path_variable, "LANG": "C.UTF-8", "TMPDIR": own},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        try:
            _, problem = process.communicate(timeout=_DIFFOSCOPE_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise BuildError("DIFFOSCOPE_SLOW", seconds=_DIFFOSCOPE_SECONDS) from error
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode not in (0, _DIFFERENT):
        last = problem.strip().splitlines()[-1:] or ["no message"]
        raise BuildError("DIFFOSCOPE_FAILED", last=last[0])
    if process.returncode == _DIFFERENT:
        say(f"diffoscope's report: {report}")
