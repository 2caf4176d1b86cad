"""Check everything that can be known before the first compiler starts, then build.

All findings are reported at once. Every build begins with ``opened``; ``require_release`` checks a
whole release and the place that it will be published to.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from farm import cuda_runtime, durable, pipeline, release, run_lock, targets, trust
from farm.engines import shared_cache
from farm.engines.docker import DockerEngine
from farm.errors import BuildError, FarmError, PublishError, UsageError, raise_all, remark
from farm.inputs import pins
from farm.options import BuildRequest, Publication
from farm.pipeline import Made
from farm.plan import BuildEngine, BuildPlan
from farm.publish import channels, places
from farm.request import choose_source, options, resolve
from farm.source import SourceTree
from farm.tarball import build_record
from farm.targets import ArchSet, Line
from farm.terminal.progress import BuildReport
from llama_loader import disk
from llama_loader import manifest as schema
from llama_loader.errors import LoaderError
from llama_loader.manifest import CUDA_RUNTIME

RELEASE: Final = "release"
"""The value of ``--check --arch-set`` for all sets of the table ``[release]``."""
_SOURCE_COPIES: Final = 3
"""A build's folder holds the source, and of the host half less than twice as much beside it:
b11549 has 179 MB of source."""
_CODE_BYTES: Final = 500_000_000
"""For each architecture during the compilation: ``libggml-cuda.so`` has 152 MB of code for sm_90
(docs/size.md), its objects have as much, and the compiler cache keeps them compressed."""
_KEPT_BYTES: Final = 200_000_000
"""For each architecture in the kept tree and in the tarball, by the same figures."""


@dataclass
class Findings:
    """Collects errors, so that a check does not stop at the first one."""

    found: list[FarmError] = field(default_factory=list)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Keep an expected error of the block; the code after it continues without the result."""
        try:
            yield
        except FarmError as error:
            self.found.append(error)
        except LoaderError as error:  # of a manifest that lies at the place
            self.found.append(BuildError(error.code, error.message, hint=error.hint))


@dataclass(frozen=True)
class CheckedBuild:
    """A checked build, ready to start. ``engine`` is None for hosts of a cluster."""

    plans: list[BuildPlan]
    engine: BuildEngine | None


@contextmanager
def opened(
    request: BuildRequest, report: BuildReport, publication: Publication | None = None
) -> Iterator[CheckedBuild]:
    """Check a build and open its engine, which is closed when the context is left.

    An image that would have to be pulled is checked only if nothing else was found.

    Raises:
        FarmError: something prevents the build; the error shows all findings.
    """
    findings = Findings()
    line: Line | None = None
    sets: tuple[ArchSet, ...] = ()
    tree: SourceTree | None = None
    engine: BuildEngine | None = None
    with ExitStack() as stack:
        with findings.collecting():
            line, sets = resolve(request)
            if request.arch_set is None and request.archs is None:
                names = ", ".join(one.name for one in sets)
                report.say(f"sets: {names} (--arch-set or --archs names others)")
        with findings.collecting():
            if not request.fresh:
                shared_cache.check(report.say)
        with findings.collecting():
            named = request.source or request.assume_build is not None
            if named or (request.ref and not findings.found):
                tree = choose_source(request)
        with findings.collecting():
            if sets and request.engine != "dask":
                engine = stack.enter_context(closing(pipeline.choose_engine(request, line, report)))
        with findings.collecting():
            is_there = isinstance(engine, DockerEngine) and engine.has_image()
            if engine is not None and (is_there or not findings.found):
                line = pipeline.settled(engine, request, line, report, sets)
        with findings.collecting():
            if not findings.found:  # the pinned archive may have to be fetched
                tree = tree or choose_source(request)
        if tree is not None:
            _tell_source(tree, report)
        plans = _plans(request, line, sets, tree, findings)
        if plans and request.define:
            _tell_defined(plans[0], report)
        findings.found += out_findings(request.out, plans)
        findings.found += room_findings(request, plans, engine)
        if publication is not None:
            findings.found += publication_findings(publication, tree)
        raise_all(findings.found)
        yield CheckedBuild(plans, engine)


def build(request: BuildRequest, report: BuildReport) -> tuple[Made, ...]:
    """Build, pack and list everything that ``request`` names; return the tarballs.

    A set that fails does not stop the others; it is named at the end.

    Raises:
        UsageError: the request names something that does not exist or cannot be built; nothing was
            started, and the error shows all findings.
        BuildError: ``SET_IS_BEING_BUILT``: another run has the checkout or the folder.
        FarmError: a build, or the packing of one, failed.
    """
    with opened(request, report) as ready:
        run_lock.use(pipeline.STATE)
        durable.require_own_out(request.out, make=0o777)
        keys = [plan.key for plan in ready.plans]
        with (
            run_lock.held(keys, (pipeline.STATE / "locks", request.out)),
            ready.plans[0].source.private() as own,
        ):
            plans = [replace(plan, source=own) for plan in ready.plans]
            if ready.engine is not None:
                return pipeline.build_all(plans, ready.engine, request, report)
            from farm.cluster.dispatch import build_spread  # noqa: PLC0415 - an optional group

            return build_spread(plans, request, report)


