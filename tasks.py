"""The verbs of `invoke --list`: a few lines each; `farm/` does the work."""

from __future__ import annotations

import os
import signal
import sys


def _end_at_once(number: int, frame: object) -> None:
    """Answer Ctrl-C while modules are imported, as `guarded` does once a verb runs."""
    del number, frame
    os.write(2, b"error[INTERRUPTED]: stopped; the same command resumes\n")
    os._exit(130)


if sys.argv[0].endswith(("/invoke", "/inv", "/invoke/__main__.py")):
    signal.signal(signal.SIGINT, _end_at_once)

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

if sys.version_info < (3, 11) or not all(map(find_spec, ("docker", "msgspec", "rich"))):
    print(
        "error[USAGE]: the farm needs Python 3.11 or newer, and its packages\n"
        "hint: with such a Python: python3 -m pip install --require-hashes -r requirements.lock",
        file=sys.stderr,
    )
    sys.exit(2)

from farm.options import BuildRequest, Given, Only, Port, Publication, Sha256
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
from farm.terminal.cli import refuse_wrong_usage, verb

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


@verb
def version(_: object) -> None:
    """Show the version of this project; `invoke --version` shows that of invoke."""
    from llama_loader import __version__

    show.line(f"llama-server-farm {__version__}")


@verb
def targets(_: object, json: bool = False) -> None:
    """Show the architecture sets, the groups of sets and the CUDA lines.

    Args:
        json: what a release holds, as the matrix of a workflow
    """
    from farm import targets as table

    if json:
        show.release_rows(table.load())
    else:
        show.targets(table.load())


@verb
def build_cuda(_: object, request: BuildRequest, publication: Publication) -> None:
    """Compile CUDA llama-server, one architecture set at a time, into release tarballs."""
    from farm import preflight
    from farm.terminal.progress import BuildReport

    with BuildReport() as report:
        if not preflight.only(request, publication, report):
            preflight.build(request, report)


@verb
def build_cpu(
    _: object,
    request: Annotated[
        BuildRequest,
        Only("engine", "image", "ref", "source", "assume_build", "format", "jobs", "out", "fresh",
             "copy", "define", "also", "patches"),
    ],
    publication: Annotated[Publication, Only("check")],
) -> None:  # fmt: skip
    """Compile llama-server for every x86-64 CPU, with no CUDA in it."""
    from farm import preflight
    from farm.terminal.progress import BuildReport

    request = replace(request, arch_set="cpu", line="cpu")
    with BuildReport() as report:
        if not preflight.only(request, publication, report):
            preflight.build(request, report)


@verb
def base_image(_: object, line: str = "cpu", tag: str | None = None, fresh: bool = False) -> None:
    """Make a devel image from the distribution's packages, where no registry is in reach.

    Args:
        line: cpu, cu124 or cu130
        tag: the image's name
        fresh: make it even if it is there, with the distribution's packages of today
    """
    from farm.pipeline import make_base_image
    from farm.terminal.progress import BuildReport

    with BuildReport() as report:
        make_base_image(line, tag, report, fresh=fresh)


@verb
def pack(
    _: object,
    tree: Given = "",
    format: str = "tar.zst",  # noqa: A002 - the option's name
    out: Path = Path("dist"),
) -> None:
    """Pack a built tree into a tarball; the same tree gives the same bytes.

    Args:
        tree: a built tree (.farm/trees/NAME)
        format: tar.zst or tar.gz
        out: where the tarball goes
    """
    from farm.release import pack_tree

    show.line(str(pack_tree(Path(tree), out, format).path))


@verb
def cuda_runtime(
    _: object,
    line: str = "cu128",
    out: Path = Path("dist"),
    format: str = "tar.zst",  # noqa: A002 - the option's name
) -> None:
    """Pack NVIDIA's cuBLAS and cudart, unmodified, for hosts that have none.

    Args:
        line: the CUDA line whose libraries they are, as build-cuda's
        out: where the tarball goes; `invoke manifest` lists it
        format: tar.zst or tar.gz
    """
    from farm.cuda_runtime import make

    show.line(str(make(line, out, format).path))


