"""What is known of NVIDIA GPUs without asking one: their names, which of them a program sees.

Needed where only a GPU's name is known: in ZeroGPU's main process no GPU is attached, but
``/proc/driver/nvidia/gpus/*/information`` names the model. Source: NVIDIA's "CUDA GPU Compute
Capability" page. Nothing here does I/O.
"""

import re
from dataclasses import dataclass
from typing import Final

BY_BUS: Final = "PCI_BUS_ID"
"""CUDA_DEVICE_ORDER in which CUDA counts as NVML does; the loader sets it where none is set."""
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
_USUAL: Final = ("B200", "H200", "H100", "A100", "L40S", "L4", "A10G", "T4", "V100", "RTX 5090",
                 "RTX 4090", "RTX 3090", "RTX PRO 6000")  # fmt: skip
_LONGEST: Final = 200
"""Characters of a name that are looked at: patterns over more take long, and no name has more."""
_INDEX: Final = re.compile(r"\+?0*([0-9]{1,6})(?![0-9])")
"""Like strtoul, which reads ``1gpu`` as 1."""


@dataclass(frozen=True)
class Gpu:
    """One GPU; None is unknown.

    Attributes:
        name: the model, such as ``NVIDIA H200``.
        capability: compute capability without a dot (``90``).
        memory, free: bytes, and those that no program used when the driver was asked; None where
            they are shared with the CPU, too.
        uuid: as the driver names it (``GPU-…``).
    """

    name: str
    capability: str | None
    memory: int | None = None
    uuid: str | None = None
    free: int | None = None


ZEROGPU: Final = Gpu("NVIDIA RTX PRO 6000 Blackwell", "120", 48 * 1000**3)
"""What ZeroGPU documents as its hardware (docs/zerogpu.md); ``large`` is half of one, 48 GB."""


def capability(name: str) -> str | None:
    """Return the compute capability (``90``) of a GPU by its name, None where it is unknown."""
    name = name[:_LONGEST]
    found = (known for pattern, known in _BY_NAME if re.search(pattern, name, re.IGNORECASE))
    return next(found, None)


def near(name: str) -> str:
    """Return the usual GPU whose name is most like an unknown one."""
    import difflib  # only now: a start needs none of it

    return difflib.get_close_matches(name[:_LONGEST].upper(), _USUAL, 1, 0)[0]


def visible(
    there: tuple[Gpu, ...], named: str | None, order: str | None
) -> tuple[tuple[Gpu, ...], int]:
    """Return the GPUs that a program sees, in its order, and how many it sees.

    ``CUDA_VISIBLE_DEVICES`` is read as CUDA's driver reads it, after the CUDA C++ programming guide
    ("CUDA Environment Variables") and, for what that leaves open, torch's reading of it
    (``torch.cuda._parse_visible_devices``): the first entry that names no GPU, or several, ends the
    list; a GPU named twice empties it. Where only the driver can tell which GPUs are meant, as with
    MIG devices, all are returned, and the number is an upper bound. ``there`` is in PCI order;
    ``order`` is CUDA_DEVICE_ORDER: indices count in NVML's order alone.
    """
    if named is None:
        return there, len(there)
    entries = [entry.strip() for entry in named.split(",")]
    by_uuid = entries[0].startswith("GPU-")
    if entries[0].startswith("MIG-") or (by_uuid and not all(gpu.uuid for gpu in there)):
        return there, len(entries)
    places: list[int] = []
    for entry in entries:
        index = None if by_uuid else _INDEX.match(entry)
        fitting = [int(index[1])] if index and int(index[1]) < len(there) else []
        if by_uuid and entry.startswith("GPU-"):  # the beginning of a UUID
            fitting = [at for at, gpu in enumerate(there) if (gpu.uuid or "").startswith(entry)]
        if len(fitting) != 1:
            break
        places += fitting
    if len(set(places)) < len(places):
        return (), 0
    if places and not by_uuid and order not in {None, BY_BUS}:
        return there, len(places)
    return tuple(there[place] for place in places), len(places)
