"""Wait for what another process or thread brings about."""

import time
from collections.abc import Callable


def comes(true: Callable[[], bool], seconds: float = 20.0, *, pause: float = 0.01) -> bool:
    """Wait until something is so; False where it does not become so in time."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


def until(true: Callable[[], bool], what: str | Callable[[], str], seconds: float = 180) -> None:
    """Wait for it; a message that tells how far a run is has to be a function."""
    assert comes(true, seconds, pause=0.05), what if isinstance(what, str) else what()
