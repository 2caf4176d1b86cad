"""Devel images for places that reach no registry, out of packages: ``invoke base-image``.

Each line has a recipe: the ``cpu`` image is a bare Debian 12; the CUDA ones put a toolkit on top
of it, under ``/usr/local/cuda``, so that the glibc floor is the same everywhere. The compilers
come with ``build/images/builder.Dockerfile``, as on NVIDIA's images.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import tempfile
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Final

from farm import PROJECT_ROOT
from farm.errors import UsageError
from farm.inputs import pins, rootfs, toolkit
from farm.plan import SOURCE_DATE_EPOCH

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from farm.engines.images import ImageFacts, ImageStore

RECIPES: Final = PROJECT_ROOT / "build" / "images"
TAGS: Final = {
    "cpu": "llama-farm-base:bookworm",
    "cu124": "llama-farm-base:bookworm-cu124",
    "cu130": "llama-farm-base:bookworm-cu130",
}
INPUTS_LABEL: Final = "llama-farm.inputs"
"""Digest of everything that decides what is in the image, but for the distribution's state."""

_ROOT_RECIPE: Final = "minbase-1"
"""Changed by hand when ``farm/inputs/rootfs.py`` makes something else out of the same packages."""


def make_base_image(
    store: ImageStore,
    *,
    line: str,
    tag: str | None = None,
    fresh: bool = False,
    log: Callable[[str], None],
) -> ImageFacts:
    """Make the devel image of a line, or find the one that was made from the same inputs.

    Args:
        store: the engine's images.
        line: ``cpu``, ``cu124`` or ``cu130``.
        tag: the image's name, ``TAGS[line]`` when None.
        fresh: make it even if it is there, with the distribution's packages of today.
        log: takes one line of progress at a time.

    Raises:
        UsageError: there is no recipe for the line, or debootstrap cannot run here.
        SourceError: a wheel of the toolkit cannot be had.
        EngineError: a step failed; shows its last lines.
    """
    check_line(line)
    tag = tag or TAGS[line]
    base = None if line == "cpu" else make_base_image(store, line="cpu", fresh=fresh, log=log)
    inputs = _inputs(line, base)
    there = store.find(tag)
    if there is not None and there.labels.get(INPUTS_LABEL) == inputs and not fresh:
        log(f"image {tag}: there already, made from the same inputs")
        return there
    labels = {"llama-farm": "base", INPUTS_LABEL: inputs}
    if base is None:
        with rootfs.root_tar(log) as root:
            return store.import_root(root, tag, labels)
    with _context(line) as context:
        return store.build(context, tag, buildargs={"BASE": base.id}, labels=labels, log=log)


def check_line(line: str) -> None:
    """Refuse a line that no recipe makes an image for.

    Raises:
        UsageError: names the lines that have one.
    """
    if line not in TAGS:
        raise UsageError(
            "BASE_IMAGE_UNKNOWN",
            f"no base image can be made for line {line}: its toolkit comes in no package",
            hint=f"there are recipes for {', '.join(TAGS)}; use the line's own image where its "
            "registry can be reached",
        )


def _inputs(line: str, base: ImageFacts | None) -> str:
    if base is None:
        parts = [_ROOT_RECIPE, rootfs.SUITE]
    else:
        parts = [base.id, _recipe(line).read_text("utf-8")]
        parts += [toolkit.RECIPE, *(pin.sha256 for pin in _wheels(line))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _recipe(line: str) -> Path:
    return RECIPES / f"{line}.Dockerfile"


def _wheels(line: str) -> tuple[pins.ToolkitPin, ...]:
    return tuple(pin for pin in pins.load().toolkit if pin.line == line)


@contextmanager
def _context(line: str) -> Iterator[IO[bytes]]:
    """Make a build context: the recipe, and the toolkit where it comes as wheels.

    The wheels are fetched here, not in the container, which may not trust this host's proxy.
    """
    wheels = _wheels(line)
    with tempfile.TemporaryFile() as stream:
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
            tar.add(_recipe(line), arcname="Dockerfile", filter=_normal)
            if wheels:
                tar.add(toolkit.from_wheels(wheels).root, arcname="cuda", filter=_normal)
        stream.seek(0)
        yield stream


def _normal(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mtime = SOURCE_DATE_EPOCH
    return entry
