from __future__ import annotations

import pytest

from llama_space import gpu_seconds
from llama_space.gpu_seconds import LONGEST, SHORTEST, Speeds


def test_a_warm_worker_is_asked_for_less() -> None:
    cold = gpu_seconds.seconds(400, 1024, Speeds(), warm=False)
    warm = gpu_seconds.seconds(400, 1024, Speeds(), warm=True)
    assert SHORTEST <= warm < cold <= LONGEST


def test_what_was_seen_counts() -> None:
    slow = gpu_seconds.seconds(1000, 1024, Speeds(start=5, tokens=20), warm=True)
    fast = gpu_seconds.seconds(1000, 1024, Speeds(start=5, tokens=100), warm=True)
    assert fast < slow / 3


def test_a_short_text_does_not_pay_for_the_longest_answer() -> None:
    speeds = Speeds(start=0, tokens=10)
    assert gpu_seconds.seconds(20, 1024, speeds, warm=True) == gpu_seconds.seconds(
        20, 84, speeds, warm=True
    )
    assert gpu_seconds.seconds(2000, 100, speeds, warm=True) < gpu_seconds.seconds(
        2000, 500, speeds, warm=True
    )


@pytest.mark.parametrize("speed", [0.01, 1e9])
def test_it_stays_within_what_zerogpu_takes(speed: float) -> None:
    for warm in (True, False):
        asked = gpu_seconds.seconds(2000, 1024, Speeds(tokens=speed), warm=warm)
        assert SHORTEST <= asked <= LONGEST


def test_contents_of_every_form_are_counted() -> None:
    assert gpu_seconds.characters(({"role": "user", "content": "12345"},)) == 9
    parts = ({"role": "user", "content": [{"type": "text", "text": "12345"}]},)
    assert gpu_seconds.characters(parts) == 4 + 4 + 5
    assert gpu_seconds.characters(()) == 0
