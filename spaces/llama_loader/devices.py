"""Which devices llama-server finds, and which of them a model gets.

What counts is what this binary, with these libraries, can use, so the program runs with
``--list-devices``; the driver only where its answer cannot be another one (``by_the_driver``).
What cannot be listed or chosen raises ``HostError``.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llama_loader import processes, server_log
from llama_loader.errors import HostError
from llama_loader.gguf_header import COMPUTE_MARGIN
from llama_loader.gpus import BY_BUS, Gpu
from llama_loader.host import HostFacts

TIMEOUT: Final = 60.0
"""Seconds. 0.4 s on an H200, 1.1 s the first time; more where the driver has to be woken."""
_MIB: Final = 1024**2
_DEVICE: Final = re.compile(
    r"  (?P<name>\S{1,300}): (?P<description>\S.*) "
    r"\((?P<total>[0-9]{1,9}) MiB, (?P<free>[0-9]{1,9}) MiB free\)\s*"
)
"""A line as llama.cpp prints it (common/arg.cpp). Errors and logs of backends come between them."""
_CUT: Final = re.compile(r"  (?:[A-Za-z]+[0-9]+|RPC[0-9]*\[\S*): ")
"""How such a line begins; the rest of it is missing or damaged where ``_DEVICE`` does not match."""
_NO_GPU: Final = re.compile(r"(?:CPU|BLAS|ACCEL)[0-9]*", re.IGNORECASE)
"""Devices that no ``--device`` takes."""
_SHOWN: Final = 300
"""Most characters of foreign output in a message."""
_CONTEXT: Final = 640 * _MIB
"""Bytes of a GPU that its CUDA context takes, which the driver still counts as free: 516 MiB on an
H200, 529 on an H100 (total less what ``--list-devices`` calls free, driver 580, CUDA 13.0)."""


@dataclass(frozen=True)
class Device:
    """One device as llama-server names it; memory in bytes, None where only the driver named it."""

    name: str
    description: str
    total: int | None = None
    free: int | None = None


@dataclass(frozen=True)
class Listing:
    """What was found, and what the program printed."""

    devices: tuple[Device, ...]
    output: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class DeviceChoice:
    """Names for ``--device``, empty for the CPU; ``every`` has all, where fewer seem enough."""

    names: tuple[str, ...]
    reason: str
    every: tuple[str, ...] = ()


def list_devices(runtime: Path, environ: Mapping[str, str]) -> Listing:
    """Ask the llama-server in the folder ``runtime``, which sees ``environ`` alone."""
    argv = [str(runtime / "llama-server"), "--list-devices"]
    done = processes.run(argv, environ, timeout=TIMEOUT)
    lines = done.output.splitlines()
    printed = repr(server_log.quote(lines))
    if done.failure:
        raise HostError("RUNTIME_NOT_EXECUTABLE", why=done.failure)
    if done.status is None:
        raise HostError("DEVICE_LIST_HANGS", timeout=TIMEOUT, printed=printed)
    if done.status != 0:
        explained = server_log.explain(done.status, lines, loading=True)
        if isinstance(explained, HostError):
            raise explained
        ended = f"by signal {-done.status}" if done.status < 0 else f"with status {done.status}"
        raise HostError("DEVICE_LIST_FAILED", ended=ended, printed=printed)
    return Listing(parse(done.output), done.output, done.seconds)


def parse(output: str) -> tuple[Device, ...]:
    """Read ``Available devices:`` and its lines, such as ``  CUDA0: H200 (9 MiB, 8 MiB free)``."""
    _, heading, body = output.partition("Available devices:")
    if not heading:
        raise HostError("DEVICE_LIST_GARBLED/heading", printed=output.strip()[:_SHOWN])
    found = []
    for line in body.split("\n"):
        matched = _DEVICE.fullmatch(line)
        if matched:
            total, free = int(matched["total"]) * _MIB, int(matched["free"]) * _MIB
            found.append(Device(matched["name"], matched["description"], total, free))
        elif _CUT.match(line):
            raise HostError("DEVICE_LIST_GARBLED", printed=line.strip()[:_SHOWN])
    return tuple(one for one in found if not _NO_GPU.fullmatch(one.name))


def by_the_driver(host: HostFacts) -> Listing | None:
    """Name the devices that llama-server would list, without starting it.

    Listing costs 0.4 s on an H200 and 0.9 s on two H100s, because it makes a context on every GPU.
    One visible GPU is always ``CUDA0``; several equal ones are listed as NVML lists them, where
    CUDA counts as it does (docs/decisions/0044-several-equal-gpus.md). None where only the program
    can tell: no GPU, different ones, or an amount that is unknown.
    """
    if host.visible_count == 1:
        name = host.visible[0].name if len(host.visible) == 1 else "by CUDA_VISIBLE_DEVICES"
        return Listing((Device("CUDA0", name),))
    as_listed = host.visible_devices is None and host.device_order in {None, BY_BUS}
    equal = len({(gpu.name, gpu.capability, gpu.memory) for gpu in host.gpus}) == 1
    told = all(gpu.capability and gpu.free is not None for gpu in host.gpus)
    if not (host.gpu_source == "nvml" and as_listed and equal and told):
        return None
    found = (
        Device(f"CUDA{index}", gpu.name, gpu.memory, max(0, (gpu.free or 0) - _CONTEXT))
        for index, gpu in enumerate(host.gpus)
    )
    return Listing(tuple(found))


def with_code(
    found: Sequence[Device], gpus: Sequence[Gpu], capabilities: Sequence[str]
) -> tuple[Device, ...]:
    """Leave out devices for which an artifact has no code: hosts may mix GPUs.

    The listing has names alone, so the host's GPUs of that name tell the capability. A device whose
    capability is unknown or ambiguous stays; if none would, all stay: the server's error has why.
    """
    may_have = {gpu.name for gpu in gpus if gpu.capability in {None, *capabilities}}
    lack = {gpu.name for gpu in gpus} - may_have
    return tuple(one for one in found if one.description not in lack) or tuple(found)


def choose(
    found: Sequence[Device],
    wanted: Sequence[str],
    *,
    needed: int | None,
    allow_cpu: bool,
    printed: str | None = None,
) -> DeviceChoice:
    """Choose devices: those that are named, else the fewest that hold the model.

    Args:
        found: what there is.
        wanted: names that a person gave; empty for ``auto``.
        needed: bytes that the model and its context take on all devices, None where unknown.
        allow_cpu: whether no device at all is fine.
        printed: what a verified CUDA build of ours printed with its list; None for other builds.
    """
    if wanted:
        return _named(found, wanted, ours=printed is not None)
    usable = [one for one in found if one.name.startswith("CUDA")] or list(found)
    if usable:
        return _fewest(usable, needed)
    if allow_cpu:
        return DeviceChoice((), "llama-server lists no device, and the CPU is allowed")
    if printed is None:
        raise HostError("NO_DEVICE/foreign")
    line, advice = server_log.trouble_of_the_host(printed.splitlines())
    if line:
        raise HostError("NO_DEVICE/told", line=line[:_SHOWN], advice=advice)
    raise HostError("NO_DEVICE")


def _named(found: Sequence[Device], wanted: Sequence[str], *, ours: bool) -> DeviceChoice:
    if [name.lower() for name in wanted] in (["none"], ["cpu"]):
        return DeviceChoice((), f"{wanted[0]} was asked for: no device, the CPU alone")
    names = {device.name.lower(): device.name for device in found}
    unknown = [name for name in wanted if name.lower() not in names]
    if unknown:
        code = "INVALID_DEVICE" if ours else "INVALID_DEVICE/foreign"
        there = ", ".join(names.values()) or "none"
        raise HostError(code, names=", ".join(unknown), there=there)
    return DeviceChoice(tuple(names[name.lower()] for name in wanted), "asked for by name")


def _fewest(usable: Sequence[Device], needed: int | None) -> DeviceChoice:
    """Take the fewest devices, those with the most free memory, that hold the model."""
    # All where no number of them does: llama-server leaves to the CPU what it has no room for
    every = tuple(device.name for device in usable)
    only = f"the only one: {usable[0].description}" if len(usable) == 1 else ""
    if needed is None or any(device.free is None for device in usable):
        return DeviceChoice(every, only or "all: the sizes are not known")
    room, names = 0, set[str]()
    for device in sorted(usable, key=lambda device: -(device.free or 0)):
        room += max(0, (device.free or 0) - COMPUTE_MARGIN)
        names.add(device.name)
        if room >= needed:
            break
    free = f"{room / 1e9:.1f} GB free, {COMPUTE_MARGIN / 1e9:.1f} GB apart on each to compute"
    if room < needed:
        return DeviceChoice(every, f"{only or 'all'}; {needed / 1e9:.1f} GB do not fit into {free}")
    chosen = tuple(name for name in every if name in names)
    reason = only or f"the fewest that hold {needed / 1e9:.1f} GB: {free}"
    return DeviceChoice(chosen, reason, every if chosen != every else ())
