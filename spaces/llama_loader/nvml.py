"""NVIDIA's management library through ctypes: GPUs and driver without a CUDA context.

Only the calls of ``nvml.h`` that are needed; no Python package. Where the library is missing or
anything fails the answer is None: the caller has other sources.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Final

from llama_loader import gpus

_LIBRARY: Final = "libnvidia-ml.so.1"
_TEXT: Final = 96
"""NVML_DEVICE_NAME_V2_BUFFER_SIZE and NVML_DEVICE_UUID_V2_BUFFER_SIZE, the longest of them."""


class _Memory(ctypes.Structure):
    """``nvmlMemory_t``: bytes."""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


@dataclass(frozen=True)
class NvmlGpu:
    """One GPU as NVML describes it; ``memory`` and what is ``free`` of it in bytes."""

    name: str
    capability: str | None
    memory: int | None
    uuid: str | None
    free: int | None = None


@dataclass(frozen=True)
class Answer:
    """The driver's version and the GPUs in PCI order."""

    driver: str | None
    gpus: tuple[NvmlGpu, ...]


class _Refused(Exception):  # noqa: N818 - says what happened; never leaves this module
    """A call did not return NVML_SUCCESS."""


def query() -> Answer | None:
    """Ask NVML; None where there is no NVIDIA driver or NVML does not answer."""
    try:
        library = ctypes.CDLL(_LIBRARY)
        _call(library, "nvmlInit_v2")
    except (OSError, AttributeError, _Refused):
        return None
    try:
        return Answer(_text(library, "nvmlSystemGetDriverVersion"), _gpus(library))
    except (AttributeError, _Refused):
        return None
    finally:
        library.nvmlShutdown()


def _gpus(library: ctypes.CDLL) -> tuple[NvmlGpu, ...]:
    count = ctypes.c_uint()
    _call(library, "nvmlDeviceGetCount_v2", ctypes.byref(count))
    return tuple(_gpu(library, index) for index in range(count.value))


def _gpu(library: ctypes.CDLL, index: int) -> NvmlGpu:
    handle, memory = ctypes.c_void_p(), _Memory()
    _call(library, "nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
    name = _text(library, "nvmlDeviceGetName", handle) or f"GPU {index}"
    try:
        _call(library, "nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
        total, free = memory.total, memory.free
    except _Refused:  # GB10 shares the CPU's memory and says NOT_SUPPORTED
        total = free = None
    uuid = _text(library, "nvmlDeviceGetUUID", handle)
    return NvmlGpu(name, _capability(library, handle, name), total, uuid, free)


def _capability(library: ctypes.CDLL, handle: ctypes.c_void_p, name: str) -> str | None:
    major, minor = ctypes.c_int(), ctypes.c_int()
    try:
        _call(
            library,
            "nvmlDeviceGetCudaComputeCapability",
            handle,
            ctypes.byref(major),
            ctypes.byref(minor),
        )
    except _Refused:
        return gpus.capability(name)
    return f"{major.value}{minor.value}"


def _text(library: ctypes.CDLL, function: str, *arguments: object) -> str | None:
    buffer = ctypes.create_string_buffer(_TEXT)
    try:
        _call(library, function, *arguments, buffer, ctypes.c_uint(_TEXT))
    except _Refused:
        return None
    return buffer.value.decode("utf-8", "replace")


def _call(library: ctypes.CDLL, function: str, *arguments: object) -> None:
    if getattr(library, function)(*arguments) != 0:
        raise _Refused(function)
