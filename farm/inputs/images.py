"""Devel images: their tools, the line that they make, and ones made from packages.

``PROBE`` runs in an image and prints its tools, before anything is compiled on it.

``invoke base-image`` makes devel images where no registry can be reached. Each line has a recipe:
the ``cpu`` image is a bare Debian 12; the CUDA ones put a toolkit on top of it, under
``/usr/local/cuda``, so that the glibc floor is the same everywhere. The compilers come with
``build/images/builder.Dockerfile``, as on NVIDIA's images. ``mmdebstrap`` makes the bare Debian: it
has the distribution's mirror, checks its signatures, and writes a tar that is the same for the
same packages.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Final, NamedTuple

import msgspec

from farm import MACHINE, PROJECT_ROOT, durable
from farm.elf import version_key
from farm.errors import EngineError, UsageError, remark
from farm.inputs import pins, toolkit
from farm.inputs.packages import cache_folder, cache_root
from farm.plan import SOURCE_DATE_EPOCH

if TYPE_CHECKING:
    from farm.engines.docker.inventory import DockerImages
    from farm.targets import Line, Targets

RECIPES: Final = PROJECT_ROOT / "build" / "images"
BUILDER_DOCKERFILE: Final = RECIPES / "builder.Dockerfile"
"""The recipe of the builder image, on top of every devel image."""


def builder_sha256() -> str:
    """Return the digest of ``builder.Dockerfile``, for BUILD.json."""
    return hashlib.sha256(BUILDER_DOCKERFILE.read_bytes()).hexdigest()


@dataclass(frozen=True)
class ImageFacts:
    """An image that the engine has. ``id`` is the digest of its configuration.

    ``triggers`` are its instructions for builds on top of it (``ONBUILD``). ``trusted``: it is
    pinned, or this user's farm made it.
    """

    id: str
    labels: Mapping[str, str] = field(default_factory=dict)
    reference: str = ""
    triggers: tuple[str, ...] = ()
    trusted: bool = False


_MADE: Final = "images"
"""The folder of the user's cache with an empty file for each image that the farm made."""
BASE: Final = "base"
"""The label's value of base images."""
_DIGEST: Final = re.compile(r"(?:.+@)?sha256:[0-9a-f]{64}")


def keep(image: ImageFacts, role: str = BASE) -> ImageFacts:
    """Record that this user's farm has made an image: a base image, or a builder image's name."""
    (cache_folder(_MADE) / _record(image, role)).touch()
    return image


def is_ours(image: ImageFacts, role: str = BASE) -> bool:
    """Tell whether this user's farm made an image: its author chooses the names and labels."""
    return (cache_root() / _MADE / _record(image, role)).exists()


def _record(image: ImageFacts, role: str) -> str:
    return hashlib.sha256(f"{image.id} {role}".encode()).hexdigest()


def is_trusted(image: ImageFacts, store: DockerImages) -> bool:
    """Whether ``build/pins.toml`` pins an image, or this user's farm made it."""
    pinned = (store.find(pin.reference) for pin in pins.load().images)
    return is_ours(image) or image.id in (one.id for one in pinned if one)


def names_digest(reference: str) -> bool:
    """Whether a name is always of the same image: its digest or id."""
    return _DIGEST.fullmatch(reference) is not None


