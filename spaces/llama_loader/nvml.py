"""Ask NVIDIA's management library for the driver and the GPUs, without a CUDA context.

Only the calls of ``nvml.h`` that are needed, through ctypes; no Python package. Where NVML refuses
or hangs, the answer holds the complaint, and the caller asks its other sources.
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
_NO_FUNCTION: Final = 13
_LOST: Final = 15
_ERRORS: Final = {
    4: "Insufficient Permissions",
    9: "Driver Not Loaded",
    _NO_FUNCTION: "Function Not Found",
    _LOST: "GPU is lost",
    18: "Driver/library version mismatch",
}
"""``nvmlReturn_t``, in the words of ``nvmlErrorString``."""


@dataclass(frozen=True)
class Answer:
    """What NVML knows.

    Attributes:
        driver: its version; None where NVML did not answer.
        gpus: those that can be used, in PCI order.
        complaints: a sentence for each failure: NVML's own, or that of one GPU.
        hangs: it did not answer in time.
    """

    driver: str | None = None
    gpus: tuple[Gpu, ...] = ()
    complaints: tuple[str, ...] = ()
    hangs: bool = False


class _Refused(Exception):  # noqa: N818 - an answer of NVML's; never leaves this module
    """A call that did not return NVML_SUCCESS."""

    def __init__(self, code: int) -> None:
        super().__init__(f"NVML: {_ERRORS.get(code, 'error')} ({code})")
        self.code = code


def query(folders: Sequence[Path], *, timeout: float) -> Answer:
    """Ask NVML; the answer is empty where there is no NVIDIA driver.

    Args:
        folders: where the library is looked for before the dynamic linker's own folders.
        timeout: seconds after which a driver that hangs is given up.
    """
    asking = Background(lambda: _query(folders))
    if not asking.wait(timeout):
        return Answer(complaints=(f"NVML did not answer within {timeout:g} s",), hangs=True)
    return asking.result()


def _query(folders: Sequence[Path]) -> Answer:
    for name in (*(str(folder / _LIBRARY) for folder in folders), _LIBRARY):
        try:
            return _ask(ctypes.CDLL(name))
        except OSError:
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
        _answers(library, "nvmlShutdown")


def _gpu(library: ctypes.CDLL, index: int) -> Gpu:
    handle = ctypes.c_void_p()
    _call(library, "nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
    name = _text(library, "nvmlDeviceGetName", handle) or f"GPU {index}"
    memory = (ctypes.c_ulonglong * 3)()  # nvmlMemory_t: total, free and used bytes
    told = _answers(library, "nvmlDeviceGetMemoryInfo", handle, memory)
    total, free = memory[:2] if told else (None, None)  # GB10 shares the CPU's memory
    major, minor = ctypes.c_int(), ctypes.c_int()
    both = ctypes.byref(major), ctypes.byref(minor)
    told = _answers(library, "nvmlDeviceGetCudaComputeCapability", handle, *both)
    code = f"{major.value}{minor.value}" if told else capability(name)
    return Gpu(name, code, total, _text(library, "nvmlDeviceGetUUID", handle), free)


def _text(library: ctypes.CDLL, function: str, *arguments: object) -> str | None:
    buffer = ctypes.create_string_buffer(_TEXT)
    told = _answers(library, function, *arguments, buffer, ctypes.c_uint(_TEXT))
    return buffer.value.decode("utf-8", "replace") if told else None


def _answers(library: ctypes.CDLL, function: str, *arguments: object) -> bool:
    """Call what a GPU need not support; a lost GPU is refused all the same."""
    try:
        _call(library, function, *arguments)
    except _Refused as refused:
        if refused.code == _LOST:
            raise
        return False
    return True


def _call(library: ctypes.CDLL, function: str, *arguments: object) -> None:
    code = getattr(library, function)(*arguments) if hasattr(library, function) else _NO_FUNCTION
    if code != 0:
        raise _Refused(code)
