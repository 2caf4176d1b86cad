"""Releases and hosts made of nothing, for choosing among them."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from llama_loader.cuda_libraries import Library
from llama_loader.events import Timeline
from llama_loader.gpus import Gpu
from llama_loader.host import HostFacts
from llama_loader.loader import Prepared
from llama_loader.manifest import (
    CUDA_RUNTIME,
    Artifact,
    Cuda,
    FileEntry,
    Manifest,
    Platform,
    Source,
    parse,
)
from llama_loader.receipt import Installed
from llama_loader.selection import select
from llama_loader.settings import Settings, load
from tests.rigs import archives

SHA = "0" * 64
LINES = {"cu124": ("12.4", "525.60"), "cu128": ("12.8", "525.60"), "cu130": ("13.0", "580.65")}


@dataclass(frozen=True)
class Unlisted(Installed):
    """A runtime of a test, in no store: ``look`` stands for hashing its files."""

    look: Callable[[], None] = field(default=lambda: None, compare=False, repr=False)

    def verify(self) -> None:
        """Call ``look``."""
        self.look()


def artifact(
    line: str, name: str, sass: str = "", ptx: str = "", *, size: int = 20_000_000, **platform: str
) -> Artifact:
    toolkit, driver = LINES.get(line, ("", ""))
    major = toolkit.partition(".")[0]
    cuda = toolkit and Cuda(
        toolkit=toolkit, min_driver=driver, sass=tuple(sass.split()), ptx=tuple(ptx.split())
    )
    words = {"system": "linux", "machine": "x86_64", "glibc": "2.34", "glibcxx": "3.4.30"}
    return Artifact(
        name=f"llama-server-b11549-{line}-{name}-linux-x86_64.tar.zst",
        urls=("x",),
        format="tar.zst",
        size=size,
        sha256=SHA,
        chunk_size=1 << 23,
        chunks=(SHA,) * -(-size // (1 << 23)),
        unpacked_size=1,
        backend="cuda" if cuda else "cpu",
        cuda=cuda or None,
        platform=Platform(**{**words, **platform}),
        needs=(f"libcublas.so.{major}", f"libcudart.so.{major}", "libcuda.so.1") if cuda else (),
        files=(FileEntry(path="runtime/llama-server", size=1, sha256=SHA, executable=True),),
    )


def runtime(line: str, *, size: int = 400_000_000, name: str = "", **platform: str) -> Artifact:
    """CUDA's libraries of a line, as ``invoke cuda-runtime`` packs them."""
    toolkit = LINES[line][0]
    major = toolkit.partition(".")[0]
    provides = tuple(f"{stem}.so.{major}" for stem in ("libcublas", "libcublasLt", "libcudart"))
    words = {"system": "linux", "machine": "x86_64", "glibc": "2.27", "glibcxx": None}
    files = tuple(
        FileEntry(path=f"cuda-runtime/{one}", size=1, sha256=SHA, executable=False)
        for one in provides
    )
    return msgspec.structs.replace(
        artifact(line, "", size=size),
        name=f"cuda-runtime-{name or toolkit}-{line}-linux-x86_64.tar.zst",
        unpacked_size=len(provides),
        platform=Platform(**{**words, **platform}),
        needs=(),
        files=files,
        kind=CUDA_RUNTIME,
        provides=provides,
    )


def manifest(*artifacts: Artifact) -> Manifest:
    source = Source(
        project="llama.cpp", version=None, build=11549, commit=None, origin="x", sha256=None
    )
    return parse(archives.manifest(*artifacts, release="b11549-1", source=source))


def libraries(*majors: int) -> tuple[Library, ...]:
    return tuple(
        Library(f"{stem}.so.{major}", Path(f"/cu{major}"), None, "site-packages")
        for major in majors
        for stem in ("libcublas", "libcublasLt", "libcudart")
    )


BARE = HostFacts(
    system="linux",
    machine="x86_64",
    glibc="2.36",
    glibcxx="3.4.30",
    python="3.12.12",
    driver=None,
    gpus=(),
    gpu_source="none",
    libraries=(),
    cpus=8,
    memory=1 << 36,
)
H200 = replace(
    BARE,
    gpus=(Gpu("NVIDIA H200", "90", 150_000_000_000),),
    driver="580.159",
    gpu_source="nvml",
    libraries=libraries(13),
)
RELEASE = manifest(artifact("cu130", "sm90", "90"), artifact("cpu", "cpu"))


def prepared(runtime: Path, host: HostFacts = H200, *, allow_cpu: bool = False) -> Prepared:
    """A folder as the runtime that ``RELEASE`` has for a host."""
    choice = select(RELEASE, host, allow_cpu=allow_cpu)
    installed = Unlisted(runtime, runtime, SHA, choice.artifact)
    return Prepared(installed, host, choice, choice.libraries, choice.missing, Timeline())


def settings(*options: str, **variables: str) -> Settings:
    """Settings with these options set, and variables without their prefix."""
    names = {f"YAKULINGO_SPACES_{name}": value for name, value in variables.items()}
    environ = {"PATH": os.environ["PATH"], "HOME": "/home/user", **names}
    return load(dict.fromkeys(options, "1"), environ)
