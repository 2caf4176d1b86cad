"""Wait for what another process or thread brings about."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def until(true: Callable[[], bool], what: str | Callable[[], str], seconds: float = 180) -> None:
    """Wait for it; a message that tells how far a run is has to be a function."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what if isinstance(what, str) else what()
        time.sleep(0.05)
