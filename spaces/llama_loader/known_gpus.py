"""NVIDIA's GPUs by name, and what each CUDA toolkit asks of the driver. Data, no code that probes.

Needed where only a name can be had: in ZeroGPU's main process no GPU is attached, but
``/proc/driver/nvidia/gpus/*/information`` names the model. Sources: NVIDIA's "CUDA GPU Compute
Capability" page, and table 3 ("CUDA Toolkit and Corresponding Driver Versions") of the CUDA
release notes.
"""

from __future__ import annotations

import re
from typing import Final

_BY_NAME: Final = (
    # (what the name holds, compute capability); the first match counts, so the longer name first
    (r"\bGB10\b|DGX Spark", "121"),
    (r"\bG?B300\b", "103"),
    (r"\bG?B[12]00\b", "100"),
    (r"\bThor\b", "110"),  # 10.1 before CUDA 13.0
    (r"RTX PRO \d+\b.*Blackwell|RTX PRO [2-6]\d{3}D?\b", "120"),
    (r"RTX 50[5-9]0", "120"),
    (r"\bG?H[12]00\b|\bH[28]00\b|\bH20\b|\bGH200\b", "90"),
    (r"\bL4\b|\bL40[SG]?\b|\bL20\b|\bL2\b|RTX 40[5-9]0|RTX \d{4,} Ada|Ada Generation", "89"),
    (r"\bA(?:100X?|30X?|800)\b|PG506|CMP 170HX", "80"),
    (r"Orin", "87"),
    (r"\bA(?:10G?|16|2|40|10M)\b|RTX A\d{3,4}\b|RTX 30[5-9]0|RTX 2050|MX570", "86"),
    (r"\bT4G?\b|\bT10\b|RTX 20[6-9]0|GTX 16[356]0|TITAN RTX|Quadro (?:RTX|T[12]000)", "75"),
    (r"\bT(?:4|6|10|12)00\b|T500|MX450", "75"),
    (r"\bV100\b|TITAN V\b|Quadro GV100", "70"),
    (r"\bP100\b|Quadro GP100", "60"),
    (r"\bP4\b|\bP40\b|GTX 10[5-8]0|TITAN Xp?\b", "61"),
)
_FOREIGN: Final = r"\b(?:AMD|ATI|Radeon|Intel|Arc|Apple|Qualcomm|Matrox|Moore Threads)\b"
"""Makers whose GPUs are none of NVIDIA's, whatever their names remind of."""
_JIT_DRIVER: Final = {
    # toolkit: the first Linux driver whose compiler takes PTX of that toolkit
    "11.8": "520.61",
    "12.0": "525.60",
    "12.1": "530.30",
    "12.2": "535.54",
    "12.3": "545.23",
    "12.4": "550.54",
    "12.5": "555.42",
    "12.6": "560.28",
    "12.8": "570.26",
    "12.9": "575.51",
    "13.0": "580.65",
    "13.1": "590.44",
}
_BRANCHES: Final = 5
"""Linux drivers' branches are multiples of it: 570, 575, 580, 590."""

ZEROGPU_NAME: Final = "NVIDIA RTX PRO 6000 Blackwell"
"""What ZeroGPU documents as its hardware (docs/zerogpu.md); ``large`` is half of one, 48 GB."""
ZEROGPU_CAPABILITY: Final = "120"
ZEROGPU_MEMORY: Final = 48 * 1000**3
"""Bytes of a ``large`` slice."""


def capability(name: str) -> str | None:
    """Return the compute capability (``90``) of a GPU by its name, None where it is unknown."""
    if re.search(_FOREIGN, name, re.IGNORECASE):
        return None
    for pattern, found in _BY_NAME:
        if re.search(pattern, name, re.IGNORECASE):
            return found
    return None


def jit_driver(toolkit: str) -> str | None:
    """Return the oldest driver that can compile PTX of this toolkit, None for one before 11.8.

    A toolkit that is newer than the table needs a later branch than the last one in it: which, only
    a newer table knows, so the answer is the next.
    """
    wanted = _numbers(toolkit)
    known = {_numbers(one): driver for one, driver in _JIT_DRIVER.items()}
    if wanted < min(known):
        return None
    if wanted > max(known):
        return f"{int(known[max(known)].partition('.')[0]) + _BRANCHES}.0"
    return known[min(one for one in known if one >= wanted)]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))
