"""Describe this machine: facts only, gathered without creating a CUDA context.

A context in the calling process would break ZeroGPU (the main process must never touch CUDA) and
cost half a second elsewhere. So GPUs are asked for through NVML, which is management only, then
``nvidia-smi``, then ``/proc/driver/nvidia``, then what ZeroGPU documents; the first that names any
counts, and ``gpu_source`` names it.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from llama_loader import cgroups, cuda_libraries, gpus, processes
from llama_loader import driver as nvidia
from llama_loader.concurrency import Background
from llama_loader.gpus import Gpu

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llama_loader.cuda_libraries import Library
    from llama_loader.settings import Settings

_PROC: Final = "proc/driver/nvidia"


@dataclass(frozen=True)
class HostFacts:
    """This machine, as far as choosing an artifact and serving a model need it.

    Attributes:
        glibc, glibcxx, driver: versions (``2.36``, ``3.4.30``, ``580.95``); None where there is
            none or it cannot be known.
        gpus: what was found; on ZeroGPU what will be attached.
        gpu_source: what named them: ``nvml``, ``nvidia-smi``, ``/proc/driver/nvidia``, ``zerogpu``,
            ``supposed`` or ``none``.
        libraries: CUDA libraries that could serve, in the order in which they would be taken.
        cpus, memory: what this process may use of ``machine_cpus`` logical CPUs, and of main
            memory, in bytes; 0 for unknown.
        visible_devices, device_order: CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER, None where unset.
        driver_folders: folders of LD_LIBRARY_PATH that alone lead to the driver, for the server's.
        complaints: why NVML or nvidia-smi did not answer, and which GPUs they left out.
    """

    system: str
    machine: str
    glibc: str | None = None
    glibcxx: str | None = None
    python: str = ""
    driver: str | None = None
    gpus: tuple[Gpu, ...] = ()
    gpu_source: str = "none"
    libraries: tuple[Library, ...] = ()
    cpus: int = 0
    memory: int = 0
    machine_cpus: int = 0
    zerogpu: bool = False
    visible_devices: str | None = None
    device_order: str | None = None
    driver_folders: tuple[Path, ...] = ()
    complaints: tuple[str, ...] = ()

    @property
    def visible(self) -> tuple[Gpu, ...]:
        """The GPUs that a program will see, in its order; all where that cannot be known."""
        return self._seen[0]

    @property
    def visible_count(self) -> int:
        """How many GPUs a program will see, also where it is unknown which; an upper bound."""
        return self._seen[1]

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Known compute capabilities of the visible GPUs, each once, in their order."""
        return tuple(dict.fromkeys(gpu.capability for gpu in self.visible if gpu.capability))

    @property
    def threads(self) -> int | None:
        """How many can compute at once; None where nothing limits this process to fewer CPUs."""
        return self.cpus if self.cpus < self.machine_cpus else None

    @property
    def _seen(self) -> tuple[tuple[Gpu, ...], int]:
        # A ZeroGPU worker gets a CUDA_VISIBLE_DEVICES of its own: that of the main process, which
        # has no GPU, means nothing.
        to_come = self.zerogpu and self.gpu_source not in {"nvml", "nvidia-smi"}
        named = None if to_come else self.visible_devices
        return gpus.visible(self.gpus, named, self.device_order)


def detect(settings: Settings, *, root: Path = Path("/")) -> HostFacts:
    """Gather the facts; takes some ten milliseconds, and never raises.

    Args:
        settings: what may be seen of the environment, and whether this is ZeroGPU.
        root: where ``/proc`` and ``/usr`` are looked for; tests give another.
    """
    inherited = settings.inherited
    cache = cuda_libraries.linker_cache(processes.environment(inherited))
    driver_folders = cuda_libraries.driver_folders(settings.library_path, cache)
    python_path = [Path(entry) for entry in sys.path if entry]
    here = root == Path("/")
    told = nvidia.ask(driver_folders, inherited) if here else nvidia.Answer()
    sources = (
        (told.source, told.gpus),
        (f"/{_PROC}", _gpus_of_proc(root)),
        ("zerogpu", (gpus.ZEROGPU,) if settings.zerogpu else ()),
    )
    source, found = next((one for one in sources if one[1]), ("none", ()))
    module = r"Kernel Module.*?\s([0-9]{3,}(?:\.[0-9]+)+)(?:\s|$)"
    return HostFacts(
        system=sys.platform,
        machine=platform.machine(),
        glibc=_glibc(),
        glibcxx=_glibcxx(cache),
        python=platform.python_version(),
        driver=told.driver or _field(module, root / _PROC / "version"),
        gpus=found,
        gpu_source=source,
        libraries=cuda_libraries.find_libraries(settings.library_path, cache, python_path, root),
        cpus=cgroups.processors(root),
        memory=cgroups.memory(root),
        machine_cpus=os.cpu_count() or 0,
        zerogpu=settings.zerogpu,
        visible_devices=inherited.get("CUDA_VISIBLE_DEVICES"),
        device_order=inherited.get("CUDA_DEVICE_ORDER"),
        driver_folders=driver_folders,
        complaints=told.complaints,
    )


def begin(settings: Settings) -> Background[HostFacts]:
    """Begin to ``detect``: the driver and ldconfig take 50 ms that other work can use."""
    return Background(lambda: detect(settings))


def _gpus_of_proc(root: Path) -> tuple[Gpu, ...]:
    """Return the GPUs that the kernel's module names; it tells neither capability nor memory."""
    found = []
    for information in sorted((root / _PROC).glob("gpus/*/information")):
        # GPU-????????-…: the driver has not asked this GPU yet
        uuid = _field(r"^GPU UUID:\s*([^\s?]+)\s*$", information)
        if name := _field(r"^Model:\s*(.+?)\s*$", information):
            found.append(Gpu(name, gpus.capability(name), None, uuid))
    return tuple(found)


def _field(pattern: str, path: Path) -> str | None:
    """Return what a pattern's group matches in a file of the kernel."""
    matched = re.search(pattern, cgroups.read_text(path), re.MULTILINE)
    return matched[1] if matched else None


def _glibc() -> str | None:
    name, version = platform.libc_ver()
    return version if name == "glibc" else None


def _glibcxx(cache: Sequence[Path]) -> str | None:
    """Return the newest GLIBCXX version of the system's libstdc++, by its file's name.

    ``libstdc++.so.6.0.30`` offers ``GLIBCXX_3.4.30``
    (https://gcc.gnu.org/onlinedocs/libstdc++/manual/abi.html).
    """
    files = [path.resolve().name for path in cache if path.name == "libstdc++.so.6"]
    found = [re.fullmatch(r"libstdc\+\+\.so\.6\.0\.([0-9]+)", file) for file in files]
    return next((f"3.4.{matched[1]}" for matched in found if matched), None)
