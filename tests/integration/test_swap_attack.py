"""Another user's process tries to swap what is about to be executed, while it is executed."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from needs import must_or_skip

from tests.rigs import swap_attack

ROUNDS = 4


@pytest.fixture
def place() -> Iterator[Path]:
    if os.geteuid() != 0:
        must_or_skip("only root can start another user's process")
    with swap_attack.open_to_all() as folder, swap_attack.without_pauses():
        yield folder


@pytest.mark.parametrize("situation", swap_attack.SITUATIONS)
def test_other_users_bytes_are_never_executed(place: Path, situation: str) -> None:
    """``benchmarks/swap_attack.py`` does this 10,000 times, and with the real server."""
    manifest = swap_attack.release(place / "release")
    payload = swap_attack.payload(place / "payload")
    total = swap_attack.Total()
    for number in range(ROUNDS):
        above = place / f"above-{number}"
        above.mkdir()
        total.add(swap_attack.attack(manifest, above, payload, situation))
        assert not payload.executed(), total
    is_open = situation in {"opened", "above"}
    assert sum(total.tried.values()) > (ROUNDS if is_open else 1000)
    assert (sum(total.succeeded.values()) > 0) == is_open, total
    if situation == "above":
        assert (total.executions, total.refused) == (0, {"STORE_FAILED": ROUNDS * 4})
    else:
        assert (total.executions, total.refused) == (ROUNDS * 6, {})
