"""What a person can ask for: `invoke --list`. A few lines each; the work is done in `farm/`."""

from __future__ import annotations

from pathlib import Path

from invoke.context import Context  # noqa: TC002 - invoke reads the annotation
from invoke.tasks import task

from farm import show
from farm.cli import verb


def _path(value: str | None) -> Path | None:
    return Path(value) if value else None


@task
@verb
def targets(_: Context) -> None:
    """Show the architecture sets, the groups of sets and the CUDA lines."""
    show.targets()


@task(
    name="build-cuda",
    help={
        "arch_set": "a set or group of build/targets.toml, e.g. sm90, zerogpu, seed",
        "archs": "what CMAKE_CUDA_ARCHITECTURES takes, e.g. '80;86;89;90'",
        "line": "the CUDA line, e.g. cu128",
        "engine": "auto (docker where one answers, else local), docker, local",
        "image": "the devel image to build on, instead of the line's",
        "toolkit": "for the local engine: a folder, or 'pypi' for NVIDIA's wheels",
        "ref": "a tag, branch or commit of llama.cpp, instead of the pinned archive",
        "source": "a folder with llama.cpp's source, instead of the pinned archive",
        "format": "tar.zst or tar.gz",
        "jobs": "compilers at a time",
        "out": "where tarballs and manifest go",
        "fresh": "compile everything again, using nothing from the compiler cache",
        "also": "further targets of llama.cpp, e.g. llama-bench: kept in .farm/trees, not shipped",
    },
)
@verb
def build_cuda(
    _: Context,
    arch_set: str | None = None,
    archs: str | None = None,
    line: str = "cu128",
    engine: str = "auto",
    image: str | None = None,
    toolkit: str | None = None,
    ref: str | None = None,
    source: str | None = None,
    format: str | None = None,  # noqa: A002 - the option's name
    jobs: str | None = None,
    out: str = "dist",
    fresh: bool = False,
    also: str = "",
) -> None:
    """Compile CUDA llama-server, one architecture set at a time, into release tarballs."""
    from farm.pipeline import BuildRequest, build

    request = BuildRequest(
        arch_set=arch_set,
        archs=archs,
        line=line,
        engine=engine,
        image=image,
        toolkit=toolkit,
        ref=ref,
        source=_path(source),
        format=format,
        jobs=show.positive("--jobs", jobs),
        out=Path(out),
        fresh=fresh,
        also=show.names("--also", also),
    )
    with show.report() as report:
        build(request, report)


@task(name="build-cpu")
@verb
def build_cpu(
    _: Context,
    engine: str = "auto",
    image: str | None = None,
    ref: str | None = None,
    source: str | None = None,
    format: str | None = None,  # noqa: A002 - the option's name
    jobs: str | None = None,
    out: str = "dist",
    fresh: bool = False,
) -> None:
    """Compile llama-server for every x86-64 CPU, with no CUDA in it."""
    from farm.pipeline import BuildRequest, build

    request = BuildRequest(
        arch_set="cpu",
        line="cpu",
        engine=engine,
        image=image,
        ref=ref,
        source=_path(source),
        format=format,
        jobs=show.positive("--jobs", jobs),
        out=Path(out),
        fresh=fresh,
    )
    with show.report() as report:
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

    with show.report() as report:
        make_base_image(line, tag, report, fresh=fresh)


@task(help={"tree": "a built tree (.farm/trees/NAME)", "format": "tar.zst or tar.gz"})
@verb
def pack(
    _: Context,
    tree: str | None = None,
    format: str = "tar.zst",  # noqa: A002 - the option's name
    out: str = "dist",
) -> None:
    """Pack a built tree into a tarball; the same tree gives the same bytes."""
    from farm.release import pack_tree

    show.line(str(pack_tree(show.given("--tree", _path(tree)), Path(out), format)))


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


@task(help={"out": "the folder with tarballs", "release": "its name, e.g. b11549-1"})
@verb
def manifest(
    _: Context, out: str = "dist", release: str | None = None, serial: str | None = None
) -> None:
    """Write manifest.json, its schema and SHA256SUMS from the tarballs in a folder."""
    from farm.release import MANIFEST, write

    written = write(Path(out), release=release, serial=show.positive("--serial", serial))
    show.line(f"{Path(out) / MANIFEST}: {written.release}, {len(written.artifacts)} artifacts")


@task(help={"folder": "a release folder"})
@verb
def verify(_: Context, folder: str = "dist") -> None:
    """Read every tarball of a release again and compare it with the manifest and SHA256SUMS."""
    from farm.release import verify as verify_release

    show.verified(verify_release(Path(folder)))


@task(name="serve-release", help={"folder": "a release folder", "port": "0: a free one"})
@verb
def serve_release(_: Context, folder: str = "dist", port: str = "0") -> None:
    """Serve a release folder over HTTP on loopback, with ranges, until interrupted."""
    from farm.serve import serve_forever

    serve_forever(Path(folder), show.port("--port", port))


@task(name="update-pins")
@verb
def update_pins(_: Context) -> None:
    """Look up the digests of every source, wheel, model and image in build/pins.toml again."""
    from farm.update_pins import main

    main()


@task
@verb
def status(_: Context, folder: str = "dist") -> None:
    """Show a release folder: its artifacts, what they hold, and their size by part."""
    from farm.release import load

    show.status(load(Path(folder)))


@task(
    help={
        "arch_set": "what to build; cpu needs no CUDA, hopper is one flag away",
        "engine": "auto, docker, local",
        "figure": "where to write the timeline's picture (SVG)",
    }
)
@verb
def demo(
    _: Context,
    arch_set: str = "cpu",
    engine: str = "auto",
    image: str | None = None,
    figure: str = "dist/demo-timeline.svg",
) -> None:
    """Source → container → tarball → loader → a verified server's first token, with a timeline."""
    from farm.demo import Demo

    with show.report() as report:
        Demo(arch_set, engine, image, Path(figure)).run(report)
