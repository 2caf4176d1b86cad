"""What a person can ask for: `invoke --list`. A few lines each; the work is done in `farm/`."""

from __future__ import annotations

from pathlib import Path

from invoke.context import Context  # noqa: TC002 - invoke reads the annotation

from farm.release_verbs import (
    deploy_space,
    gate,
    keygen,
    pin_space,
    promote,
    publish,
    rebuild,
    renew,
    reproducible,
    rollback,
    space,
)
from farm.terminal import show
from farm.terminal.cli import refuse_wrong_usage, task, verb

# theirs; invoke takes every task of this module
__all__ = [
    "deploy_space",
    "gate",
    "keygen",
    "pin_space",
    "promote",
    "publish",
    "rebuild",
    "renew",
    "reproducible",
    "rollback",
    "space",
]

refuse_wrong_usage()


_BUILD_HELP = {
    "engine": "auto (docker where one answers, else local), docker, local, dask",
    "image": "the devel image to build on, instead of the line's",
    "ref": "a tag, branch or commit of llama.cpp, instead of the pinned archive",
    "source": "a folder with llama.cpp's source, instead of the pinned archive",
    "format": "tar.zst or tar.gz",
    "jobs": "compilers at a time",
    "out": "where tarballs and manifest go",
    "fresh": "compile everything again, using nothing from the compiler cache",
    "copy": "also copy the one tarball here, under a name of its own",
    "assume_build": "llama.cpp's build number, for a --source whose history does not tell it",
    "define": "NAME=VALUE, a CMake definition more; again for more. Recorded in BUILD.json",
    "also": "a program more in the tarball: llama-bench, llama-quantize, rpc-server",
    "patches": "auto (those of build/patches) or none (llama.cpp as it is upstream)",
}
_LISTS = ("define", "also")


@task
@verb
def version(_: Context) -> None:
    """Show the version of this project; `invoke --version` shows that of invoke."""
    from llama_loader import __version__

    show.line(f"llama-server-farm {__version__}")


@task(help={"json": "what a release holds, as the matrix of a workflow"})
@verb
def targets(_: Context, json: bool = False) -> None:
    """Show the architecture sets, the groups of sets and the CUDA lines."""
    from farm import targets as table

    if json:
        show.release_rows(table.load())
    else:
        show.targets(table.load())


@task(
    name="build-cuda",
    iterable=_LISTS,
    help=_BUILD_HELP
    | {
        "arch_set": "a set or group of build/targets.toml, e.g. sm90, zerogpu, seed",
        "archs": "what CMAKE_CUDA_ARCHITECTURES takes, e.g. '80;86;89;90'",
        "line": "the CUDA line, e.g. cu128; without it the image's, else cu128",
        "scheduler": "for dask: the cluster's address, tcp://…; without it, this machine",
        "workers": "for dask on this machine: builds at a time",
        "worker_engine": "for dask: what its hosts build with: auto, docker, local",
        "toolkit": "for the local engine: a folder, or 'pypi' for NVIDIA's wheels",
        "check": "check all of it and what would publish it, build nothing; see --release",
        "release": "for --check: the release's name; --arch-set release means all sets of one",
        "to": "for --check: where it will be published, as in invoke publish",
        "channel": "for --check: the channel that it will be promoted to",
        "key": "for --check: the file with the channel's key, else FARM_SIGNING_KEY",
    },
)
@verb
def build_cuda(
    _: Context,
    arch_set: str | None = None,
    archs: str | None = None,
    line: str | None = None,
    engine: str = "auto",
    image: str | None = None,
    toolkit: str | None = None,
    ref: str | None = None,
    source: str | None = None,
    assume_build: str | None = None,
    format: str | None = None,  # noqa: A002 - the option's name
    jobs: str | None = None,
    out: str = "dist",
    fresh: bool = False,
    copy: str | None = None,
    define: list[str] | None = None,
    also: list[str] | None = None,
    patches: str = "auto",
    scheduler: str | None = None,
    workers: str | None = None,
    worker_engine: str = "auto",
    check: bool = False,
    release: str | None = None,
    to: str | None = None,
    channel: str | None = None,
    key: str | None = None,
) -> None:
    """Compile CUDA llama-server, one architecture set at a time, into release tarballs."""
    from farm import preflight
    from farm.preflight import build
    from farm.request import BuildRequest, definitions, programs
    from farm.terminal.progress import BuildReport

    request = BuildRequest(
        arch_set=arch_set,
        archs=archs,
        line=line,
        engine=engine,
        image=image,
        toolkit=toolkit,
        ref=ref,
        source=show.path(source),
        assume_build=show.number("--assume-build", assume_build),
        format=format,
        jobs=show.number("--jobs", jobs),
        out=Path(out),
        fresh=fresh,
        copy=show.path(copy),
        also=programs(also or ()),
        define=definitions(define or ()),
        patches=patches,
        scheduler=scheduler,
        workers=show.number("--workers", workers),
        worker_engine=worker_engine,
    )
    publication = preflight.Publication(release, to, channel, show.path(key))
    with BuildReport() as report:
        if preflight.only(request, publication, report, check=check):
            return
        build(request, report)