_C23: Final = (2, 38)
"""The first glibc whose headers use the functions of C23."""
PROBE: Final = r"""
exec 2> /dev/null
echo "machine=$(uname -m)"
echo "glibc=$(getconf GNU_LIBC_VERSION)"
for library in $(ls /usr/lib/*/libstdc++.so.6 /usr/lib64/libstdc++.so.6 2> /dev/null); do
    echo "glibcxx=$(grep -ao 'GLIBCXX_3[.0-9]*' "$library" | sort -uV | tail -n 1)"
done
command -v g++ > /dev/null && echo "gcc=$(g++ -dumpfullversion -dumpversion)"
echo "free=$(df -Pk / | awk 'NR == 2 { print $4 }')"
for nvcc in /usr/local/cuda/bin/nvcc $(command -v nvcc) \
    $(ls -d /usr/local/cuda-*/bin/nvcc /opt/*/bin/nvcc /usr/lib/*/bin/nvcc 2> /dev/null); do
    [ -x "$nvcc" ] || continue
    root=/usr/local/cuda
    if [ "$nvcc" != /usr/local/cuda/bin/nvcc ]; then
        here=$("$nvcc" --dryrun x.cu 2>&1 | sed -n 's/^#\$ _HERE_=//p')
        root=$(dirname "${here:-$(dirname "$(readlink -f "$nvcc")")}")
    fi
    echo "root=$root"
    echo "nvcc=$("$nvcc" --version 2>&1 | tr '\n' ' ')"
    echo "codes=$("$nvcc" --list-gpu-code 2> /dev/null | tr '\n' ' ')"
    echo "newest_gcc=$(sed -n 's/.*gcc versions later than \([0-9]*\).*/\1/p' \
        "$root/include/crt/host_config.h" /usr/include/crt/host_config.h 2> /dev/null | head -n 1)"
    break
done
"""
"""Prints an image's tools, a ``name=value`` line each; changes nothing in the image."""
_DOTTED: Final = r"([0-9]{1,9}(?:\.[0-9]{1,9}){0,3})"


@dataclass(frozen=True)
class ImageTools:
    """A devel image's tools, as its own programs report them.

    Attributes:
        image: the image's name, for messages.
        machine: the processor that it is for, e.g. ``x86_64``.
        glibc, glibcxx: the newest versions that its libraries have; None if unknown.
        gcc: its host compiler; None: ``builder.Dockerfile`` installs the distribution's.
        newest_gcc: the newest major version that its CUDA accepts, None if unknown.
        cuda: its toolkit, ``major.minor``; None if it has no nvcc, or one that does not run.
        cuda_root: where the toolkit lies.
        codes: the compute capabilities (times ten) that nvcc lists; empty for one that lists none.
        free: bytes that are free where the engine keeps its containers.
    """

    image: str
    machine: str
    glibc: str | None = None
    glibcxx: str | None = None
    gcc: str | None = None
    newest_gcc: int | None = None
    cuda: str | None = None
    cuda_root: PurePosixPath | None = None
    codes: tuple[int, ...] = ()
    free: int = 0

    def __str__(self) -> str:
        """Return the important facts as text for a person."""
        gcc = self.gcc or "of its distribution (the builder image adds it)"
        told = {"CUDA": self.cuda, "glibc": self.glibc, "GLIBCXX": self.glibcxx, "g++": gcc}
        return f"{self.image} has " + ", ".join(f"{n} {v}" for n, v in told.items() if v)


def tools_of(image: str, told: str) -> ImageTools:
    """Parse the output of ``PROBE`` in an image."""
    values = dict(line.split("=", 1) for line in told.splitlines() if "=" in line)

    def read(name: str, form: str) -> str | None:
        match = re.fullmatch(form, values.get(name, ""))
        return match[1] if match else None

    return ImageTools(
        image=image,
        machine=values.get("machine", "unknown"),
        glibc=read("glibc", f"glibc {_DOTTED}"),
        glibcxx=read("glibcxx", f"GLIBCXX_{_DOTTED}"),
        gcc=read("gcc", _DOTTED),
        newest_gcc=int(newest) if (newest := read("newest_gcc", "([0-9]{1,9})")) else None,
        cuda=read("nvcc", r".*\brelease ([0-9]{1,4}\.[0-9]{1,4})\b.*"),
        cuda_root=PurePosixPath(values["root"]) if "root" in values else None,
        codes=toolkit.listed(values.get("codes", "")),
        free=int(read("free", "([0-9]{1,15})") or 0) * 1024,
    )


