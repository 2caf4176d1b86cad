"""Ctrl-C and SIGTERM end a command in order, whatever it was doing at that moment."""

from __future__ import annotations

import signal
import sys

_AGAIN: float = 0.01
"""Seconds after which an interruption that got lost is raised once more."""


def clean_up_when_told() -> None:
    """Have SIGTERM and SIGINT raise ``KeyboardInterrupt`` once; further ones change nothing.

    Python runs a signal's handler between any two instructions, also those of a finalizer, which
    swallows whatever is raised in it and prints it as ignored. Such an interruption is raised
    again, outside; and what half-made objects have to say of it is said to nobody.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    # also where a shell's `&` had it ignored: whoever sends it to this process means it
    signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: object) -> None:
    del number, frame
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, _interrupt)
    sys.unraisablehook = _swallowed
    raise KeyboardInterrupt


def _swallowed(left: sys.UnraisableHookArgs) -> None:
    if issubclass(left.exc_type, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, _AGAIN)
