"""What this machine is: facts only, gathered without creating a CUDA context.

A context in the calling process would break ZeroGPU (the main process must never touch CUDA) and
cost half a second elsewhere. So GPUs are asked for through NVML, which is management only, then
``nvidia-smi``, then ``/proc/driver/nvidia``, then what ZeroGPU documents; the first that answers
counts, and ``gpu_source`` says which.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from llama_loader import cgroups, gpus, nvml, processes
from llama_loader.concurrency import Background
from llama_loader.cuda_libraries import Library, find_libraries, linker_cache
from llama_loader.gpus import Gpu
from llama_loader.system_files import read

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llama_loader.settings import Settings

_SMI_TIMEOUT: Final = 20.0
"""Seconds. nvidia-smi takes 0.1 s, but several where the driver is not kept loaded."""
_ATTACHED: Final = frozenset({"nvml", "nvidia-smi"})
"""Who tells only of GPUs that this process could use."""
_PROGRAM_FOLDERS: Final = (
    "/usr/bin",
    "/usr/local/bin",
    "/usr/local/nvidia/bin",  # GKE
    "/bin",
    "/usr/lib/wsl/lib",  # WSL 2
    "/run/current-system/sw/bin",  # NixOS
)
"""Where NVIDIA's programs are installed, searched before PATH."""
_SMI_FIELDS: Final = "name,compute_cap,memory.total,driver_version,uuid"


