"""An interruption is never lost, and never a traceback."""

import sys
from pathlib import Path

import pytest

from tests.rigs.heard import heard

SPACES = Path(__file__).parents[2] / "spaces"
PROGRAM = """
import signal, sys, time
from llama_loader.console import clean_up_when_told

clean_up_when_told()
SIGNAL = signal.Signals[sys.argv[2]]

class Left:
    def __del__(self):
        signal.raise_signal(SIGNAL)

class Broken:
    def __del__(self):
        raise AttributeError("'Response' object has no attribute 'fp'")

def anywhere():
    signal.raise_signal(SIGNAL)

def in_a_finalizer():
    Left()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        time.sleep(0.01)

def with_what_is_half_made():
    broken = Broken()
    try:
        signal.raise_signal(SIGNAL)
    finally:
        del broken

try:
    globals()[sys.argv[1]]()
except KeyboardInterrupt:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.raise_signal(number)  # the second one changes nothing
    print("in order")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("where", ["anywhere", "in_a_finalizer", "with_what_is_half_made"])
def test_it_ends_in_order_wherever_it_comes(where: str, name: str) -> None:
    done = heard(
        [sys.executable, "-c", PROGRAM, where, name], env={"PYTHONPATH": str(SPACES)}, timeout=30
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "in order\n", "")