def line_of_tools(table: Targets, tools: ImageTools) -> tuple[Line, tuple[str, ...]]:
    """Return the line that a devel image makes, and notes on the line's promises.

    Raises:
        UsageError: it has no nvcc, or one of a major version that the farm does not build for.
    """
    if tools.cuda is None:
        raise UsageError("NVCC_MISSING", image=tools.image)
    found = table.line_of_toolkit(tools.cuda, what=tools.image)
    line = msgspec.structs.replace(found, codes=tools.codes)
    notes = [note for note in (table.unchecked(line),) if note]
    for beyond in _beyond(line, tools):
        line = msgspec.structs.replace(line, **{beyond.name: beyond.has})
        code = "GLIBC_OF_IMAGE" if beyond.name == "glibc" else "GLIBCXX_OF_IMAGE"
        notes.append(remark(code, tools=tools, beyond=beyond, line=line))
    return line, tuple(notes)


def contradictions(line: Line, tools: ImageTools) -> tuple[UsageError, ...]:
    """Return everything in a devel image that contradicts a line's promises."""
    found = []
    if tools.machine != line.machine:
        found.append(UsageError("IMAGE_MACHINE", tools=tools, needs=line.machine))
    if line.is_cuda and tools.cuda is None:
        found.append(UsageError("NVCC_MISSING", image=tools.image))
    elif line.is_cuda and not line.accepts_toolkit(str(tools.cuda)):
        found.append(UsageError("TOOLKIT_NOT_OF_LINE", line=line, tools=tools))
    found += [
        UsageError(
            "IMAGE_GLIBC_TOO_NEW" if beyond.name == "glibc" else "IMAGE_GLIBCXX_TOO_NEW",
            tools=tools,
            beyond=beyond,
            line=line,
        )
        for beyond in _beyond(line, tools)
    ]
    gcc = int(tools.gcc.split(".")[0]) if tools.gcc else 0
    if line.is_cuda and tools.newest_gcc is not None and gcc > tools.newest_gcc:
        found.append(UsageError("HOST_COMPILER_TOO_NEW", tools=tools))
    return tuple(found)


class _Beyond(NamedTuple):
    """A library of an image that is newer than a line promises."""

    name: str
    has: str
    promised: str


def _beyond(line: Line, tools: ImageTools) -> list[_Beyond]:
    """Return the libraries that make an image's binaries need more than their line promises.

    A glibc counts from 2.38 on: its headers turn ``strtol`` into ``__isoc23_strtol``, which older
    hosts lack. llama.cpp uses nothing that was new in 2.36 and 2.37: Debian 12 (2.36) makes
    binaries for 2.34.
    """
    glibc = tools.glibc if version_key(tools.glibc or "0") >= _C23 else None
    has = (("glibc", glibc, line.glibc), ("glibcxx", tools.glibcxx, line.glibcxx))
    return [
        _Beyond(name, own, promised)
        for name, own, promised in has
        if own is not None and version_key(own) > version_key(promised)
    ]


TAGS: Final = {
    "cpu": "llama-farm-base:bookworm",
    "cu124": "llama-farm-base:bookworm-cu124",
    "cu130": "llama-farm-base:bookworm-cu130",
}
INPUTS_LABEL: Final = "llama-farm.inputs"
"""The label with the digest of everything that decides the image, except the packages' versions."""

