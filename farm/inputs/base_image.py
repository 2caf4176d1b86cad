"""Make devel images from packages, where no registry can be reached: ``invoke base-image``.

Each line has a recipe: the ``cpu`` image is a bare Debian 12; the CUDA ones put a toolkit on top
of it, under ``/usr/local/cuda``, so that the glibc floor is the same everywhere. The compilers
come with ``build/images/builder.Dockerfile``, as on NVIDIA's images.

``mmdebstrap`` makes the bare Debian: it knows the distribution's mirror, checks its signatures, and
writes a tar that is the same for the same packages.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections import deque
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from farm import PROJECT_ROOT, durable
from farm.errors import EngineError, UsageError
from farm.inputs import pins, toolkit
from farm.inputs.packages import cache_folder
from farm.plan import SOURCE_DATE_EPOCH

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from farm.engines.docker import DockerImages
    from farm.inputs.images import ImageFacts

RECIPES: Final = PROJECT_ROOT / "build" / "images"
TAGS: Final = {
    "cpu": "llama-farm-base:bookworm",
    "cu124": "llama-farm-base:bookworm-cu124",
    "cu130": "llama-farm-base:bookworm-cu130",
}
INPUTS_LABEL: Final = "llama-farm.inputs"
"""The label with the digest of everything that decides the image, except the packages' versions."""

DEBIAN: Final = ("--architectures=amd64", "bookworm")
"""Debian 12: its glibc 2.36 gives binaries that need 2.34 (FACTS: measured)."""
_ALWAYS: Final = (
    "--variant=minbase",
    "--format=tar",
    "--skip=output/dev",  # the engine fills /dev
    # mmdebstrap copies them from this host
    '--customize-hook=rm "$1/etc/hostname" "$1/etc/resolv.conf"',
)
_SHOWN_LINES: Final = 12


def make_base_image(
    store: DockerImages,
    *,
    line: str,
    tag: str | None = None,
    fresh: bool = False,
    log: Callable[[str], None],
) -> ImageFacts:
    """Make the devel image of a line, or return the one that was made from the same inputs.

    Args:
        store: the engine's images.
        line: ``cpu``, ``cu124`` or ``cu130``.
        tag: the image's name, ``TAGS[line]`` when None.
        fresh: make it even if it exists, with the distribution's packages of today.
        log: takes one line of progress at a time.

    Raises:
        UsageError: there is no recipe for the line, or mmdebstrap is not installed.
        SourceError: a wheel of the toolkit cannot be fetched.
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
        with root_tar(log) as root:
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


@contextmanager
def root_tar(
    log: Callable[[str], None], arguments: tuple[str, ...] = DEBIAN
) -> Iterator[IO[bytes]]:
    """Make a root file system of a distribution; it is removed when closed.

    Args:
        log: takes one line of progress at a time.
        arguments: further arguments of mmdebstrap: options, then the distribution's release.

    Yields:
        An uncompressed tar, about 200 MB; the same packages give the same bytes.

    Raises:
        UsageError: ``MMDEBSTRAP_MISSING``.
        EngineError: mmdebstrap failed; shows its last lines.
    """
    if shutil.which("mmdebstrap") is None:
        raise UsageError(
            "MMDEBSTRAP_MISSING",
            "mmdebstrap is not installed, and the base image is made with it",
            hint="apt-get install mmdebstrap; where a registry can be reached, none is needed: "
            "leave --image out",
        )
    # Below the cache, not /tmp: the packages' own programs must run there.
    with tempfile.TemporaryDirectory(dir=cache_folder("roots")) as folder:
        made = Path(folder) / "root.tar"
        _run(("mmdebstrap", *_ALWAYS, *arguments, str(made)), folder, log)
        with made.open("rb") as stream:
            yield stream


def _run(argv: tuple[str, ...], folder: str, log: Callable[[str], None]) -> None:
    environment = os.environ | {
        "SOURCE_DATE_EPOCH": str(SOURCE_DATE_EPOCH),
        "LC_ALL": "C",
        "TMPDIR": folder,
    }
    tail: deque[str] = deque(maxlen=_SHOWN_LINES)
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        for line in process.stdout or ():
            tail.append(line.rstrip())
            log(line.rstrip())
    if process.returncode != 0:
        shown = "\n".join(f"  | {line}" for line in tail)
        raise EngineError(
            "MMDEBSTRAP_FAILED",
            f"mmdebstrap ended with status {process.returncode}\n{shown}",
            hint="are the distribution's mirror in reach and its keys installed "
            "(debian-archive-keyring)? Without root it needs user namespaces and uidmap: try sudo",
        )


def _inputs(line: str, base: ImageFacts | None) -> str:
    if base is None:
        parts = [*_ALWAYS, *DEBIAN]
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
    """Make a build context: the recipe, and the toolkit if it comes as wheels.

    The wheels are fetched here, not in the container, which may not trust this host's proxy.
    """
    content: dict[str, Path | bytes] = {"Dockerfile": _recipe(line)}
    if wheels := _wheels(line):
        content["cuda"] = toolkit.from_wheels(wheels).root
    with tempfile.TemporaryFile() as stream:
        durable.write_tar(stream, content, SOURCE_DATE_EPOCH)
        yield stream
