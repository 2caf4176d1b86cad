"""Describe this machine: facts only, gathered without creating a CUDA context.

A context in the calling process would break ZeroGPU (the main process must never touch CUDA) and
cost half a second elsewhere. So GPUs are detected through NVML, which is management only, then
``nvidia-smi``, then ``/proc/driver/nvidia``, then what ZeroGPU documents; the first that names any
counts. Why NVML or nvidia-smi does not answer is kept; neither is waited for without end.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import site
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from llama_loader import cgroups, cuda_libraries, gpus, processes
from llama_loader.concurrency import Background
from llama_loader.gpus import Gpu, capability
from llama_loader.settings import Settings

_PROC: Final = "proc/driver/nvidia"
_LIBRARY: Final = "libnvidia-ml.so.1"
_NVML_TIMEOUT: Final = 10.0
"""Seconds. NVML takes 20 ms, but several seconds where the driver is not kept loaded."""
_TEXT: Final = 96
"""NVML_DEVICE_NAME_V2_BUFFER_SIZE and NVML_DEVICE_UUID_V2_BUFFER_SIZE, the longest of them."""
_LOST: Final = 15
"""NVML_ERROR_GPU_IS_LOST."""
_FOLDERS: Final = (
    "/usr/bin",
    "/usr/local/bin",
    "/usr/local/nvidia/bin",  # GKE
    "/bin",
    "/usr/lib/wsl/lib",  # WSL 2
    "/run/current-system/sw/bin",  # NixOS
)
"""Where NVIDIA's programs are installed, searched before PATH."""
_SMI_TIMEOUT: Final = 20.0
"""Seconds. It takes 0.1 s, but several where the driver is not kept loaded."""
_SMI_FIELDS: Final = ("name", "compute_cap", "memory.total", "driver_version", "uuid")
_SHOWN: Final = 300
"""Most characters kept of what it prints when it fails."""
SUPPOSED: Final = "supposed"
"""The ``gpu_source`` of a machine that is only described."""


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
    libraries: tuple[cuda_libraries.Library, ...] = ()
    cpus: int = 0
    memory: int = 0
    machine_cpus: int = 0
    zerogpu: bool = False
    visible_devices: str | None = None
    device_order: str | None = None
    driver_folders: tuple[Path, ...] = ()
    complaints: tuple[str, ...] = ()

    @property
    def called(self) -> str:
        """What sentences call this machine."""
        return "that machine" if self.gpu_source == SUPPOSED else "this machine"

    @property
    def visible(self) -> tuple[Gpu, ...]:
        """The GPUs that a program will see, in its order; all where that cannot be known."""
        return self._seen[0]

    @property
    def visible_count(self) -> int:
        """How many GPUs a program will see, at most; also where it is unknown which."""
        return self._seen[1]

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Known compute capabilities of the visible GPUs, each once, in their order."""
        return tuple(dict.fromkeys(gpu.capability for gpu in self.visible if gpu.capability))

    def only(self, names: Sequence[str]) -> HostFacts:
        """Return the facts with the GPUs alone that names such as ``CUDA1`` mean, if known."""
        indices = [int(one[4:]) for one in names if re.fullmatch("CUDA[0-9]{1,4}", one.upper())]
        there, count = self._seen
        counted = len(there) == count and self.device_order in {None, gpus.BY_BUS}
        if not counted or len(indices) < len(names) or max(indices, default=count) >= count:
            return self
        return replace(self, gpus=tuple(there[one] for one in indices), visible_devices=None)

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


@dataclass(frozen=True)
class DriverReport:
    """The answer of NVML or nvidia-smi: the driver's version, the usable GPUs in PCI order.

    ``complaints`` has a sentence for each failure; ``source`` is the one that named the GPUs.
    """

    driver: str | None = None
    gpus: tuple[Gpu, ...] = ()
    complaints: tuple[str, ...] = ()
    source: str = ""


class _Refused(Exception):  # noqa: N818 - an answer of NVML's; never leaves this module
    """A call that did not return NVML_SUCCESS."""


def detect(settings: Settings, *, root: Path = Path("/")) -> HostFacts:
    """Gather the facts, in some ten milliseconds; ``root`` is where ``/proc`` and ``/usr`` are."""
    inherited = settings.inherited
    cache = cuda_libraries.linker_cache(processes.environment(inherited))
    driver_folders = cuda_libraries.driver_folders(settings.library_path, cache)
    told = ask(driver_folders, inherited) if root == Path("/") else DriverReport()
    # an empty entry is the working folder, too, where any user may put files
    cwd, own = os.path.realpath("/proc/self/cwd"), site.getsitepackages()
    used = [one for one in sys.path if one and (one in own or os.path.realpath(one) != cwd)]
    packages = [*map(Path, used)]
    sources = (
        (told.source, told.gpus),
        (f"/{_PROC}", _gpus_of_proc(root)),
        ("zerogpu", (gpus.ZEROGPU,) if settings.zerogpu else ()),
    )
    source, found = next((one for one in sources if one[1]), ("none", ()))
    module = r"Kernel Module.*?\s([0-9]{3,6}(?:\.[0-9]{1,6})+)(?:\s|$)"
    return HostFacts(
        system=sys.platform,
        machine=platform.machine(),
        glibc=dict([platform.libc_ver()]).get("glibc"),  # musl is another one
        glibcxx=_glibcxx(cache),
        python=platform.python_version(),
        driver=told.driver or _field(module, root / _PROC / "version"),
        gpus=found,
        gpu_source=source,
        libraries=cuda_libraries.find_libraries(settings.library_path, cache, packages, root),
        cpus=cgroups.processors(root),
        memory=cgroups.memory(root),
        machine_cpus=os.cpu_count() or 0,
        zerogpu=settings.zerogpu,
        visible_devices=inherited.get("CUDA_VISIBLE_DEVICES"),
        device_order=inherited.get("CUDA_DEVICE_ORDER"),
        driver_folders=driver_folders,
        complaints=told.complaints,
    )


def begin(settings: Settings, known: HostFacts | None = None) -> Background[HostFacts]:
    """Begin to ``detect``: the driver and ldconfig take 50 ms that other work can use.

    ``known`` are the facts of the process that forked this one: only the driver is asked again.
    """
    return Background(lambda: _renewed(known, settings) if known else detect(settings))


def _renewed(known: HostFacts, settings: Settings) -> HostFacts:
    """Return the facts with the GPUs that this process sees; all facts again if it sees none."""
    seen = settings.inherited
    told = DriverReport() if settings.cpu_chosen else ask(known.driver_folders, seen)
    if not (told.gpus or settings.cpu_chosen):
        return detect(settings)
    return replace(
        known,
        driver=told.driver or known.driver,
        gpus=told.gpus or known.gpus,
        gpu_source=told.source or known.gpu_source,
        visible_devices=seen.get("CUDA_VISIBLE_DEVICES"),
        device_order=seen.get("CUDA_DEVICE_ORDER"),
        complaints=told.complaints,
    )


def _gpus_of_proc(root: Path) -> tuple[Gpu, ...]:
    """Return the GPUs that the kernel's module names; it has neither capability nor memory."""
    found = []
    for information in sorted((root / _PROC).glob("gpus/*/information")):
        # GPU-????????-…: the driver has not asked this GPU yet
        uuid = _field(r"^GPU UUID:\s*([^\s?]+)\s*$", information)
        if name := _field(r"^Model:\s*(.+?)\s*$", information):
            found.append(Gpu(name, capability(name), None, uuid))
    return tuple(found)


