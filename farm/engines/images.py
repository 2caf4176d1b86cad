"""Container images as the farm sees them: what they have to build with."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

from farm import PROJECT_ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping

BUILDER_DOCKERFILE: Final = PROJECT_ROOT / "build" / "images" / "builder.Dockerfile"
"""What is put on top of every devel image."""


def builder_sha256() -> str:
    """Return the digest of ``builder.Dockerfile``, for BUILD.json."""
    return hashlib.sha256(BUILDER_DOCKERFILE.read_bytes()).hexdigest()


@dataclass(frozen=True)
class ImageFacts:
    """An image that the engine has. ``id`` is the digest of its configuration."""

    id: str
    labels: Mapping[str, str] = field(default_factory=dict)
    reference: str = ""


PROBE: Final = r"""
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
"""Tells what an image has to build with, a ``name=value`` line each; changes nothing in it."""
_CUDA_RELEASE: Final = re.compile(r"release (\d+\.\d+)")


@dataclass(frozen=True)
class ImageTools:
    """What a devel image has to build with, as its own programs say.

    Attributes:
        image: the image's name, for messages.
        machine: the processor that it is for, e.g. ``x86_64``.
        glibc, glibcxx: the newest versions that its libraries have; None where it tells none.
        gcc: its host compiler; None: ``builder.Dockerfile`` installs the distribution's.
        newest_gcc: the newest major version that its CUDA accepts, None where it does not tell.
        cuda: its toolkit, ``major.minor``; None where it has no nvcc, or one that does not run.
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
        """Return what matters of it, for a person."""
        gcc = self.gcc or "of its distribution (the builder image adds it)"
        told = {"CUDA": self.cuda, "glibc": self.glibc, "GLIBCXX": self.glibcxx, "g++": gcc}
        return f"{self.image} has " + ", ".join(f"{n} {v}" for n, v in told.items() if v)


def tools_of(image: str, told: str) -> ImageTools:
    """Read what ``PROBE`` printed in an image."""
    values = dict(line.split("=", 1) for line in told.splitlines() if "=" in line)
    release = _CUDA_RELEASE.search(values.get("nvcc", ""))
    newest = values.get("newest_gcc", "")
    return ImageTools(
        image=image,
        machine=values.get("machine", "unknown"),
        glibc=values.get("glibc", "").removeprefix("glibc ") or None,
        glibcxx=values.get("glibcxx", "").removeprefix("GLIBCXX_") or None,
        gcc=values.get("gcc") or None,
        newest_gcc=int(newest) if newest.isdigit() else None,
        cuda=release[1] if release else None,
        cuda_root=PurePosixPath(values["root"]) if "root" in values else None,
        codes=tuple(int(code) for code in re.findall(r"sm_(\d+)\b", values.get("codes", ""))),
        free=int(values.get("free", "0") or 0) * 1024,
    )
