"""Verbs that build something again: `tasks.py` takes them over, so `invoke --list` shows them."""

from __future__ import annotations

from pathlib import Path

from invoke.context import Context  # noqa: TC002 - invoke reads the annotation

from farm.terminal import show
from farm.terminal.cli import task, verb


@task(
    help={
        "arch_set": "a set or group of build/targets.toml",
        "line": "the CUDA line, e.g. cu130; the set cpu needs none",
        "objects": "only so many CUDA objects, spread over the set; or names: norm,rope",
        "engine": "auto, docker, local",
        "image": "the devel image; without it the line's, else one made from packages",
        "toolkit": "for the local engine: a folder, or 'pypi' for NVIDIA's wheels",
        "source": "a folder with llama.cpp's source, instead of the pinned archive",
        "jobs": "compilers at a time in the first build; the second has one more",
    },
)
@verb
def reproducible(
    _: Context,
    arch_set: str = "cpu",
    line: str | None = None,
    objects: str | None = None,
    engine: str = "docker",
    image: str | None = None,
    toolkit: str | None = None,
    source: str | None = None,
    jobs: str | None = None,
) -> None:
    """Build a set twice from nothing, in two containers, and compare every byte."""
    from farm.reproduce.twice import prove
    from farm.request import BuildRequest

    request = BuildRequest(
        arch_set=arch_set,
        line=line or ("cpu" if arch_set == "cpu" else None),
        engine=engine,
        image=image,
        toolkit=toolkit,
        source=Path(source) if source else None,
        jobs=show.positive("--jobs", jobs),
        cached=False,
    )
    with show.report() as report:
        prove(request, report, objects=show.count_or_names("--objects", objects))


@task(
    help={
        "release": "a manifest's URL, or a release folder",
        "artifact": "which tarball of it",
        "sha256": "what the manifest's bytes must come to",
        "source": "the source tree, for what was built from a folder",
        "remote": "the repository that BUILD.json names, if you trust it and it is not llama.cpp's",
        "image": "another devel image than the recorded one",
        "toolkit": "for what the local engine built: a folder, or 'pypi'",
        "jobs": "compilers at a time",
    },
)
@verb
def rebuild(
    _: Context,
    release: str,
    artifact: str | None = None,
    sha256: str | None = None,
    source: str | None = None,
    remote: str | None = None,
    image: str | None = None,
    toolkit: str | None = None,
    jobs: str | None = None,
) -> None:
    """Build a published tarball again from its BUILD.json, and say whether it is identical."""
    from farm.reproduce.rebuild import RebuildRequest
    from farm.reproduce.rebuild import rebuild as build_again

    asked = RebuildRequest(
        release=release,
        artifact=artifact,
        sha256=sha256,
        source=Path(source) if source else None,
        remote=remote,
        image=image,
        toolkit=toolkit,
        jobs=show.positive("--jobs", jobs),
    )
    with show.report() as report:
        build_again(asked, report)
