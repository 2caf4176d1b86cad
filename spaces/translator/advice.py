"""Which setting to change, and where: known troubles recognised in a report or a failure.

The first two are the chapters of the document that this project began with: ``--list-devices`` is
empty or the device invalid; it starts, but far too slowly. ``advice.json`` lists them, and
``texts.json`` has the words of each (``advice_NAME`` and ``advice_NAME_title``).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from translator import texts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llama_loader.doctor import Examination
    from llama_space.values import Failure, Status


@dataclass(frozen=True)
class Advice:
    """A known trouble: one row of ``advice.json``.

    Attributes:
        settings: the lines to set.
        codes: the errors by which it is recognised.
        check: the doctor's check that shows it, whatever its code.
    """

    settings: Sequence[str] = ()
    codes: Sequence[str] = ()
    check: str = ""


ADVICES: Final[Mapping[str, Advice]] = {
    name: Advice(**row) for name, row in texts.read("advice.json").items()
}
_SPACE: Final = re.compile(r"[\w.-]+/[\w.-]+")


def is_owners(failure: Failure) -> bool:
    """Tell whether only the Space's owner can do something about a failure."""
    return failure.error().is_owners or bool(of_code(failure.code))


def settings_page() -> str:
    """Return the address of this Space's settings; empty where this is no Space on the Hub."""
    name = os.environ.get("SPACE_ID", "")
    return f"https://huggingface.co/spaces/{name}/settings" if _SPACE.fullmatch(name) else ""


def of_report(report: Examination) -> tuple[str, ...]:
    """Advise on the failed checks of a doctor's report."""
    failed = [check for check in report.checks if not check.ok]
    return tuple(dict.fromkeys(name for one in failed for name in of_code(one.code, one.name)))


def of_code(code: str, check: str = "") -> tuple[str, ...]:
    """Advise on an error by its code, else by the check that found it."""
    by_code = tuple(name for name, one in ADVICES.items() if code in one.codes)
    return by_code or tuple(name for name, one in ADVICES.items() if check and one.check == check)


def of_status(status: Status) -> tuple[str, ...]:
    """Advise on an engine that works, but landed on the CPU."""
    return ("cpu",) if status.device == "CPU" else ()
