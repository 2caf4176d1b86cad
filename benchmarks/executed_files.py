"""Every file that a server executes or maps executable, by strace, and what vouches for it.

    PYTHONPATH=.:spaces python benchmarks/executed_files.py RELEASE_FOLDER MODEL

``fetch`` into an empty store, then ``serve`` until a completion has come back. Each such file of
the server and its threads must be one of: listed in the manifest, with the listed digest now; a
CUDA library that ``doctor`` named; the system's own, that is below its library folders or in one
of its dynamic linker's cache (a driver's libcuda may lie elsewhere), and not writable by anybody
but root. Executable memory without a file behind it is as bad as a file that
nobody vouches for. The exit status is 1 where there is either.
"""

import argparse
import hashlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import urllib.request
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

from elftools.elf.elffile import ELFFile

from llama_loader.manifest import parse

SPACES: Final = Path(__file__).resolve().parents[1] / "spaces"
SYSTEM: Final = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64")
CALLS: Final = "execve,execveat,mmap,mprotect,pkey_mprotect,clone,clone3,fork,vfork"
PROMPT: Final = "The capital of France is"
_EXECUTED: Final = re.compile(r'execve(?:at)?\((?:[^"]*, )?"((?:[^"\\]|\\.)*)".*= 0$')
_BORN: Final = re.compile(r"(?:clone3?|v?fork)\(.*= (\d+)$")
_MAPPED: Final = re.compile(
    r"mmap\(.*?, \d+, [A-Z_|]*PROT_EXEC[A-Z_|]*, [^,]*, (-?\d+)(?:<(.*)>)?, "
)
_PROTECTED: Final = re.compile(r"m?protect\(.*PROT_EXEC")


@dataclass
class Image:
    """What one thread did while it ran one program; "" until it executes one itself."""

    program: str = ""
    mapped: list[str] = field(default_factory=list)
    children: list[int] = field(default_factory=list)
    anonymous: list[str] = field(default_factory=list)


def read_log(path: Path) -> list[Image]:
    """Read what strace wrote of one thread (``-ff -y``); executing a program begins a new image."""
    found = [Image()]
    for line in path.read_text(errors="replace").splitlines():
        if match := _EXECUTED.search(line):
            found.append(Image(match[1]))
        elif match := _BORN.search(line):
            found[-1].children.append(int(match[1]))
        elif match := _MAPPED.search(line):
            where = found[-1].mapped if match[2] else found[-1].anonymous
            where.append(match[2] or line)
        elif _PROTECTED.search(line):
            found[-1].anonymous.append(line)
    return found


def server_images(threads: dict[int, list[Image]], program: Path) -> list[Image]:
    """The server, from where it was executed on, with its threads and children."""
    family: list[Image] = []
    for images in threads.values():
        programs = [image.program for image in images]
        if str(program) in programs:
            family += images[programs.index(str(program)) :]
    waiting = [child for image in family for child in image.children]
    seen = set[int]()
    while waiting:
        number = waiting.pop()
        if number in threads and number not in seen:
            seen.add(number)
            family += threads[number]
            waiting += [child for image in threads[number] for child in image.children]
    return family


def vouched(path: str, listed: dict[str, str], cuda: set[str]) -> str:
    """Say what vouches for a file: ``manifest``, ``cuda``, ``system`` or, bad, ``nobody``."""
    real = Path(os.path.realpath(path))
    if str(real) in listed:
        digest = hashlib.sha256(real.read_bytes()).hexdigest() if real.is_file() else ""
        return "manifest" if digest == listed[str(real)] else "nobody"
    if str(real) in cuda:
        return "cuda"
    return "system" if _is_the_systems(real) else "nobody"


def _is_the_systems(real: Path) -> bool:
    folders = [Path(os.path.realpath(folder)) for folder in (*SYSTEM, *_linker_folders())]
    if not real.is_file() or not any(folder in real.parents for folder in folders):
        return False
    status = real.stat()
    return status.st_uid == 0 and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@cache
def _linker_folders() -> tuple[str, ...]:
    """Where root has told the dynamic linker to look."""
    listed = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=True)
    found = (line.rpartition(" => ")[2] for line in listed.stdout.splitlines() if " => " in line)
    return tuple(sorted({str(Path(path).parent) for path in found}))