_DEBIAN_NAMES: Final = {"x86_64": "amd64", "aarch64": "arm64"}
DEBIAN: Final = (f"--architectures={_DEBIAN_NAMES[MACHINE]}", "bookworm")
"""Debian 12: its glibc 2.36 gives binaries that need 2.34."""
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

    ``tag`` is the image's name, ``TAGS[line]`` when None. ``fresh``: make it even if it exists,
    with the distribution's packages of today. ``log`` takes one line of progress at a time.

    Raises:
        UsageError: there is no recipe for the line, or mmdebstrap is not installed.
        SourceError: a wheel of the toolkit cannot be fetched.
        EngineError: a step failed; shows its last lines.
    """
    check_line(line)
    tag = tag or TAGS[line]
    base = None if line == "cpu" else make_base_image(store, line="cpu", fresh=fresh, log=log)
    parts = [*_ALWAYS, *DEBIAN]
    if base is not None:
        parts = [base.id, _recipe(line).read_text("utf-8")]
        parts += [toolkit.RECIPE, *(pin.sha256 for pin in _wheels(line))]
    inputs = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    there = store.find(tag)
    known = there is not None and is_ours(there) and there.labels.get(INPUTS_LABEL) == inputs
    if there is not None and known and not fresh:
        log(f"image {tag}: there already, made from the same inputs")
        return there
    if there is not None and not fresh:
        why = "was made of other inputs" if is_ours(there) else "is not one that this user made"
        log(remark("BASE_IMAGE_REPLACED", tag=tag, why=why))
    labels = {"llama-farm": BASE, INPUTS_LABEL: inputs}
    if base is None:
        with root_tar(log) as root:
            return keep(store.import_root(root, tag, labels))
    content: dict[str, Path | bytes] = {"Dockerfile": _recipe(line)}
    if wheels := _wheels(line):  # fetched here: the container may not trust this host's proxy
        content["cuda"] = toolkit.from_wheels(wheels).root
    with tempfile.TemporaryFile() as context:
        durable.write_tar(context, content, SOURCE_DATE_EPOCH)
        return keep(store.build(context, tag, buildargs={"BASE": base.id}, labels=labels, log=log))


def check_line(line: str) -> None:
    """Refuse a line that no recipe makes an image for: ``BASE_IMAGE_UNKNOWN``."""
    if line not in TAGS:
        raise UsageError("BASE_IMAGE_UNKNOWN", line=line, tags=", ".join(TAGS))


@contextmanager
def root_tar(
    log: Callable[[str], None], arguments: tuple[str, ...] = DEBIAN
) -> Iterator[IO[bytes]]:
    """Yield a root file system of a distribution, an uncompressed tar of about 200 MB.

    The same packages give the same bytes. ``log`` takes one line of progress at a time;
    ``arguments`` are further ones of mmdebstrap: options, then the distribution's release.

    Raises:
        UsageError: ``MMDEBSTRAP_MISSING``.
        EngineError: mmdebstrap failed; shows its last lines.
    """
    if shutil.which("mmdebstrap") is None:
        raise UsageError("MMDEBSTRAP_MISSING")
    # Below the cache, not /tmp: the packages' own programs must run there.
    with tempfile.TemporaryDirectory(dir=cache_folder("roots")) as folder:
        made, tail = Path(folder) / "root.tar", deque[str](maxlen=_SHOWN_LINES)
        argv = (*_own_mounts(), "mmdebstrap", *_ALWAYS, *arguments, str(made))
        own = {"SOURCE_DATE_EPOCH": str(SOURCE_DATE_EPOCH), "LC_ALL": "C", "TMPDIR": folder}
        with subprocess.Popen(
            argv,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | own,
        ) as process:
            for line in process.stdout or ():
                tail.append(line.rstrip())
                log(line.rstrip())
        if process.returncode != 0:
            shown = "\n".join(f"  | {line}" for line in tail)
            raise EngineError("MMDEBSTRAP_FAILED", returncode=process.returncode, shown=shown)
        with made.open("rb") as stream:
            yield stream


def _own_mounts() -> tuple[str, ...]:
    """Return what keeps the mounts of a program to itself; nothing where this user may not.

    As root, mmdebstrap mounts ``/sys`` in the folder. A program that looked through the farm's
    cache kept it busy: mmdebstrap failed, and the host's ``/sys`` stayed in a temporary folder.
    """
    argv = ("unshare", "--mount")
    if shutil.which("unshare") is None or os.geteuid() != 0:
        return ()
    alone = subprocess.run((*argv, "true"), capture_output=True, check=False)
    return argv if alone.returncode == 0 else ()


def _recipe(line: str) -> Path:
    return RECIPES / f"{line}.Dockerfile"


def _wheels(line: str) -> tuple[pins.ToolkitPin, ...]:
    return tuple(pin for pin in pins.load().toolkit if pin.line == line)