def _plans(
    request: BuildRequest,
    line: Line | None,
    sets: tuple[ArchSet, ...],
    tree: SourceTree | None,
    findings: Findings,
) -> list[BuildPlan]:
    """Return the plans that can be made in spite of the findings."""
    if line is None and not findings.found:
        findings.found.append(UsageError("LINE_OF_IMAGE_UNKNOWN/tag"))
    if line is None or tree is None:
        return []
    chosen = options(request, tree.tree)
    return [BuildPlan(arch_set, line, tree, *chosen) for arch_set in sets]


def _tell_source(tree: SourceTree, report: BuildReport) -> None:
    for note in (tree.note or "").splitlines():
        report.say(note)
    commit = f" ({tree.short_commit})" if tree.commit else ""
    report.say(f"source: llama.cpp b{tree.build}{commit} from {tree.origin}")
    report.say(f"patches: {', '.join(one.name for one in tree.patches) or 'none'}")
    holes = pins.advisories_of(tree.build, pins.advisories())
    if holes and tree.build > 0:  # build 0 has a note of its own
        ids = ", ".join(one.id for one in holes)
        report.say(remark("KNOWN_ADVISORY/build", build=tree.build, ids=ids))


def _tell_defined(plan: BuildPlan, report: BuildReport) -> None:
    """Print further definitions; note each that no file of the source names to CMake."""
    report.say(
        f"defined: {', '.join(map('='.join, plan.defined)) or 'nothing more than every build'}"
    )
    unknown = {name for name, _ in plan.defined if not name.startswith(("CMAKE_", "FARM_"))}
    for path in plan.source.files():
        if (path.name == "CMakeLists.txt" or path.suffix == ".cmake") and not path.is_symlink():
            text = durable.head(path)
            unknown = {name for name in unknown if not re.search(rf"\b{name}\b", text)}
    for name in sorted(unknown):
        report.say(remark("DEFINE_UNKNOWN", name=name))


def out_findings(out: Path, plans: list[BuildPlan]) -> list[FarmError]:
    """Return the files in ``--out`` that prevent a build from being added to it."""
    try:
        there = durable.names(out) if out.exists() else []
    except NotADirectoryError:
        return [UsageError("OUT_NOT_FOLDER", out=out)]
    findings = Findings()
    with findings.collecting():
        durable.require_own_out(out)
    if not os.access(place := disk.nearest(out.absolute()), os.W_OK | os.X_OK):
        findings.found.append(UsageError("OUT_NOT_WRITABLE", out=out, place=place))
    replaced = {plan.artifact_name for plan in plans}
    own = build_record.source_of(plans[0].source) if plans else None
    for path in map(out.joinpath, there):
        with findings.collecting():
            if path.name == release.MANIFEST:
                try:
                    release.load(out)
                except LoaderError as error:
                    raise UsageError("OUT_MANIFEST_INVALID", manifest=path, error=error) from error
            elif path.name not in replaced and release.is_tarball(path.name):
                _require_source(path, own)
    return findings.found


def _require_source(path: Path, own: schema.Source | None) -> None:
    """Refuse a tarball that the farm did not make, or of another source than what will be built."""
    if cuda_runtime.is_one(path.name):
        return
    try:
        record = release.record_of(path)
    except FarmError as error:
        raise UsageError("OUT_HAS_FOREIGN_FILE", path=path, why=error.message) from error
    if own is not None and record.source != own:
        packed, ours = build_record.shown(record.source), build_record.shown(own)
        raise UsageError("SOURCES_MIXED/folder", path=path, source=packed, own=ours)


