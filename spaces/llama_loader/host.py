"""Describe this machine: facts only, gathered without creating a CUDA context.

A context in the calling process would break ZeroGPU (the main process must never touch CUDA) and
cost half a second elsewhere. So GPUs are asked for through NVML, which is management only, then
``nvidia-smi``, then ``/proc/driver/nvidia``, then what ZeroGPU documents; the first that answers
counts, and ``gpu_source`` names it.
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

from llama_loader import cgroups, cuda_libraries, gpus, nvml, processes
from llama_loader.concurrency import Background
from llama_loader.gpus import Gpu

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from llama_loader.cuda_libraries import Library
    from llama_loader.settings import Settings

_NVML_TIMEOUT: Final = 10.0
"""Seconds. NVML takes 20 ms, but several seconds where the driver is not kept loaded."""
_SMI_TIMEOUT: Final = 20.0
"""Seconds. nvidia-smi takes 0.1 s, but several where the driver is not kept loaded."""
_SMI_FIELDS: Final = ("name", "compute_cap", "memory.total", "driver_version", "uuid")
_COMPLAINT: Final = 300
"""Most characters kept of what nvidia-smi prints when it fails."""
_PROGRAM_FOLDERS: Final = (
    "/usr/bin",
    "/usr/local/bin",
    "/usr/local/nvidia/bin",  # GKE
    "/bin",
    "/usr/lib/wsl/lib",  # WSL 2
    "/run/current-system/sw/bin",  # NixOS
)
"""Where NVIDIA's programs are installed, searched before PATH."""


@dataclass(frozen=True)
class HostFacts:
    """This machine, as far as choosing an artifact and serving a model need it.

    Attributes:
        system, machine: such as ``linux`` and ``x86_64``.
        glibc, glibcxx: versions (``2.36``, ``3.4.30``); None where there is none or unknown.
        python: version of this interpreter.
        driver: NVIDIA driver's version, None where there is none or it cannot be known.
        gpus: what was found; on ZeroGPU what will be attached.
        gpu_source: what named them: ``nvml``, ``nvidia-smi``, ``/proc/driver/nvidia``, ``zerogpu``,
            ``supposed`` or ``none``.
        libraries: CUDA libraries that could serve, in the order in which they would be taken.
        cpus: logical CPUs that this process may use, by its affinity and its control groups.
        memory: bytes of main memory that this process may use; 0 for unknown.
        machine_cpus: logical CPUs of the machine; 0 for unknown.
        threads: how many can compute at the same time; None where that is all of its cores.
        zerogpu: this is a ZeroGPU Space.
        visible_devices: CUDA_VISIBLE_DEVICES, None where unset.
        cpu: the processor's name, None where unknown.
        device_order: CUDA_DEVICE_ORDER, None where unset.
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
    threads: int | None = None
    zerogpu: bool = False
    visible_devices: str | None = None
    cpu: str | None = None
    device_order: str | None = None
    driver_folders: tuple[Path, ...] = ()
    complaints: tuple[str, ...] = ()

    @property
    def visible(self) -> tuple[Gpu, ...]:
        """The GPUs that a program will see, in its order; all where that cannot be known."""
        return gpus.visible(self.gpus, self._named, self.device_order)[0]

    @property
    def visible_count(self) -> int:
        """How many GPUs a program will see, also where it is unknown which; an upper bound."""
        return gpus.visible(self.gpus, self._named, self.device_order)[1]

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Known compute capabilities of the visible GPUs, each once, in their order."""
        return tuple(dict.fromkeys(gpu.capability for gpu in self.visible if gpu.capability))

    @property
    def _named(self) -> str | None:
        """CUDA_VISIBLE_DEVICES, where it is the one that a program will have.

        A ZeroGPU worker gets its own: that of the main process, which has no GPU, means nothing.
        """
        to_come = self.zerogpu and self.gpu_source not in {"nvml", "nvidia-smi"}
        return None if to_come else self.visible_devices


def detect(settings: Settings, *, root: Path = Path("/")) -> HostFacts:
    """Gather the facts; takes some ten milliseconds, and never raises.

    Args:
        settings: what may be seen of the environment, and whether this is ZeroGPU.
        root: where ``/proc`` and ``/usr`` are looked for; tests give another.
    """
    inherited, machine = settings.inherited, platform.machine()
    cache = cuda_libraries.linker_cache(processes.environment(inherited))
    driver_folders = cuda_libraries.driver_folders(settings.library_path, cache)
    python_path = [Path(entry) for entry in sys.path if entry]
    source, answers = "none", list[nvml.Answer]()
    for name, answer in _answers(settings, driver_folders, root):
        answers.append(answer)
        if answer.gpus:
            source = name
            break
    return HostFacts(
        system=sys.platform,
        machine=machine,
        glibc=_glibc(),
        glibcxx=_glibcxx([path.parent for path in cache], root, machine),
        python=platform.python_version(),
        driver=next((answer.driver for answer in answers if answer.driver), None),
        gpus=answers[-1].gpus,
        gpu_source=source,
        libraries=cuda_libraries.find_libraries(
            settings.library_path, cache, python_path, root, machine
        ),
        cpus=cgroups.processors(root),
        memory=cgroups.memory(root),
        machine_cpus=os.cpu_count() or 0,
        threads=cgroups.threads(root),
        zerogpu=settings.zerogpu,
        visible_devices=inherited.get("CUDA_VISIBLE_DEVICES"),
        cpu=_field(r"^model name\s*: (.+?)\s*$", root / "proc/cpuinfo"),
        device_order=inherited.get("CUDA_DEVICE_ORDER"),
        driver_folders=driver_folders,
        complaints=tuple(one for answer in answers for one in answer.complaints),
    )


