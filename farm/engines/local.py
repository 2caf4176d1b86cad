"""The local engine: this host's compiler, and its CUDA toolkit if the line needs one.

It builds in private folders. A run holds a folder by a ``flock`` on the folder's file ``maker``,
which ends with the process. A later run ends the processes that still work in a folder whose own
run was killed, and removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Final

from farm import durable, run_lock
from farm.engines import shared_cache
from farm.errors import EngineError, remark
from farm.inputs import patches
from farm.inputs.packages import cache_folder
from farm.plan import LONGEST_LINE, BuildPlan, Layout, LineSink, Workspace
from llama_loader import cgroups

PASSED_ON: Final = ("PATH", "HOME", "TMPDIR")
"""The only variables that a step gets from outside: CFLAGS and the like would change
the bytes, and LANG would make ccache miss another machine's objects."""
_MAKER_FILE: Final = "maker"
_TERMINAL: Final = 4
"""The field of /proc/PID/stat (proc(5)) after the name in brackets: the terminal; 0 without one."""
_GRACE: Final = 5.0
"""Seconds that an interrupted build has to end its compilers."""
_PAUSE: Final = 0.02


@dataclass
class LocalWorkspace(Workspace):
    """A private folder with a copy of the source beside the build tree, as in a container."""

    _running: subprocess.Popen[str] | None = None
    _ended: bool = False

    def run(self, argv: tuple[str, ...], environment: Mapping[str, str], sink: LineSink) -> int:
        """Run one command in a session of its own; any exception ends the whole session."""
        inherited = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        with subprocess.Popen(
            argv,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**inherited, **environment},
            cwd=self.layout.build,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            self._running = process
            try:
                if self._ended:
                    self._stop(process)
                while process.stdout and (line := process.stdout.readline(LONGEST_LINE)):
                    sink(line.rstrip("\n"))
                return process.wait()
            except BaseException:
                self._stop(process)
                raise
            finally:
                self._running = None

    def collect(self, products: PurePath, into: Path) -> None:
        """Copy the products, links as links.

        Raises:
            PackError: ``WRITE_FAILED``: the disk is full.
        """
        with durable.writing(into):
            shutil.copytree(products, into, symlinks=True, dirs_exist_ok=True)

    def end(self) -> None:
        """End the running command, and every command that begins later."""
        self._ended, running = True, self._running
        if running is not None:
            self._stop(running)

    def _stop(self, process: subprocess.Popen[str]) -> None:
        """End a command and everything that it started.

        Ninja gives every compiler a process group of its own, so a signal to the command's group
        does not reach them. On SIGTERM ninja ends them itself; processes that are left are found
        by the folder that they work in.
        """
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
        _end_workers(Path(self.layout.build).parent)


