"""Which setting to change: known troubles recognised in a report or a failure. Pure.

The first two are the chapters of the document that this project began with: ``--list-devices`` is
empty or the device invalid; it starts, but far too slowly.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from translator.values import Failure, State


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
_FAILED: Final = re.compile(r"^ +FAIL (?P<name>[a-z ]+): (?P<detail>.*)$", re.MULTILINE)
_BY_CHECK: Final = (
    ("devices", "", DEVICES),
    ("gpu", "", SLOW),
    ("test run", "CPU", SLOW),
    ("model", "gated", GATED),
    ("runtime", "nothing says which release", RELEASE),
)
"""A failed check's name, words in its line, and what to do."""


def of_report(report: str) -> tuple[Advice, ...]:
    """Read the failed checks out of a doctor's page."""
    found = [
        advice
        for failed in _FAILED.finditer(report)
        for name, words, advice in _BY_CHECK
        if failed["name"] == name and words in failed["detail"]
    ]
    return tuple(dict.fromkeys(found))


def of_failure(failure: Failure) -> tuple[Advice, ...]:
    """Advise on a failure by its code."""
    known = _BY_CODE.get(failure.code)
    return (known,) if known else ()


def of_state(state: State) -> tuple[Advice, ...]:
    """Advise on an engine that works, but landed on the CPU."""
    served = state.server_pid is not None or bool(state.calls)
    return (CPU,) if served and not state.devices else ()