@dataclass(frozen=True)
class HostFacts:
    """This machine, as far as choosing an artifact and serving a model need it.

    Attributes:
        system, machine: such as ``linux`` and ``x86_64``.
        glibc, glibcxx: versions (``2.36``, ``3.4.30``); None where there is none or unknown.
        python: version of this interpreter.
        driver: NVIDIA driver's version, None where there is none or it cannot be known.
        gpus: what was found; on ZeroGPU what will be attached.
        gpu_source: who said so: ``nvml``, ``nvidia-smi``, ``/proc/driver/nvidia``, ``zerogpu``,
            ``setting`` or ``none``.
        libraries: CUDA libraries that could serve, in the order in which they would be taken.
        cpus: logical CPUs that this process may use, by its affinity and its control groups.
        memory: bytes of main memory that this process may use; 0 for unknown.
        machine_cpus: logical CPUs of the machine; 0 for unknown.
        threads: that can compute at the same time here; None where that is all of its cores.
        zerogpu: this is a ZeroGPU Space.
        visible_devices: CUDA_VISIBLE_DEVICES, None where unset.
        cpu: the processor's name, None where unknown.
        device_order: CUDA_DEVICE_ORDER, None where unset.
    """

    system: str
    machine: str
    glibc: str | None
    glibcxx: str | None
    python: str
    driver: str | None
    gpus: tuple[Gpu, ...]
    gpu_source: str
    libraries: tuple[Library, ...]
    cpus: int
    memory: int
    machine_cpus: int = 0
    threads: int | None = None
    zerogpu: bool = False
    visible_devices: str | None = None
    cpu: str | None = None
    device_order: str | None = None

    @property
    def visible(self) -> tuple[Gpu, ...]:
        """The GPUs that a program will see, in its order; all where that cannot be known."""
        return gpus.visible(self.gpus, self._named, self.device_order)

    @property
    def visible_count(self) -> int:
        """How many GPUs a program will see, also where it is unknown which; an upper bound."""
        return gpus.visible_count(self.gpus, self._named)

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Known compute capabilities of the visible GPUs, each once, in their order."""
        return tuple(dict.fromkeys(gpu.capability for gpu in self.visible if gpu.capability))

    @property
    def _named(self) -> str | None:
        """CUDA_VISIBLE_DEVICES, where it is the one that a program will have.

        A ZeroGPU worker gets its own: that of the main process, which has no GPU, means nothing.
        """
        to_come = self.zerogpu and self.gpu_source not in _ATTACHED
        return None if to_come else self.visible_devices


def detect(settings: Settings, *, root: Path = Path("/")) -> HostFacts:
    """Gather the facts; takes some ten milliseconds, and never raises.

    Args:
        settings: what may be seen of the environment, and whether this is ZeroGPU.
        root: where ``/proc`` and ``/usr`` are looked for; tests give another.
    """
    environ = processes.environment(settings.inherited)
    cache = linker_cache(environ)
    driver, found, source = _gpus(environ, root, zerogpu=settings.zerogpu)
    return HostFacts(
        system=sys.platform,
        machine=platform.machine(),
        glibc=_glibc(),
        glibcxx=_glibcxx([path.parent for path in cache], root),
        python=platform.python_version(),
        driver=driver,
        gpus=found,
        gpu_source=source,
        libraries=find_libraries(
            settings.library_path,
            cache,
            [Path(entry) for entry in sys.path if entry],
            root,
            platform.machine(),
        ),
        cpus=cgroups.processors(root),
        memory=_memory(root),
        machine_cpus=os.cpu_count() or 0,
        threads=cgroups.threads(root),
        zerogpu=settings.zerogpu,
        visible_devices=settings.inherited.get("CUDA_VISIBLE_DEVICES"),
        cpu=_cpu(root),
        device_order=settings.inherited.get("CUDA_DEVICE_ORDER"),
    )


def begin(settings: Settings) -> Background[HostFacts]:
    """Begin to ``detect``: the driver and ldconfig take 50 ms that others can use."""
    return Background(lambda: detect(settings))


def _gpus(
    environ: Mapping[str, str], root: Path, *, zerogpu: bool
) -> tuple[str | None, tuple[Gpu, ...], str]:
    """Return driver, GPUs and who said so."""
    here = root == Path("/")
    answer = nvml.query() if here else None
    if answer is not None and answer.gpus:
        found = tuple(
            Gpu(gpu.name, gpu.capability, gpu.memory, gpu.uuid, gpu.free) for gpu in answer.gpus
        )
        return answer.driver, found, "nvml"
    driver, smi = _from_smi(environ) if here else (None, ())
    if smi:
        return driver, smi, "nvidia-smi"
    driver = driver or (answer.driver if answer else None) or _proc_driver(root)
    named = _from_proc(root)
    if named:
        return driver, named, "/proc/driver/nvidia"
    if zerogpu:
        known = Gpu(gpus.ZEROGPU_NAME, gpus.ZEROGPU_CAPABILITY, gpus.ZEROGPU_MEMORY)
        return driver, (known,), "zerogpu"
    return driver, (), "none"


def _from_smi(environ: Mapping[str, str]) -> tuple[str | None, tuple[Gpu, ...]]:
    program = find_program("nvidia-smi", environ)
    if program is None:
        return None, ()
    argv = [program, f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader,nounits"]
    done = processes.run(argv, environ, timeout=_SMI_TIMEOUT)
    return parse_smi(done.output) if done.status == 0 else (None, ())


def find_program(name: str, environ: Mapping[str, str]) -> str | None:
    """Return the absolute path of a program, None where it is not installed.

    The usual folders come first, then the absolute entries of PATH. An empty or relative entry
    means the working folder, where anyone may have put a program: it is never searched.
    """
    entries = environ.get("PATH", "").split(os.pathsep)
    folders = (*_PROGRAM_FOLDERS, *(entry for entry in entries if entry.startswith("/")))
    return shutil.which(name, path=os.pathsep.join(folders))


def parse_smi(text: str) -> tuple[str | None, tuple[Gpu, ...]]:
    """Read ``nvidia-smi --query-gpu``'s CSV: the driver's version and the GPUs.

    Lines that are not such a row are passed over; ``[N/A]``, ``Unknown Error`` and whatever else
    is no number is unknown.
    """
    driver, found = None, []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(_SMI_FIELDS.split(",")) or cells[0][:1] in {"", "["}:
            continue
        name, capability, memory, version, uuid = cells
        driver = driver or (version if re.fullmatch(r"[0-9]+(\.[0-9]+)+", version) else None)
        found.append(
            Gpu(
                name,
                _capability(capability) or gpus.capability(name),
                int(memory) * 1024**2 if re.fullmatch(r"[0-9]{1,9}", memory) else None,
                uuid if uuid.startswith("GPU-") else None,
            )
        )
    return driver, tuple(found)


def _capability(cell: str) -> str | None:
    """``9.0`` → ``90``; ``[N/A]``, ``Unknown Error`` and the like are no capability."""
    return cell.replace(".", "") if re.fullmatch(r"[0-9]{1,2}\.[0-9]", cell) else None


def _from_proc(root: Path) -> tuple[Gpu, ...]:
    found = []
    for information in sorted(root.glob("proc/driver/nvidia/gpus/*/information")):
        text = read(information)
        model = re.search(r"^Model:\s*(.+?)\s*$", text, re.MULTILINE)
        # GPU-????????-…: the driver has not asked this GPU yet
        uuid = re.search(r"^GPU UUID:\s*([^\s?]+)\s*$", text, re.MULTILINE)
        if model:
            name = model[1]
            found.append(Gpu(name, gpus.capability(name), None, uuid[1] if uuid else None))
    return tuple(found)


def _proc_driver(root: Path) -> str | None:
    text = read(root / "proc/driver/nvidia/version")
    version = re.search(r"Kernel Module.*?\s([0-9]{3,}(?:\.[0-9]+)+)\s", text)
    return version[1] if version else None


def _glibc() -> str | None:
    try:
        answer = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):  # another C library
        return None
    name, _, version = answer.partition(" ")
    return version if name == "glibc" else None


def _glibcxx(folders: Sequence[Path], root: Path) -> str | None:
    """Return the newest GLIBCXX version that the system's libstdc++ offers."""
    usual = [root / "usr/lib/x86_64-linux-gnu", root / "usr/lib64", root / "usr/lib"]
    for folder in dict.fromkeys([*folders, *usual]):
        library = folder / "libstdc++.so.6"
        if library.is_file():
            return _newest_glibcxx(library)
    return None


def _newest_glibcxx(library: Path) -> str | None:
    try:
        data = library.read_bytes()
    except OSError:
        return None
    versions = [
        tuple(map(int, found.split(b".")))
        for found in re.findall(rb"GLIBCXX_([0-9]+(?:\.[0-9]+)+)\x00", data)
    ]
    return ".".join(map(str, max(versions))) if versions else None


def _cpu(root: Path) -> str | None:
    named = re.search(r"^model name\s*: (.+)$", read(root / "proc/cpuinfo"), re.MULTILINE)
    return named[1].strip() if named else None


def _memory(root: Path) -> int:
    """The machine's, or what this container may use of it."""
    total = re.search(r"^MemTotal:\s*([0-9]+) kB", read(root / "proc/meminfo"), re.MULTILINE)
    known = [int(total[1]) * 1024] if total else []
    limit = cgroups.memory(root)
    return min([*known, *([] if limit is None else [limit])], default=0)