def interpreter(program: Path) -> str:
    """The dynamic loader that the kernel maps for a program; no call says so."""
    with program.open("rb") as stream:
        for segment in ELFFile(stream).iter_segments("PT_INTERP"):
            return str(segment.data().rstrip(b"\0").decode())
    return ""


def run(release: Path, model: Path, folder: Path, options: tuple[str, ...]) -> dict[str, Any]:
    """Fetch and serve under strace; return the counts, and each file by who vouches for it."""
    log = folder / "log"
    log.mkdir()
    common = (f"--manifest=file://{release / 'manifest.json'}", f"--store={folder / 'store'}")
    loader = (sys.executable, "-m", "llama_loader")
    traced = ("strace", "-ff", "-y", "-qq", "-s", "4096", "-e", f"trace={CALLS}")
    fetch = [*traced, "-o", str(log / "fetch"), *loader, "fetch", *common, *options]
    out = subprocess.run(fetch, cwd=SPACES, check=True, stdout=subprocess.PIPE, text=True).stdout
    runtime = Path(out.splitlines()[-1])
    serve = [*loader, "serve", "--no-key", *common, *options, f"--model={model}"]
    answer = _serve([*traced, "-o", str(log / "serve"), *serve])
    told = subprocess.run(
        [*loader, "doctor", *common, *options, "--json"],
        cwd=SPACES, check=False, stdout=subprocess.PIPE, text=True,
    ).stdout  # fmt: skip
    cuda = {
        os.path.realpath(Path(one["folder"], one["soname"]))
        for one in json.loads(told)["host"]["libraries"]
    }
    return judge(log, runtime, _listed(release, runtime), cuda) | {"answer": answer}


def judge(log: Path, runtime: Path, listed: dict[str, str], cuda: set[str]) -> dict[str, Any]:
    """Sort what the server's threads executed by who vouches for it."""
    threads = {int(path.suffix[1:]): read_log(path) for path in log.iterdir()}
    program = runtime / "llama-server"
    family = server_images(threads, program)
    files = {interpreter(program)}.union(*({one.program, *one.mapped} for one in family)) - {""}
    by: dict[str, list[str]] = {"manifest": [], "cuda": [], "system": [], "nobody": []}
    for path in sorted(files):
        by[vouched(path, listed, cuda)].append(path.removeprefix(f"{runtime}/"))
    programs = {one.program for images in threads.values() for one in images}
    return {
        "server threads": len(family),
        "files": {word: len(paths) for word, paths in by.items()},
        "executable memory of no file": sum(len(one.anonymous) for one in family),
        "by": by,
        "programs of the loader": sorted(map(_called, programs - files - {""})),
    }


def _called(program: str) -> str:
    """Name a program by its path; this Python, which lies elsewhere on every machine, as such."""
    return "python" if program in {sys.executable, os.path.realpath(sys.executable)} else program


def _listed(release: Path, runtime: Path) -> dict[str, str]:
    """The manifest's digests by the real paths of the installed files."""
    manifest = parse((release / "manifest.json").read_bytes())
    root = next(path for path in (runtime, *runtime.parents) if path.name == "files")
    (artifact,) = (one for one in manifest.artifacts if one.sha256 == root.parent.name)
    return {os.path.realpath(root / entry.path): entry.sha256 for entry in artifact.files}


def _serve(argv: list[str]) -> str:
    """Start, ask for a completion, end it as a person would; return the answer."""
    with subprocess.Popen(argv, cwd=SPACES, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None  # noqa: S101
            url = process.stdout.readline().split()[-1]
            body = json.dumps({"prompt": PROMPT, "n_predict": 8, "temperature": 0}).encode()
            with urllib.request.urlopen(f"{url}/completion", body, timeout=300) as response:  # noqa: S310
                return str(json.loads(response.read())["content"])
        finally:
            # strace passes nothing on: the loader is its child
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for child in children:
                os.kill(int(child), signal.SIGINT)


def main() -> int:
    """Print one JSON object; 1 where a file is vouched for by nobody."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("release", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--gpu", action="store_true", help="a GPU must be used; else the CPU may")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        extra = () if options.gpu else ("--allow-cpu",)
        found = run(options.release.resolve(), options.model.resolve(), Path(folder), extra)
    print(json.dumps(found, indent=2))
    return int(found["files"]["nobody"] > 0 or found["executable memory of no file"] > 0)


if __name__ == "__main__":
    sys.exit(main())