def room_findings(
    request: BuildRequest, plans: list[BuildPlan], engine: BuildEngine | None
) -> list[FarmError]:
    """Return the folders whose disk has too little room for the plans (rule: docs/building.md)."""
    if not plans:
        return []
    source = sum(path.lstat().st_size for path in plans[0].source.files())
    codes = [len(plan.arch_set.sass) + len(plan.arch_set.ptx) for plan in plans]
    building = _SOURCE_COPIES * source + _CODE_BYTES * max(codes)
    kept = sum(source + _KEPT_BYTES * count for count in codes)
    needed: Counter[str] = Counter()
    free: dict[str, int] = {}
    disks: dict[int, str] = {}
    wanted = [(pipeline.STATE, kept), (request.out, _KEPT_BYTES * sum(codes))]
    wanted.append((Path(tempfile.gettempdir()), source))
    if isinstance(engine, DockerEngine):
        needed["the Docker engine's disk"] = building
        free["the Docker engine's disk"] = engine.tools().free
        wanted.append((Path(tempfile.gettempdir()), _KEPT_BYTES * max(codes)))
    elif engine is not None:
        wanted.append((Path(tempfile.gettempdir()), _KEPT_BYTES * max(codes) + building))
    for folder, size in wanted:
        place = disk.nearest(folder.absolute())
        where = disks.setdefault(place.stat().st_dev, f"the disk of {place}")
        needed[where] += size
        free[where] = shutil.disk_usage(place).free
    return [
        BuildError("DISK_TOO_SMALL", where=where, free=free[where] / 1e9, needed=size / 1e9)
        for where, size in needed.items()
        if size > free[where]
    ]


def only(request: BuildRequest, publication: Publication, report: BuildReport) -> bool:
    """Carry out ``--check``; return True if it was given, because then nothing is built.

    Raises:
        UsageError: ``OPTIONS_INVALID``: an option was given without the one that it belongs to.
        FarmError: something prevents the build; the error shows all findings.
    """
    whole = request.arch_set == RELEASE
    wrong = {
        "OPTIONS_INVALID/check": (whole or publication.is_asked_for) and not publication.check,
        "OPTIONS_INVALID/release": whole and (request.line or request.image),
        "OPTIONS_INVALID/key": publication.key and not publication.channel,
    }
    raise_all(UsageError(code) for code, is_wrong in wrong.items() if is_wrong)
    if not publication.check:
        return False
    if whole:
        require_release(request, publication, report)
    else:
        with opened(request, report, publication) as ready:
            for plan in ready.plans:
                report.say(f"can be built: {plan.artifact_name}")
    if request.engine == "dask":
        report.say(remark("HOSTS_NOT_CHECKED"))
    if publication.to and not publication.release:
        report.say(remark("RELEASE_NOT_NAMED"))
    report.say("no problem was found")
    return True


def require_release(request: BuildRequest, publication: Publication, report: BuildReport) -> None:
    """Check every set of ``[release]``, and the place and channel that the release goes to.

    Raises:
        FarmError: something prevents the release; the error shows all findings.
    """
    findings = Findings()
    table = targets.load()
    source: SourceTree | None = None
    for line, names in table.release.items():
        if CUDA_RUNTIME in names:
            with findings.collecting():
                pins.load().cuda_runtime_of(line)
        with findings.collecting():
            source = _require_line(request, line, report)
    with findings.collecting():
        source = source or choose_source(request)
        pins.require_no_advisory(source.build)
    findings.found += publication_findings(publication, source)
    for one in (one for first in findings.found for one in (first, *first.others)):
        if one.code == "IMAGE_UNAVAILABLE":  # no other image can replace that of a line
            one.hint = UsageError("OPTIONS_INVALID/release").hint
    raise_all(findings.found)


def _require_line(request: BuildRequest, line: str, report: BuildReport) -> SourceTree:
    """Check the sets of one line; an image that was pulled for it is removed again."""
    table = targets.load()
    sets = [name for name in table.release[line] if name != CUDA_RUNTIME]
    one = replace(request, line=line, arch_set=sets[0])
    with opened(one, report) as ready:
        for name in sets:
            targets.check_buildable(ready.plans[0].line, table.sets[name])
        if isinstance(ready.engine, DockerEngine):
            ready.engine.forget_pulled()
        return ready.plans[0].source


def publication_findings(wanted: Publication, source: SourceTree | None) -> list[FarmError]:
    """Return the findings that would stop a publication or a promotion after the build."""
    findings = Findings()
    if wanted.release is not None:
        with findings.collecting():
            places.require_name("release", wanted.release)
            build = re.match(r"b(\d+)\b", wanted.release)
            if build and source and int(build[1]) != source.build:
                name, own = wanted.release, source.build
                raise UsageError("RELEASE_NAME_WRONG", name=name, named=build[1], build=own)
    place = None
    with findings.collecting():
        if wanted.to is not None:
            place = places.parse(wanted.to)
    with findings.collecting():
        if place is not None and wanted.release is not None:
            present = place.present(wanted.release).values()
            if any(known.visible for known in present):
                raise PublishError("PUBLISHED_ALREADY", where=place.where, name=wanted.release)
    with findings.collecting():
        if place is not None:
            place.require_writable()
    with findings.collecting():
        if wanted.channel is not None:
            name = places.require_name("channel", wanted.channel)
            signer = trust.signer(wanted.key)
            if place is not None:
                channels.Channel(place, name, signer).present()
    return findings.found