@task(name="build-cpu", iterable=_LISTS, help=dict(_BUILD_HELP))
@verb
def build_cpu(
    _: Context,
    engine: str = "auto",
    image: str | None = None,
    ref: str | None = None,
    source: str | None = None,
    assume_build: str | None = None,
    format: str | None = None,  # noqa: A002 - the option's name
    jobs: str | None = None,
    out: str = "dist",
    fresh: bool = False,
    copy: str | None = None,
    define: list[str] | None = None,
    also: list[str] | None = None,
    patches: str = "auto",
) -> None:
    """Compile llama-server for every x86-64 CPU, with no CUDA in it."""
    from farm.preflight import build
    from farm.request import BuildRequest, definitions, programs
    from farm.terminal.progress import BuildReport

    request = BuildRequest(
        arch_set="cpu",
        line="cpu",
        engine=engine,
        image=image,
        ref=ref,
        source=show.path(source),
        assume_build=show.number("--assume-build", assume_build),
        format=format,
        jobs=show.number("--jobs", jobs),
        out=Path(out),
        fresh=fresh,
        copy=show.path(copy),
        also=programs(also or ()),
        define=definitions(define or ()),
        patches=patches,
    )
    with BuildReport() as report:
        build(request, report)


@task(
    name="base-image",
    help={
        "line": "cpu, cu124 or cu130",
        "tag": "the image's name",
        "fresh": "make it even if it is there, with the distribution's packages of today",
    },
)
@verb
def base_image(_: Context, line: str = "cpu", tag: str | None = None, fresh: bool = False) -> None:
    """Make a devel image from the distribution's packages, where no registry is in reach."""
    from farm.pipeline import make_base_image
    from farm.terminal.progress import BuildReport

    with BuildReport() as report:
        make_base_image(line, tag, report, fresh=fresh)


@task(
    help={
        "tree": "a built tree (.farm/trees/NAME)",
        "format": "tar.zst or tar.gz",
        "out": "where the tarball goes",
    }
)
@verb
def pack(
    _: Context,
    tree: str | None = None,
    format: str = "tar.zst",  # noqa: A002 - the option's name
    out: str = "dist",
) -> None:
    """Pack a built tree into a tarball; the same tree gives the same bytes."""
    from farm.release import pack_tree

    show.line(str(pack_tree(Path(show.given("--tree", tree)), Path(out), format)))


@task(
    name="cuda-runtime",
    help={
        "line": "the CUDA line whose libraries they are, e.g. cu130",
        "out": "where the tarball goes; `invoke manifest` lists it",
        "format": "tar.zst or tar.gz",
    },
)
@verb
def cuda_runtime(
    _: Context,
    line: str = "cu130",
    out: str = "dist",
    format: str = "tar.zst",  # noqa: A002 - the option's name
) -> None:
    """Pack NVIDIA's cuBLAS and cudart, unmodified, for hosts that have none."""
    from farm.cuda_runtime import make

    show.line(str(make(line, Path(out), format)))


