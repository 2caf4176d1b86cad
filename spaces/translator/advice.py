"""Which setting to change: known troubles recognised in a report or a failure. Pure.

The first two are the chapters of the document that this project began with: ``--list-devices`` is
empty or the device invalid; it starts, but far too slowly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from llama_loader.doctor import Examination
    from llama_space.values import Failure, Status


@dataclass(frozen=True)
class Advice:
    """What to do about a trouble.

    Attributes:
        name: of its words in ``texts.json`` (``advice_NAME`` and ``advice_NAME_title``).
        settings: lines ``VARIABLE=value`` to set, may be empty.
    """

    name: str
    settings: tuple[str, ...] = ()


DEVICES: Final = Advice(
    "devices",
    (
        "YAKULINGO_SPACES_LLAMA_DEVICE=auto",
        "YAKULINGO_SPACES_LLAMA_CPP_MANIFEST_URL=https://…/manifest.json",
    ),
)
SLOW: Final = Advice("slow", ("YAKULINGO_SPACES_ALLOW_CPU=1",))
RELEASE: Final = Advice(
    "release",
    (
        "YAKULINGO_SPACES_LLAMA_CPP_MANIFEST_URL=https://…/manifest.json",
        "YAKULINGO_SPACES_LLAMA_CPP_MANIFEST_SHA256=…",
    ),
)
GATED: Final = Advice("gated", ("HF_TOKEN=hf_…",))
CPU: Final = Advice("cpu")

_BY_CODE: Final = {
    "NO_DEVICE": DEVICES,
    "INVALID_DEVICE": DEVICES,
    "DEVICE_LIST_FAILED": DEVICES,
    "DEVICE_LIST_GARBLED": DEVICES,
    "NO_GPU": SLOW,
    "MODEL_ON_CPU": SLOW,
    "RELEASE_NOT_CHOSEN": RELEASE,
    "MODEL_GATED": GATED,
}
_BY_CHECK: Final = {"devices": DEVICES, "gpu": SLOW}
"""For checks that may fail with any code."""


def of_report(report: Examination) -> tuple[Advice, ...]:
    """Advise on the failed checks of a doctor's report, by their codes."""
    failed = [check for check in report.checks if not check.ok]
    found = (_BY_CODE.get(one.code, _BY_CHECK.get(one.name)) for one in failed)
    return tuple(dict.fromkeys(one for one in found if one))


def of_failure(failure: Failure) -> tuple[Advice, ...]:
    """Advise on a failure by its code."""
    known = _BY_CODE.get(failure.code)
    return (known,) if known else ()


def of_status(status: Status) -> tuple[Advice, ...]:
    """Advise on an engine that works, but landed on the CPU."""
    served = status.server_pid is not None or bool(status.calls)
    return (CPU,) if served and not status.devices else ()