def _field(pattern: str, path: Path) -> str | None:
    """Return what a pattern's group matches in a file of the kernel."""
    matched = re.search(pattern, cgroups.read_text(path), re.MULTILINE)
    return matched[1] if matched else None


def _glibcxx(cache: Sequence[Path]) -> str | None:
    """Return the newest GLIBCXX version of the system's libstdc++: 3.4.30 of ``….so.6.0.30``."""
    # https://gcc.gnu.org/onlinedocs/libstdc++/manual/abi.html
    files = [path.resolve().name for path in cache if path.name == "libstdc++.so.6"]
    found = [re.fullmatch(r"libstdc\+\+\.so\.6\.0\.([0-9]{1,6})", file) for file in files]
    return next((f"3.4.{matched[1]}" for matched in found if matched), None)


def ask(folders: Sequence[Path], inherited: Mapping[str, str]) -> DriverReport:
    """Ask NVML, then nvidia-smi if NVML names no GPU; nothing is told where no driver is.

    The driver's libraries are looked for in ``folders`` first; nvidia-smi sees ``inherited``.
    """
    asking = Background(lambda: nvml(folders))
    if not asking.wait(_NVML_TIMEOUT):  # nvidia-smi uses NVML, and would hang too
        return DriverReport(complaints=(f"NVML did not answer within {_NVML_TIMEOUT:g} s",))
    told = asking.result()
    if told.gpus:
        return replace(told, source="nvml")
    asked = nvidia_smi(processes.environment(inherited, libraries=folders))
    source = "nvidia-smi" if asked.gpus else ""
    complaints = told.complaints + asked.complaints
    return DriverReport(told.driver or asked.driver, asked.gpus, complaints, source)