def begin(settings: Settings) -> Background[HostFacts]:
    """Begin to ``detect``: the driver and ldconfig take 50 ms that other work can use."""
    return Background(lambda: detect(settings))


def _answers(
    settings: Settings, driver_folders: Sequence[Path], root: Path
) -> Iterator[tuple[str, nvml.Answer]]:
    """Ask one source after the other; the first that names GPUs should be the last asked."""
    if root == Path("/"):
        told = nvml.query(driver_folders, timeout=_NVML_TIMEOUT)
        yield "nvml", told
        if not told.hangs:  # nvidia-smi asks NVML, and would hang too
            environ = processes.environment(settings.inherited, libraries=driver_folders)
            yield "nvidia-smi", _from_smi(environ)
    yield "/proc/driver/nvidia", _from_proc(root)
    if settings.zerogpu:
        yield "zerogpu", nvml.Answer(gpus=(gpus.ZEROGPU,))


def _from_smi(environ: Mapping[str, str]) -> nvml.Answer:
    program = find_program("nvidia-smi", environ)
    if program is None:
        return nvml.Answer()
    argv = [program, f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    done = processes.run(argv, environ, timeout=_SMI_TIMEOUT)
    driver, found = parse_smi(done.output) if done.status == 0 else (None, ())
    if found:
        return nvml.Answer(driver, found)
    printed = " ".join((done.failure or done.output).split())[:_COMPLAINT]
    late = f"no answer within {_SMI_TIMEOUT:g} s" if done.status is None else "no GPU"
    return nvml.Answer(complaints=(f"nvidia-smi: {printed or late}",))


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
        if len(cells) != len(_SMI_FIELDS) or cells[0][:1] in {"", "["}:
            continue
        name, capability, memory, version, uuid = cells
        driver = driver or (version if re.fullmatch(r"[0-9]+(\.[0-9]+)+", version) else None)
        dotted = re.fullmatch(r"([0-9]{1,2})\.([0-9])", capability)
        found.append(
            Gpu(
                name,
                dotted[1] + dotted[2] if dotted else gpus.capability(name),
                int(memory) * 1024**2 if re.fullmatch(r"[0-9]{1,9}", memory) else None,
                uuid if uuid.startswith("GPU-") else None,
            )
        )
    return driver, tuple(found)


def _from_proc(root: Path) -> nvml.Answer:
    folder, found = root / "proc/driver/nvidia", []
    for information in sorted(folder.glob("gpus/*/information")):
        name = _field(r"^Model:\s*(.+?)\s*$", information)
        # GPU-????????-…: the driver has not asked this GPU yet
        uuid = _field(r"^GPU UUID:\s*([^\s?]+)\s*$", information)
        found += [Gpu(name, gpus.capability(name), None, uuid)] if name else []
    version = _field(r"Kernel Module.*?\s([0-9]{3,}(?:\.[0-9]+)+)(?:\s|$)", folder / "version")
    return nvml.Answer(version, tuple(found))


def _field(pattern: str, path: Path) -> str | None:
    """Return what a pattern's group matches in a file of the kernel."""
    matched = re.search(pattern, cgroups.read_text(path), re.MULTILINE)
    return matched[1] if matched else None


def _glibc() -> str | None:
    name, version = platform.libc_ver()
    return version if name == "glibc" else None


def _glibcxx(folders: Sequence[Path], root: Path, machine: str) -> str | None:
    """Return the newest GLIBCXX version that the system's libstdc++ offers."""
    usual = [root / "usr/lib" / f"{machine}-linux-gnu", root / "usr/lib64", root / "usr/lib"]
    for folder in dict.fromkeys([*folders, *usual]):
        try:
            data = (folder / "libstdc++.so.6").read_bytes()
        except OSError:
            continue
        found = re.findall(rb"GLIBCXX_([0-9]+(?:\.[0-9]+)+)\x00", data)
        newest = max((tuple(map(int, one.split(b"."))) for one in found), default=())
        return ".".join(map(str, newest)) or None
    return None
