"""Which URL is asked next, when, and what is said when none is left."""

from __future__ import annotations

import random

import pytest

from llama_loader import mirrors as choosing
from llama_loader.errors import IntegrityError, NetworkError
from llama_loader.mirrors import Mirrors, WrongBytesError, backoff
from llama_loader.patience import AttemptError, Patience, RangeError

ONE, TWO = "https://one.invalid/a", "https://two.invalid/a"
PATIENCE = Patience(attempts=3, longest_wait=60.0)


@pytest.fixture
def both() -> Mirrors:
    return Mirrors("a.tar.zst", [ONE, TWO], PATIENCE)


@pytest.fixture(autouse=True)
def _dice_that_show_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing.random, "uniform", lambda low, high: (low + high) / 2)


def test_the_first_is_asked_as_long_as_it_does_as_well_as_the_others(both: Mirrors) -> None:
    first = both.best()
    assert (first.url, first.failures, first.wait) == (ONE, 0, 0.0)
    assert (first.ranges, first.validator, first.slow, first.alone) == (True, None, False, False)
    both.failed(first, AttemptError("cut"))
    second = both.best()
    assert second.url == TWO
    both.failed(second, AttemptError("cut"))
    assert both.best() is first


def test_what_is_gained_forgives_what_failed(both: Mirrors) -> None:
    first = both.best()
    both.failed(first, WrongBytesError("CHUNK_MISMATCH", "wrong"))
    assert (first.failures, first.wrong) == (1, 1)
    first.gained()
    assert (first.failures, first.wrong) == (0, 0)
    assert both.best() is first


def test_it_waits_twice_as_long_each_time_up_to_eight_seconds() -> None:
    one = Mirrors("a", [ONE], Patience(attempts=99))
    waits = []
    for _ in range(6):
        one.failed(one.best(), AttemptError("busy"))
        waits.append(one.best().wait)
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def test_what_the_server_asks_for_is_waited_and_no_more_than_the_longest() -> None:
    assert backoff(1, 7.0, PATIENCE) == 7.0
    assert backoff(5, 61.0, PATIENCE) == 60.0
    assert backoff(5, 0.0, PATIENCE) == 0.0


def test_the_wait_is_jittered_by_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    random.seed(3)
    waits = [backoff(2, None, PATIENCE) for _ in range(400)]
    assert 1.0 <= min(waits) < 1.1
    assert 2.9 < max(waits) <= 3.0


def test_a_range_that_did_not_do_is_asked_for_as_a_whole_at_once(both: Mirrors) -> None:
    first = both.best()
    first.validator = '"one"'
    both.failed(first, RangeError("changed"))
    assert (first.ranges, first.validator, first.wait, first.gone) == (False, None, 0.0, False)
    assert first.failures == 1


def test_wrong_bytes_are_asked_for_once_more_at_once_then_never(both: Mirrors) -> None:
    first = both.best()
    both.failed(first, WrongBytesError("CHUNK_MISMATCH", "wrong"))
    assert (first.ranges, first.wait, first.gone) == (True, 0.0, False)
    both.failed(first, WrongBytesError("CHUNK_MISMATCH", "wrong"))
    assert first.gone
    assert both.best().url == TWO


def test_a_url_is_given_up_after_as_many_attempts_as_there_is_patience(both: Mirrors) -> None:
    first = both.best()
    for count in (1, 2, 3):
        assert not first.gone, count
        both.failed(first, AttemptError("cut"))
    assert first.gone
    both.failed(first, AttemptError("cut"))
    assert first.gone  # for good


def test_a_final_failure_is_not_tried_again(both: Mirrors) -> None:
    first = both.best()
    both.failed(first, AttemptError("404", final=True, missing=True))
    assert first.gone
    assert first.missing


@pytest.mark.parametrize(("second", "missing"), [(True, True), (False, False)])
def test_none_is_left(both: Mirrors, second: bool, missing: bool) -> None:
    """It is missing only where every URL says so."""
    both.failed(both.best(), AttemptError("404 Not Found", final=True, missing=True))
    both.failed(both.best(), AttemptError("no", final=True, missing=second))
    with pytest.raises(NetworkError) as caught:
        both.best()
    error = caught.value
    assert error.code == "UNREACHABLE"
    assert error.message == f"a.tar.zst cannot be fetched: {ONE}: 404 Not Found; {TWO}: no"
    assert error.missing is missing
    assert error.hint.startswith("is the address right")


def test_the_same_reason_is_said_once() -> None:
    one = Mirrors("a", [ONE], PATIENCE)
    for _ in range(3):
        one.failed(one.best(), AttemptError("cut"))
    assert one.given_up().message == f"a cannot be fetched: {ONE}: cut"


def test_wrong_bytes_win_over_what_the_others_failed_of(both: Mirrors) -> None:
    first = both.best()
    for _ in range(2):
        both.failed(first, WrongBytesError("NOT_THE_FILE", "a login page"))
    both.failed(both.best(), AttemptError("no", final=True))
    with pytest.raises(IntegrityError) as caught:
        both.best()
    error = caught.value
    assert error.code == "NOT_THE_FILE"
    assert error.message == f"a.tar.zst is not what was published: {ONE}: a login page; {TWO}: no"
    assert "open the URL in a browser" in error.hint


def test_wrong_bytes_once_are_the_networks_fault(both: Mirrors) -> None:
    both.failed(both.best(), WrongBytesError("CHUNK_MISMATCH", "wrong"))
    assert isinstance(both.given_up(), NetworkError)
