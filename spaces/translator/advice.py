"""Which setting to change: known troubles recognised in a report or a failure. Pure.

The first two are the chapters of the document that this project began with: ``--list-devices`` is
empty or the device invalid; it starts, but far too slowly. ``SETTINGS`` has the lines to set for
each, ``texts.json`` the words (``advice_NAME`` and ``advice_NAME_title``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llama_loader.doctor import Examination
    from llama_space.values import Failure, Status

SETTINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "devices": (
        "YAKULINGO_SPACES_LLAMA_DEVICE=auto",
        "YAKULINGO_SPACES_LLAMA_CPP_MANIFEST_URL=https://…/manifest.json",
    ),
    "slow": ("YAKULINGO_SPACES_ALLOW_CPU=1",),
    "release": (
        "YAKULINGO_SPACES_LLAMA_CPP_MANIFEST_URL=https://…/manifest.json",
        "YAKULINGO_SPACES_LLAMA_CPP_MANIFEST_SHA256=…",
    ),
    "gated": ("HF_TOKEN=hf_…",),
    "cpu": (),
}
_BY_CODE: Final = {
    "NO_DEVICE": "devices",
    "INVALID_DEVICE": "devices",
    "DEVICE_LIST_FAILED": "devices",
    "DEVICE_LIST_GARBLED": "devices",
    "NO_GPU": "slow",
    "MODEL_ON_CPU": "slow",
    "RELEASE_NOT_CHOSEN": "release",
    "MODEL_GATED": "gated",
}
_BY_CHECK: Final = {"devices": "devices", "gpu": "slow"}
"""For checks that may fail with any code."""


def of_report(report: Examination) -> tuple[str, ...]:
    """Advise on the failed checks of a doctor's report, by their codes."""
    failed = [check for check in report.checks if not check.ok]
    found = (_BY_CODE.get(one.code, _BY_CHECK.get(one.name)) for one in failed)
    return tuple(dict.fromkeys(one for one in found if one))


def of_failure(failure: Failure) -> tuple[str, ...]:
    """Advise on a failure by its code."""
    known = _BY_CODE.get(failure.code)
    return (known,) if known else ()


def of_status(status: Status) -> tuple[str, ...]:
    """Advise on an engine that works, but landed on the CPU."""
    return ("cpu",) if status.device == "CPU" else ()