@task(
    help={
        "out": "the folder with tarballs",
        "release": "its name, e.g. b11549-1; without it the one there, else bBUILD-1",
        "serial": "its serial number; without it the one there, else 1",
    }
)
@verb
def manifest(
    _: Context, out: str = "dist", release: str | None = None, serial: str | None = None
) -> None:
    """Write manifest.json, its schema, the SBOMs and SHA256SUMS from the tarballs in a folder."""
    from farm.release import MANIFEST, write

    written = write(Path(out), release=release, serial=show.number("--serial", serial))
    show.line(f"{Path(out) / MANIFEST}: {written.release}, {len(written.artifacts)} artifacts")


@task(
    help={
        "folder": "the release: a folder, a manifest.json, or the URL of either",
        "sha256": "what the manifest's bytes must come to",
    },
)
@verb
def verify(_: Context, folder: str, sha256: str | None = None) -> None:
    """Read a release again: tarballs, manifest, SHA256SUMS, SBOMs, licences, BUILD.json."""
    from farm.release import verify as verify_release
    from farm.remote_release import opened

    with opened(folder, sha256=sha256) as found:
        show.verified(verify_release(found, show.note))


@task(help={"folder": "a release folder"})
@verb
def smoke(_: Context, folder: str) -> None:
    """Install each tarball with the loader into an empty store and let it compute on the CPU."""
    from farm import release
    from farm.publish import gate as checking

    for line in checking.smoke(Path(folder), release.load(Path(folder))):
        show.line(line)


@task(name="serve-release", help={"folder": "a release folder", "port": "0: a free one"})
@verb
def serve_release(_: Context, folder: str = "dist", port: str = "0") -> None:
    """Serve a release folder over HTTP on loopback, with ranges, until interrupted."""
    from farm.serve import serve_forever

    serve_forever(Path(folder), show.number("--port", port, 0, 65535) or 0)


@task(
    name="update-pins",
    help={
        "newest": "take the newest source archive whose build llama.cpp has a tag for",
    },
)
@verb
def update_pins(_: Context, newest: bool = False) -> None:
    """Look up the digests of every source, wheel, model and image in build/pins.toml again."""
    from farm.update_pins import compared, main

    if main(newest=newest).newer is not None:
        show.line(compared())


@task(help={"dry_run": "show what would be removed, and end"})
@verb
def clean(_: Context, dry_run: bool = False) -> None:
    """Remove the farm's caches, logs and unfinished builds, its images, volume and containers."""
    from farm.terminal.status import Leavings

    with Leavings() as left:
        show.leavings(left)
        for line in () if dry_run else left.remove():
            show.line(line)


@task(
    help={
        "folder": "a release folder; without it dist, where there is one",
        "to": "a place where releases are published, instead of a folder",
        "suppose": "also say what a host would get: capability=12.0,driver=580,glibc=2.36",
    }
)
@verb
def status(
    _: Context, folder: str | None = None, to: str | None = None, suppose: str | None = None
) -> None:
    """Show a release folder and the compiler caches, or a place; what a host would get."""
    from farm.terminal import status as found

    if to is None:
        found.tell(show.path(folder), suppose)
        return
    from farm.publish import places

    show.overview(found.of(places.parse(to), suppose))


@task(
    help={
        "arch_set": "what to build; cpu needs no CUDA, hopper is one flag away",
        "engine": "auto, docker, local",
        "image": "the devel image to build on, instead of one made from packages",
        "figure": "where to write the timeline's picture (SVG)",
        "all_cpus": "also build the CPU variants that this machine does not run",
    }
)
@verb
def demo(
    _: Context,
    arch_set: str = "cpu",
    engine: str = "auto",
    image: str | None = None,
    figure: str = "dist/demo-timeline.svg",
    all_cpus: bool = False,
) -> None:
    """Source → container → tarball → loader → a verified server's first token, with a timeline."""
    from farm.demo import Demo
    from farm.terminal.progress import BuildReport

    with BuildReport() as report:
        Demo(arch_set, engine, image, Path(figure), all_cpus).run(report)
