"""Ask ``nvidia-smi`` for the driver and the GPUs, where NVML cannot be loaded here or refuses."""

from __future__ import annotations

import os
import re
import shutil
from typing import TYPE_CHECKING, Final

from llama_loader import processes
from llama_loader.gpus import Gpu, capability
from llama_loader.nvml import Answer

if TYPE_CHECKING:
    from collections.abc import Mapping

FOLDERS: Final = (
    "/usr/bin",
    "/usr/local/bin",
    "/usr/local/nvidia/bin",  # GKE
    "/bin",
    "/usr/lib/wsl/lib",  # WSL 2
    "/run/current-system/sw/bin",  # NixOS
)
"""Where NVIDIA's programs are installed, searched before PATH."""
_TIMEOUT: Final = 20.0
"""Seconds. It takes 0.1 s, but several where the driver is not kept loaded."""
_FIELDS: Final = ("name", "compute_cap", "memory.total", "driver_version", "uuid")
_SHOWN: Final = 300
"""Most characters kept of what it prints when it fails."""


def query(environ: Mapping[str, str]) -> Answer:
    """Run it in ``environ``; the answer is empty where it is not installed."""
    program = find(environ)
    if program is None:
        return Answer()
    argv = [program, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    done = processes.run(argv, environ, timeout=_TIMEOUT)
    told = parse(done.output) if done.status == 0 else Answer()
    if told.gpus:
        return told
    printed = " ".join((done.failure or done.output).split())[:_SHOWN]
    late = f"no answer within {_TIMEOUT:g} s" if done.status is None else "no GPU"
    return Answer(complaints=(f"nvidia-smi: {printed or late}",))


def find(environ: Mapping[str, str], name: str = "nvidia-smi") -> str | None:
    """Return the absolute path of the program, None where it is not installed.

    An empty or relative entry of PATH means the working folder, where anyone may have put a
    program: it is never searched.
    """
    entries = environ.get("PATH", "").split(os.pathsep)
    absolute = (entry for entry in entries if entry.startswith("/"))
    return shutil.which(name, path=os.pathsep.join([*FOLDERS, *absolute]))


def parse(text: str) -> Answer:
    """Read its CSV. ``[N/A]``, ``Unknown Error`` and whatever else is no number is unknown."""
    driver, found = None, []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(_FIELDS) or cells[0][:1] in {"", "["}:
            continue  # a warning, or an error
        name, code, memory, version, uuid = cells
        driver = driver or (version if re.fullmatch(r"[0-9]+(\.[0-9]+)+", version) else None)
        dotted = re.fullmatch(r"([0-9]{1,2})\.([0-9])", code)
        known = dotted[1] + dotted[2] if dotted else capability(name)
        mib = int(memory) if re.fullmatch(r"[0-9]{1,9}", memory) else None
        own = uuid if uuid.startswith("GPU-") else None
        found.append(Gpu(name, known, None if mib is None else mib * 1024**2, own))
    return Answer(driver, tuple(found))
