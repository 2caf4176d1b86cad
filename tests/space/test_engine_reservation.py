"""What a call asks ZeroGPU for: first guesses, what was shown, refusals, what is kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llama_space import reservation
from llama_space.request import Request
from llama_space.reservation import LONGEST, SHORTEST, Reserved, Shown
from llama_space.values import Figures

SIZES = {"4b": 3_300_000_000, "12b": 8_100_000_000, "27b": 17_700_000_000}
SENTENCES = {
    "English": "Good morning, how are you today? ",
    "Japanese": "おはようございます、今日はお元気ですか。",
    "Chinese": "早上好今天你过得怎么样我希望一切都好",
    "Greek": "Καλημέρα, πώς είστε σήμερα το πρωί; ",
}
NEW = Shown()


def text(language: str, characters: int) -> str:
    return (SENTENCES[language] * characters)[:characters]


def reserve(
    asked: str,
    shown: Shown = NEW,
    *,
    size: str = "27b",
    warm: bool = False,
    most: int | None = None,
) -> int:
    request = Request(asked, {"max_tokens": most} if most else {})
    return shown.reserve(request, SIZES[size], warm=warm).seconds


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("language", SENTENCES)
def test_first_call_fits_into_the_quota_of_an_anonymous_visitor(language: str, size: str) -> None:
    assert reserve(text(language, 500), size=size) <= 30
    assert reserve(text(language, 2000), size=size) <= 60


def test_short_text_for_a_cold_worker_asks_for_the_least() -> None:
    assert reserve("Good morning.") == SHORTEST


def test_warm_worker_is_asked_for_less() -> None:
    cold, warm = (reserve(text("Chinese", 1000), warm=warm) for warm in (False, True))
    assert warm < cold - 5


def test_slowest_start_and_slowest_answer_that_were_shown_count() -> None:
    shown = Shown(starts=(4.0, 20.0, 5.0), speeds=(40.0, 20.0, 60.0))
    slow = reserve(text("Chinese", 1000), shown)
    assert slow > reserve(text("Chinese", 1000), Shown((4.0,), (40.0,))) + 20
    assert slow == reserve(text("Chinese", 1000), Shown((20.0,), (20.0,)))


def test_answer_that_may_not_be_long_is_not_paid_for() -> None:
    few, many = (reserve(text("Chinese", 2000), warm=True, most=most) for most in (100, 5000))
    assert few < many == reserve(text("Chinese", 2000), warm=True)


@pytest.mark.parametrize("speed", [0.01, 1e6])
def test_seconds_stay_within_what_zerogpu_takes(speed: float) -> None:
    for warm in (True, False):
        reserved = Shown((1.0,), (speed,)).reserve(Request("x" * 2000, {}), SIZES["4b"], warm=warm)
        assert SHORTEST <= reserved.seconds <= LONGEST
        assert reserved.least <= reserved.seconds


def test_tokens_are_counted_by_script_in_contents_of_every_form() -> None:
    assert reservation.tokens("x" * 100) == 25
    assert reservation.tokens("字" * 100) == 70
    assert reservation.tokens("ж" * 100) == 50
    assert reservation.tokens("x" * 100 + "字" * 100) == 95
    parts = [{"role": "user", "content": [{"type": "text", "text": "x" * 100}]}]
    assert reservation.tokens(parts) == 1 + 1 + 25
    assert reservation.tokens([]) == 0


@pytest.mark.parametrize(
    ("refusal", "again"),
    [
        ("(40s requested vs. 30s left). Try again in 1:00:00.", Reserved(30, 20)),
        ("(60s requested vs. 30s left). Try again", Reserved(20, 20)),  # ZeroGPU counts 1.5 for 1
        ("(60s requested vs. 29s left). Try again", None),  # not enough
        ("(40s requested vs. 40s left)", None),  # this was refused already
        ("(0s requested vs. 40s left)", None),
        ("Space app has reached its GPU limit.", None),
    ],
)
def test_refusal_that_says_what_is_left_is_answered_with_that_if_it_can_be_enough(
    refusal: str, again: Reserved | None
) -> None:
    assert Reserved(40, 20).after(refusal) == again


def test_cold_start_and_answer_of_some_length_are_learned() -> None:
    cold = Figures(1.0, tokens=50, tokens_per_second=33.33, warm=False)
    assert NEW.after(cold, 4.567) == Shown((4.57,), (33.3,))
    assert NEW.after(Figures(1.0, tokens=3, tokens_per_second=200.0, warm=True), 4.5) == NEW
    many = NEW
    for seconds in range(1, 9):
        many = many.after(cold, float(seconds))
    assert many.starts == (4.0, 5.0, 6.0, 7.0, 8.0)


def test_what_was_shown_is_kept_for_the_model_in_the_store(tmp_path: Path) -> None:
    store, model, shown = tmp_path / "store", Path("m.gguf"), Shown((4.0,), (33.0,))
    assert reservation.recall(store, model, 5) == NEW
    reservation.remember(store, model, 5, shown)
    assert reservation.recall(store, model, 5) == shown
    assert reservation.recall(store, model, 6) == NEW
    assert reservation.recall(store, Path("other.gguf"), 5) == NEW


@pytest.mark.parametrize(
    "kept", [b"", b"[]", b"\xff", b'{"starts": [-1]}', b'{"speeds": ["x"]}', b"x" * 5000]
)
def test_file_that_cannot_be_read_is_no_knowledge(kept: bytes, tmp_path: Path) -> None:
    store, model = tmp_path / "store", Path("m.gguf")
    reservation.remember(store, model, 5, Shown((4.0,)))
    (path,) = (store / "shown").iterdir()
    path.write_bytes(kept)
    assert reservation.recall(store, model, 5) == NEW
    path.unlink()
    os.mkfifo(path)
    assert reservation.recall(store, model, 5) == NEW