class LocalEngine:
    """Builds with this host's compilers; ``cached=False`` uses no compiler cache."""

    name = "local"

    def __init__(
        self, *, cuda: Path | None = None, jobs: int | None = None, cached: bool = True
    ) -> None:
        self._cuda = cuda
        self._jobs = jobs or cgroups.processors()
        self._cached = cached

    def identity(self, plan: BuildPlan) -> str:
        """Return the identity of the compilers, from their own version output.

        Raises:
            EngineError: there is no C++ compiler, one does not run, or this host is another machine
                than the line's.
        """
        _require_compiler()
        if (machine := platform.machine()) != plan.line.machine:
            raise EngineError("HOST_MACHINE", machine=machine, needs=plan.line.machine)
        programs = [shutil.which(name) for name in ("cc", "gcc", "c++", "g++", "ld")]
        if plan.line.is_cuda and self._cuda is not None:
            programs.append(str(self._cuda / "bin" / "nvcc"))
        told = [_version(program) for program in programs if program]
        # CMake is known by its version: nox brings one in a folder of each session's own
        return "\n".join(["local", _version(_tool("cmake")).partition(": ")[2], *told])

    @contextmanager
    def open(self, plan: BuildPlan, sink: LineSink) -> Iterator[LocalWorkspace]:
        """Make a private build folder below the user's cache, removed on every exit.

        Those whose makers were killed are removed first, and their compilers ended.

        Raises:
            EngineError: there is no C++ compiler, CMake or Ninja.
        """
        cmake, ninja = _tool("cmake"), _tool("ninja")
        _require_compiler()
        ccache = shared_cache.program() if self._cached else None
        if ccache is None and self._cached:
            sink(remark("NO_CCACHE"))
        parent = cache_folder("builds")
        sweep_folders(parent, sink)
        with held_folder(parent, f"{plan.key}.") as folder:
            tree, build = folder / "source", folder / "build"
            shutil.copytree(
                plan.source.tree, tree, symlinks=True, ignore=shutil.ignore_patterns(".git")
            )
            build.mkdir()
            cmake_file = folder / patches.RECIPE.name
            cmake_file.write_bytes(patches.recipe())
            workspace = LocalWorkspace(
                layout=Layout(
                    source=tree,
                    build=build,
                    recipe=cmake_file,
                    cuda=self._cuda,
                    launcher=ccache or "",
                    cmake=cmake,
                    ninja=ninja,
                    passing=True,
                ),
                jobs=self._jobs,
                image=None,
                ccache_dir=ccache_dir() / shared_cache.owner(plan.source, None) if ccache else None,
            )
            try:
                yield workspace
            finally:
                workspace.end()

    def close(self) -> None:
        """Do nothing: this engine holds nothing open."""


def ccache_dir() -> Path:
    """Return the local engine's compiler cache; ``CCACHE_DIR`` moves it."""
    configured = os.environ.get("CCACHE_DIR")
    return Path(configured) if configured else cache_folder("ccache")


def _tool(name: str) -> str:
    """Find a program on PATH, else beside this Python, where the farm's own packages install it."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which(name) or shutil.which(name, path=beside)
    if found is None:
        raise EngineError("TOOL_MISSING", name=name)
    return found


def _version(program: str) -> str:
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise EngineError("COMPILER_BROKEN", program=program, error=error) from error
    return f"{program}: {done.stdout.strip()}"


def _require_compiler() -> None:
    if shutil.which("g++") is None and shutil.which("c++") is None:
        raise EngineError("COMPILER_MISSING")


@contextmanager
def held_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Make a folder that this process holds; it is removed when the context is left.

    Raises:
        BuildError: ``OUT_NOT_WRITABLE``.
    """
    with contextlib.ExitStack() as stack:
        with run_lock.turn(parent, "folders"):  # a sweep sees no folder that is not held yet
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            stack.callback(durable.remove, folder)
            maker = stack.enter_context((folder / _MAKER_FILE).open("a+", encoding="ascii"))
            fcntl.flock(maker, fcntl.LOCK_EX)
        yield folder


def sweep_folders(parent: Path, sink: LineSink) -> None:
    """Remove folders that no living process holds, and end their compilers, with a note.

    Raises:
        BuildError: ``OUT_NOT_WRITABLE``.
    """
    with run_lock.turn(parent, "folders"):
        for file in sorted(parent.glob(f"*/{_MAKER_FILE}")):
            with contextlib.suppress(OSError), file.open("a+", encoding="ascii") as maker:
                fcntl.flock(maker, fcntl.LOCK_EX | fcntl.LOCK_NB)
                ended = _end_workers(file.parent)
                durable.remove(file.parent)
                also = f", and ended {ended} processes in it" if ended else ""
                sink(remark("LEFT_BEHIND", folder=file.parent, also=also))


def _end_workers(folder: Path) -> int:
    """Kill the processes that work in a private folder; return how many there were."""
    ended: set[int] = set()
    deadline = time.monotonic() + _GRACE
    while (left := _workers(folder.resolve())) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        ended.update(left)
        time.sleep(_PAUSE)
    return len(ended)


def _workers(folder: Path) -> list[int]:
    """Return the processes in a folder without a terminal, which a person's shell has."""
    found = []
    for cwd in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            fields = (cwd.parent / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
            if cwd.readlink().is_relative_to(folder) and fields[_TERMINAL] == "0":
                found.append(int(cwd.parent.name))
    return found