def nvml(folders: Sequence[Path]) -> DriverReport:
    """Ask NVML, whose library is looked for in ``folders`` first."""
    for name in (*(str(folder / _LIBRARY) for folder in folders), _LIBRARY):
        try:
            return _ask(ctypes.CDLL(name))
        except (OSError, AttributeError):  # no such library, or older than any driver that serves
            continue
        except _Refused as refused:
            return DriverReport(complaints=(str(refused),))
    return DriverReport()


def _ask(library: ctypes.CDLL) -> DriverReport:
    _call(library, "nvmlInit_v2")
    try:
        driver, count = _text(library, "nvmlSystemGetDriverVersion"), ctypes.c_uint()
        _call(library, "nvmlDeviceGetCount_v2", ctypes.byref(count))
        found, complaints = [], []
        for index in range(count.value):
            try:
                found.append(_gpu(library, index))
            except _Refused as refused:
                complaints.append(f"GPU {index} is left out: {refused}")
        return DriverReport(driver, tuple(found), tuple(complaints))
    finally:
        _call(library, "nvmlShutdown", needed=False)


def _gpu(library: ctypes.CDLL, index: int) -> Gpu:
    handle = ctypes.c_void_p()
    _call(library, "nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
    name = _text(library, "nvmlDeviceGetName", handle) or f"GPU {index}"
    memory = (ctypes.c_ulonglong * 3)()  # nvmlMemory_t: total, free and used bytes
    told = _call(library, "nvmlDeviceGetMemoryInfo", handle, memory, needed=False)
    total, free = memory[:2] if told else (None, None)  # GB10 shares the CPU's memory
    both = (ctypes.c_int * 2)()
    major, minor = ctypes.byref(both), ctypes.byref(both, ctypes.sizeof(ctypes.c_int))
    told = _call(library, "nvmlDeviceGetCudaComputeCapability", handle, major, minor, needed=False)
    code = f"{both[0]}{both[1]}" if told else capability(name)
    return Gpu(name, code, total, _text(library, "nvmlDeviceGetUUID", handle), free)


def _text(library: ctypes.CDLL, function: str, *arguments: object) -> str | None:
    buffer = ctypes.create_string_buffer(_TEXT)
    told = _call(library, function, *arguments, buffer, ctypes.c_uint(_TEXT), needed=False)
    return buffer.value.decode("utf-8", "replace") if told else None


def _call(library: ctypes.CDLL, function: str, *arguments: object, needed: bool = True) -> bool:
    """Call a function; False where it is not needed and this GPU does not support it."""
    code: int = getattr(library, function)(*arguments)
    if code == _LOST or (code and needed):
        library.nvmlErrorString.restype = ctypes.c_char_p
        raise _Refused(f"NVML: {library.nvmlErrorString(code).decode()} ({code})")
    return not code


def nvidia_smi(environ: Mapping[str, str]) -> DriverReport:
    """Run nvidia-smi in ``environ``; the answer is empty where it is not installed."""
    program = find(environ)
    if program is None:
        return DriverReport()
    argv = [program, f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    done = processes.run(argv, environ, timeout=_SMI_TIMEOUT)
    told = parse(done.output) if done.status == 0 else DriverReport()
    if told.gpus:
        return told
    printed = " ".join((done.failure or done.output).split())[:_SHOWN]
    late = f"no answer within {_SMI_TIMEOUT:g} s" if done.status is None else "no GPU"
    return DriverReport(complaints=(f"nvidia-smi: {printed or late}",))


def find(environ: Mapping[str, str], name: str = "nvidia-smi") -> str | None:
    """Return the absolute path of the program, None where it is not installed.

    An empty or relative entry of PATH means the working folder, where anyone may have put a
    program: it is never searched.
    """
    entries = environ.get("PATH", "").split(os.pathsep)
    absolute = (entry for entry in entries if entry.startswith("/"))
    return shutil.which(name, path=os.pathsep.join([*_FOLDERS, *absolute]))


def parse(text: str) -> DriverReport:
    """Read its CSV. ``[N/A]``, ``Unknown Error`` and other texts without a number are unknown."""
    driver, found = None, []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(_SMI_FIELDS) or cells[0][:1] in {"", "["}:
            continue  # a warning, or an error
        name, code, memory, version, uuid = cells
        if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})+", version):
            driver = driver or version
        dotted = re.fullmatch(r"([0-9]{1,2})\.([0-9])", code)
        known = dotted[1] + dotted[2] if dotted else capability(name)
        mib = int(memory) if re.fullmatch(r"[0-9]{1,9}", memory) else None
        own = uuid if uuid.startswith("GPU-") else None
        found.append(Gpu(name, known, None if mib is None else mib * 1024**2, own))
    return DriverReport(driver, tuple(found))
