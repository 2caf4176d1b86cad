"""Releases and hosts made of nothing, for choosing among them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from llama_loader.cuda_libraries import Library
from llama_loader.host import HostFacts
from llama_loader.manifest import (
    CUDA_RUNTIME,
    Artifact,
    Cuda,
    FileEntry,
    Manifest,
    Platform,
    Source,
    dump,
    parse,
)
from llama_loader.receipt import Installed

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
        chunk_size=1 << 30,
        chunks=(SHA,),
        unpacked_size=1,
        backend="cuda" if cuda else "cpu",
        cuda=cuda or None,
        platform=Platform(**{**words, **platform}),
        needs=(f"libcublas.so.{major}", f"libcudart.so.{major}", "libcuda.so.1") if cuda else (),
        files=(FileEntry(path="runtime/llama-server", size=1, sha256=SHA, executable=True),),
    )


def runtime(line: str, *, size: int = 400_000_000, name: str = "", **platform: str) -> Artifact:
    """CUDA's libraries of a line, as ``invoke cuda-runtime`` packs them."""
    toolkit, driver = LINES[line]
    major = toolkit.partition(".")[0]
    provides = tuple(f"{stem}.so.{major}" for stem in ("libcublas", "libcublasLt", "libcudart"))
    words = {"system": "linux", "machine": "x86_64", "glibc": "2.27", "glibcxx": None}
    return Artifact(
        name=f"cuda-runtime-{name or toolkit}-{line}-linux-x86_64.tar.zst",
        urls=("x",),
        format="tar.zst",
        size=size,
        sha256=SHA,
        chunk_size=1 << 30,
        chunks=(SHA,),
        unpacked_size=len(provides),
        backend="cuda",
        cuda=Cuda(toolkit=toolkit, min_driver=driver, sass=(), ptx=()),
        platform=Platform(**{**words, **platform}),
        needs=(),
        files=tuple(
            FileEntry(path=f"cuda-runtime/{one}", size=1, sha256=SHA, executable=False)
            for one in provides
        ),
        kind=CUDA_RUNTIME,
        provides=provides,
    )


def manifest(*artifacts: Artifact) -> Manifest:
    document = Manifest(
        schema_version=1,
        release="b11549-1",
        serial=1,
        created="2026-10-10T00:00:00Z",  # type: ignore[arg-type]
        expires=None,
        source=Source(
            project="llama.cpp", version=None, build=11549, commit=None, origin="x", sha256=None
        ),
        artifacts=artifacts,
    )
    return parse(dump(document))


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
