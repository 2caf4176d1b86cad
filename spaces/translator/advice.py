"""Which setting to change, and where: known troubles recognised in a report or a failure.

The first two are the chapters of the document that this project began with: ``--list-devices`` is
empty or the device invalid; it starts, but far too slowly. ``SETTINGS`` has the lines to set for
each, ``texts.json`` the words (``advice_NAME`` and ``advice_NAME_title``).
"""

from __future__ import annotations

import os
import re
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
    "model": (
        "YAKULINGO_SPACES_GGUF_REPO_ID=OWNER/REPOSITORY",
        "YAKULINGO_SPACES_GGUF_FILENAME=model.gguf",
    ),
    "offline": ("YAKULINGO_SPACES_OFFLINE=0",),
    "pin": ("YAKULINGO_SPACES_LLAMA_CPP_MANIFEST_SHA256=…",),
    "memory": ("YAKULINGO_SPACES_N_CTX=2048",),
    "timeout": ("YAKULINGO_SPACES_STARTUP_TIMEOUT=300",),
    "duration": ("YAKULINGO_SPACES_ZEROGPU_DURATION=60",),
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
    "MODEL_MISSING": "model",
    "MODEL_NOT_GGUF": "model",
    "MODEL_PROJECTOR": "model",
    "BAD_MODEL": "model",
    "OFFLINE": "offline",
    "MANIFEST_PIN_MISMATCH": "pin",
    "OUT_OF_MEMORY": "memory",
    "START_TIMEOUT": "timeout",
    "ZEROGPU_DURATION": "duration",
}
_BY_CHECK: Final = {"devices": "devices", "gpu": "slow"}
"""For checks that may fail with any code."""
_OWNERS: Final = frozenset({2, 4, 5, 6})
"""Exit statuses of what only the owner can change: a setting, trust, the machine, its disk."""
_SPACE: Final = re.compile(r"[\w.-]+/[\w.-]+")


def is_owners(failure: Failure) -> bool:
    """Tell whether only the Space's owner can do something about a failure."""
    return failure.exit_status in _OWNERS or failure.code in _BY_CODE


def settings_page() -> str:
    """Return the address of this Space's settings; empty where this is no Space on the Hub."""
    name = os.environ.get("SPACE_ID", "")
    return f"https://huggingface.co/spaces/{name}/settings" if _SPACE.fullmatch(name) else ""


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