@verb
def manifest(
    _: object, out: Path = Path("dist"), release: str | None = None, serial: int | None = None
) -> None:
    """Write manifest.json, its schema, the SBOMs and SHA256SUMS from the tarballs in a folder.

    Args:
        out: the folder with tarballs
        release: its name, e.g. b11549-1; without it the one there, else bBUILD-1
        serial: its serial number; without it the one there, else 1
    """
    from farm.publish.places import require_name
    from farm.release import MANIFEST, write

    name = None if release is None else require_name("release", release)
    written = write(out, release=name, serial=serial)
    show.line(f"{out / MANIFEST}: {written.release}, artifacts: {len(written.artifacts)}")


@verb
def verify(_: object, folder: str, sha256: Sha256 = None) -> None:
    """Read a release again: tarballs, manifest, SHA256SUMS, SBOMs, licences, BUILD.json.

    Args:
        folder: the release: a folder, a manifest.json, or the URL of either; without it dist
        sha256: what the manifest's bytes must come to
    """
    from farm.publish.gate import opened
    from farm.release import verify as verify_release

    with opened(folder, sha256=sha256) as (found, content):
        for name in verify_release(found, show.note, content):
            show.line(f"ok {name}")


@verb
def smoke(_: object, folder: Path) -> None:
    """Install each tarball with the loader into an empty store and let it compute on the CPU.

    Args:
        folder: a release folder; without it dist
    """
    from farm import release
    from farm.publish import gate as checking

    for line in checking.smoke(folder, release.load(folder)):
        show.line(line)


@verb
def serve_release(_: object, folder: Path = Path("dist"), port: Port = 0) -> None:
    """Serve a release folder over HTTP on loopback, with ranges, until interrupted.

    Args:
        folder: a release folder
        port: 0: a free one
    """
    from farm.serve import serve_forever

    serve_forever(folder, port)


@verb
def update_pins(_: object, newest: bool = False) -> None:
    """Look up the digests of every source, wheel, model and image in build/pins.toml again.

    Args:
        newest: take the newest source archive whose build llama.cpp has a tag for
    """
    from farm.update_pins import compared, main

    if main(say=show.line, newest=newest).newer is not None:
        for line in compared():
            show.line(line)


@verb
def clean(_: object, dry_run: bool = False) -> None:
    """Remove the farm's caches, logs and unfinished builds, its images, volume and containers.

    Args:
        dry_run: show what would be removed, and end
    """
    from farm.terminal.status import Leavings

    with Leavings() as left:
        show.leavings(left)
        for line in () if dry_run else left.remove():
            show.line(line)


@verb
def status(
    _: object, folder: Path | None = None, to: str | None = None, suppose: str | None = None
) -> None:
    """Show a release folder and the compiler caches, or a place; what a host would get.

    Args:
        folder: a release folder; without it dist, where there is one
        to: a place where releases are published, instead of a folder
        suppose: also say what a host would get: capability=12.0,driver=580,glibc=2.36
    """
    from farm.terminal import status as found

    if to is None:
        found.tell(folder, suppose)
        return
    from farm.publish import places

    show.overview(found.of(places.parse(to), suppose))


@verb
def demo(
    _: object,
    arch_set: str = "cpu",
    engine: str = "auto",
    image: str | None = None,
    figure: Path = Path("dist/demo-timeline.svg"),
    all_cpus: bool = False,
) -> None:
    """Source → container → tarball → loader → a verified server's first token, with a timeline.

    Args:
        arch_set: what to build; cpu needs no CUDA, hopper is one flag away
        engine: auto, docker, local
        image: the devel image to build on, instead of one made from packages
        figure: where to write the timeline's picture (SVG)
        all_cpus: also build the CPU variants that this machine does not run
    """
    from farm.demo import Demo
    from farm.terminal.progress import BuildReport

    with BuildReport() as report:
        Demo(arch_set, engine, image, figure, all_cpus).run(report)
