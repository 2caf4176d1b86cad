"""When files count as hashed."""

from __future__ import annotations

import pytest

from llama_loader.errors import IntegrityError
from llama_loader.soundness import FRESH, Soundness


class Files:
    """Counts how often they were hashed; ``trouble`` is what that finds."""

    def __init__(self) -> None:
        self.looked = 0
        self.trouble: Exception | None = None
        self.now = 100.0
        self.sound = Soundness(self.look, clock=lambda: self.now)

    def look(self) -> None:
        self.looked += 1
        if self.trouble is not None:
            raise self.trouble


def test_what_was_only_unpacked_is_hashed() -> None:
    files = Files()
    files.sound.require()
    assert files.looked == 1


def test_what_was_hashed_a_moment_ago_is_not_hashed_again() -> None:
    files = Files()
    files.sound.look()
    files.now += FRESH
    files.sound.require()
    assert files.looked == 1
    files.now += 0.1
    files.sound.require()
    assert files.looked == 2


def test_a_look_that_found_damage_counts_for_nothing() -> None:
    """Not even the good one a second before it."""
    files = Files()
    files.sound.look()
    files.trouble = IntegrityError("RUNTIME_DAMAGED", "changed")
    with pytest.raises(IntegrityError):
        files.sound.look()
    with pytest.raises(IntegrityError):
        files.sound.require()
    assert files.looked == 3


def test_how_long_a_look_counts() -> None:
    assert FRESH == 10


def test_what_was_found_damaged_stays_so() -> None:
    files = Files()
    files.sound.look()
    files.trouble = IntegrityError("RUNTIME_DAMAGED", "changed")
    files.now += FRESH + 1
    for looked in (2, 3):
        with pytest.raises(IntegrityError):
            files.sound.require()
        assert files.looked == looked
