"""Which GPUs a program sees: ``CUDA_VISIBLE_DEVICES`` read as CUDA's driver reads it. Pure.

After the CUDA C++ programming guide ("CUDA Environment Variables") and, for what that leaves open,
torch's reading of it (``torch.cuda._parse_visible_devices``): the first entry that stands for no
GPU ends the list, a GPU named twice empties it, and the first entry decides whether all are
indices, GPUs' UUIDs (or the beginnings of them) or MIG devices.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llama_loader.gpu import Gpu

BY_BUS: Final = "PCI_BUS_ID"
"""CUDA_DEVICE_ORDER in which CUDA counts as NVML does; the loader gives it where none is set."""
_NOWHERE: Final = -1
_INDEX: Final = re.compile(r"\+?0*([0-9]{1,6})(?![0-9])")
"""Like strtoul, which reads ``1gpu`` as 1."""
_GPU: Final = "GPU-"
_MIG: Final = "MIG-"


def gpus(there: tuple[Gpu, ...], named: str | None, order: str | None) -> tuple[Gpu, ...]:
    """Return the GPUs that a program sees, in its order; all of them where that is unknown.

    Args:
        there: all GPUs, in PCI order.
        named: CUDA_VISIBLE_DEVICES, None where unset.
        order: CUDA_DEVICE_ORDER, None where unset.
    """
    found = None if named is None else _places(named, there)
    if named is None or found is None or (found and not _counted(there, named, order)):
        return there
    return tuple(there[place] for place in found)


def count(there: Sequence[Gpu], named: str | None) -> int:
    """Return how many GPUs a program sees, whichever they are; at most, where that is unknown."""
    if named is None:
        return len(there)
    found = _places(named, there)
    if found is not None:
        return len(found)
    return min(len([entry for entry in named.split(",") if entry.strip()]), len(there))


def _counted(there: Sequence[Gpu], named: str, order: str | None) -> bool:
    """Whether an entry tells which GPU it means: indices do in NVML's order, or among equals."""
    if order in {None, BY_BUS} or named.strip().startswith((_GPU, _MIG)):
        return True
    return len({(gpu.name, gpu.capability, gpu.memory) for gpu in there}) == 1


def _places(named: str, there: Sequence[Gpu]) -> tuple[int, ...] | None:
    """Return the places in ``there`` of the GPUs that are named; None where that is unknown."""
    mig = named.strip().startswith(_MIG)
    find = _by_parent if mig else _by_uuid if named.strip().startswith(_GPU) else _by_index
    found: list[int] = []
    for entry in named.split(","):
        place = find(entry.strip(), there)
        if place is None:
            return None
        if place == _NOWHERE:
            break
        if place in found and not mig:
            return ()
        found += [place] if place not in found else []
    return tuple(found)


def _by_index(entry: str, there: Sequence[Gpu]) -> int:
    matched = _INDEX.match(entry)
    index = int(matched[1]) if matched else _NOWHERE
    return index if index < len(there) else _NOWHERE


def _by_uuid(entry: str, there: Sequence[Gpu]) -> int | None:
    """One that several UUIDs begin with stands for none."""
    if not entry.startswith(_GPU):
        return _NOWHERE
    fitting = [place for place, gpu in enumerate(there) if (gpu.uuid or "").startswith(entry)]
    if len(fitting) == 1:
        return fitting[0]
    return _NOWHERE if all(gpu.uuid for gpu in there) else None


def _by_parent(entry: str, there: Sequence[Gpu]) -> int | None:
    """``MIG-GPU-…/1/0`` names its GPU, the UUID of a MIG device of its own (``MIG-…``) none."""
    if not entry.startswith(_MIG):
        return _NOWHERE
    parent = entry.removeprefix(_MIG).partition("/")[0]
    return _by_uuid(parent, there) if parent.startswith(_GPU) else None
