"""Ask NVIDIA's management library for the driver and the GPUs, without a CUDA context.

Only the calls of ``nvml.h`` that are needed, through ctypes; no Python package. Where NVML refuses
or hangs, the answer says why, and the caller asks its other sources.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from llama_loader.concurrency import Background
from llama_loader.gpus import Gpu, capability

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_LIBRARY: Final = "libnvidia-ml.so.1"
_TEXT: Final = 96
"""NVML_DEVICE_NAME_V2_BUFFER_SIZE and NVML_DEVICE_UUID_V2_BUFFER_SIZE, the longest of them."""
_LOST: Final = 15
"""NVML_ERROR_GPU_IS_LOST."""


@dataclass(frozen=True)
class Answer:
    """The driver's version, the usable GPUs in PCI order, and a sentence for each failure."""

    driver: str | None = None
    gpus: tuple[Gpu, ...] = ()
    complaints: tuple[str, ...] = ()
    hangs: bool = False


class _Refused(Exception):  # noqa: N818 - an answer of NVML's; never leaves this module
    """A call that did not return NVML_SUCCESS."""


def query(folders: Sequence[Path], *, timeout: float) -> Answer:
    """Ask NVML; the answer is empty where there is no NVIDIA driver.

    Args:
        folders: where the library is looked for before the dynamic linker's own folders.
        timeout: seconds after which a driver that hangs is given up.
    """
    asking = Background(lambda: _query(folders))
    if asking.wait(timeout):
        return asking.result()
    return Answer(complaints=(f"NVML did not answer within {timeout:g} s",), hangs=True)


def _query(folders: Sequence[Path]) -> Answer:
    for name in (*(str(folder / _LIBRARY) for folder in folders), _LIBRARY):
        try:
            return _ask(ctypes.CDLL(name))
        except (OSError, AttributeError):  # no such library, or older than any driver that serves
            continue
        except _Refused as refused:
            return Answer(complaints=(str(refused),))
    return Answer()


def _ask(library: ctypes.CDLL) -> Answer:
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
        return Answer(driver, tuple(found), tuple(complaints))
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
    """Call a function; False where it is not needed and this GPU does not support it.

    Raises:
        _Refused: it is needed, or the GPU is lost.
    """
    code: int = getattr(library, function)(*arguments)
    if code == _LOST or (code and needed):
        library.nvmlErrorString.restype = ctypes.c_char_p
        raise _Refused(f"NVML: {library.nvmlErrorString(code).decode()} ({code})")
    return not code
