"""One translation, with a scripted engine."""

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

import gradio
import pytest

from llama_loader import settings
from llama_loader.errors import SettingError
from llama_loader.events import Downloading
from llama_space.values import Failure, Item, Piece, Progress, Status
from tests.rigs.held_page import Stub
from translator import api, session
from translator.page import RefusingEngine
from translator.session import Answer, InLine, Job, VisitorQueue, translate
from translator.texts import Refusal

SETTINGS = settings.load(environ={"YAKULINGO_SPACES_MAX_CHARS": "20"})
BROKEN = Failure("SERVER_CRASHED", "it died", "try again", 7)


class Playing(Stub):
    """Says its states in turn, then plays its items."""

    def __init__(self, *items: Item, states: tuple[Status, ...] = (Status("ready"),)) -> None:
        self.items = items
        self.states = deque(states)
        self.asked: list[object] = []
        self.closed = False

    def status(self) -> Status:
        return self.states.popleft() if len(self.states) > 1 else self.states[0]

    def events(self, asked: object, **options: Any) -> Generator[Item, None, None]:
        self.asked.append((asked, options))
        try:
            yield from self.items
        finally:
            self.closed = True


def piece(text: str, *, finished: bool = False, reason: str = "") -> Piece:
    return Piece(text, finished, 1, 5.0, reason)


def test_words_come_at_once_are_shown_before_a_pause_and_the_end_is_whole() -> None:
    pause = Progress("waiting", seconds=1)
    engine = Playing(
        *(piece(" "), piece("A"), piece(" c"), pause, piece("at")),
        piece("", finished=True, reason="stop"),
    )
    updates = list(translate(engine, SETTINGS, Job("猫", "auto", "en")))
    assert pause in updates
    answers = [one for one in updates if isinstance(one, Answer)]
    assert [one.text for one in answers] == ["A", "A c", "A cat"]
    assert (answers[-1].source.code, answers[-1].target.code) == ("ja", "en")


def test_a_failure_is_the_last_word_whenever_it_comes() -> None:
    engine = Playing(piece("A"), BROKEN, piece("never"))
    assert list(translate(engine, SETTINGS, Job("猫", "auto", "en")))[-1] == BROKEN
    engine = Playing(states=(Status("failed", failure=BROKEN),))  # it could not be prepared
    assert list(translate(engine, SETTINGS, Job("猫", "auto", "en"))) == [BROKEN]
    assert not engine.asked


def test_progress_and_preparation_are_passed_on() -> None:
    news = Progress("prepare", Downloading("a.tar", 1, 2))
    states = (Status("preparing"), Status("preparing", progress=news), Status("ready"))
    engine = Playing(Progress("queue"), piece("A", finished=True), states=states)
    updates = list(translate(engine, SETTINGS, Job("猫", "auto", "en")))
    assert updates[:3] == [Progress("prepare"), news, Progress("queue")]


@pytest.mark.parametrize(
    ("job", "refused"),
    [
        (Job("  \n", "auto", "en"), Refusal("nothing")),
        (Job("x" * 21, "auto", "ja"), Refusal("too_long", {"count": 21, "limit": 20})),
        (Job("猫", "ja", "ja"), Refusal("same", {"language": "日本語"})),
        # a target that was chosen is never replaced
        (Job("The cat is here.", "auto", "en"), Refusal("same", {"language": "English"})),
    ],
)
def test_a_job_that_makes_no_sense_asks_for_nothing(job: Job, refused: Refusal) -> None:
    engine = Playing(piece("A", finished=True))
    assert list(translate(engine, SETTINGS, job)) == [refused]
    assert not engine.asked


@pytest.mark.parametrize(
    ("job", "pair"),
    [
        (Job("The cat is here.", "auto", "en", automatic=True), ("en", "ja")),
        (Job("猫は" * 10, "auto", "en"), ("ja", "en")),  # the limit counts characters, not bytes
    ],
)
def test_a_job_is_translated_between_the_languages_that_fit(
    job: Job, pair: tuple[str, str]
) -> None:
    *_, last = translate(Playing(piece("A", finished=True)), SETTINGS, job)
    assert isinstance(last, Answer)
    assert (last.source.code, last.target.code) == pair


def test_closing_a_translation_closes_the_engine_s_stream() -> None:
    engine = Playing(piece("A"), piece("B", finished=True))
    made = translate(engine, SETTINGS, Job("猫", "auto", "en"))
    next(made)
    made.close()
    assert engine.closed


def test_visitors_are_told_their_places_and_one_who_leaves_moves_the_others() -> None:
    line, job = VisitorQueue(at_once=1, waiting=2), Job("猫", "auto", "en")
    engine = Playing(piece("A"), piece(" cat", finished=True))
    first, second, third, fourth = (translate(engine, SETTINGS, job, line) for _ in range(4))
    assert isinstance(next(first), Answer)
    assert [next(second), next(third), next(second)] == [InLine(1), InLine(2), InLine(1)]
    assert list(fourth) == [Refusal("full")]
    assert list(translate(engine, SETTINGS, Job("", "auto", "en"), line)) == [Refusal("nothing")]
    second.close()
    assert next(third) == InLine(1)
    assert len(engine.asked) == 1
    first.close()
    last = list(third)[-1]
    assert isinstance(last, Answer)
    assert last.text == "A cat"
    assert len(engine.asked) == 2


def test_settings_that_cannot_be_read_give_an_engine_that_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("YAKULINGO_SPACES_N_CTX", "lots")
    with pytest.raises(SettingError) as caught:
        settings.load()
    engine = RefusingEngine(caught.value)
    failure = engine.status().failure
    assert failure is not None
    assert "YAKULINGO_SPACES_N_CTX" in failure.message
    assert "YAKULINGO_SPACES_N_CTX" in engine.doctor().as_text()
    assert list(engine.events([])) == [failure]
    with pytest.raises(gradio.Error, match="SETTING_INVALID: YAKULINGO_SPACES_N_CTX"):
        list(api.endpoint(engine, SETTINGS, VisitorQueue(1, 0))("猫", "en"))


class Answering(Playing):
    """Answers each request by a function of its last message; may fail on the way."""

    def __init__(self, answer: Callable[[str], str], *failures: int) -> None:
        super().__init__()
        self.answer = answer
        self.failures = set(failures)

    def events(self, asked: Any, **options: Any) -> Generator[Item, None, None]:
        assert not options
        text = asked[-1]["content"].partition("\n\n")[2]
        self.asked.append(text)
        self.history = asked[:-1]
        yield piece(self.answer(text)[:3])
        if len(self.asked) in self.failures:
            yield LOST
            return
        yield piece(self.answer(text)[3:], finished=True, reason="stop")


LOST = Failure("ZEROGPU_ABORTED", "the GPU was taken away", "try again", 7)
LONG = settings.load(environ={"YAKULINGO_SPACES_N_CTX": "512"})
PARAGRAPHS = "".join(
    f"Paragraph {name} has some words to be read.\n\n" for name in "ABCDEFGHIJ" * 3
)


def last_text(updates: list[Any]) -> str:
    assert isinstance(updates[-1], Answer)
    assert updates[-1].last is not None
    assert updates[-1].last.finished
    return str(updates[-1].text)


def test_long_text_is_translated_in_pieces_with_the_sentences_before() -> None:
    engine = Answering(str.upper)
    job = Job(PARAGRAPHS, "en", "de")
    updates = list(translate(engine, LONG, job))
    assert last_text(updates) == PARAGRAPHS.upper()
    assert 3 < len(engine.asked) < 30
    before, answer = engine.history
    assert before["content"].endswith("to be read.")
    assert answer["content"].endswith("TO BE READ.")
    answers = [one for one in updates if isinstance(one, Answer)]
    assert answers[-1].done == answers[-1].count == len(engine.asked)
    assert all(PARAGRAPHS.upper().startswith(one.text) for one in answers)


def test_form_survives_a_model_that_loses_lines_and_marks() -> None:
    def careless(text: str) -> str:
        return " ".join(text.upper().replace("**", "").split())

    text = "# One two\n\n- three **four** five\n- six\n\n```\nkept\n```\n    deep | cell\n"
    updates = list(translate(Answering(careless), LONG, Job(text, "en", "de")))
    assert last_text(updates) == (
        "# ONE TWO\n\n- THREE **FOUR** FIVE\n- SIX\n\n```\nkept\n```\n    DEEP | CELL\n"
    )


def test_text_of_marks_costs_no_more_requests_than_a_long_text_has_pieces() -> None:
    engine = Answering(lambda text: text.replace("|", ""))
    list(translate(engine, replace(LONG, max_chars=20_000), Job("a|" * 10_000, "en", "de")))
    pieces_of_it = 20_000 / 190
    assert len(engine.asked) < pieces_of_it + 50 + 20_000 / 20


def test_answer_that_the_context_ended_is_asked_for_in_finer_pieces() -> None:
    class Ending(Answering):
        def events(self, asked: Any, **options: Any) -> Generator[Item, None, None]:
            for item in super().events(asked, **options):
                ends = isinstance(item, Piece) and item.finished and "\n" in self.asked[-1]
                yield replace(item, reason="length") if ends else item

    updates = list(translate(Ending(str.upper), LONG, Job("one\ntwo", "en", "de")))
    assert last_text(updates) == "ONE\nTWO"
    assert updates[-1].last.reason == "stop"


def test_lost_gpu_is_asked_for_once_more_and_the_piece_begins_again() -> None:
    engine = Answering(str.upper, 2)
    updates = list(translate(engine, LONG, Job(PARAGRAPHS, "en", "de")))
    assert last_text(updates) == PARAGRAPHS.upper()
    assert engine.asked[1] == engine.asked[2]


def test_base_model_gets_single_lines_and_empty_ones_do_not_end_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session.model, "at_hand", lambda _: "base.gguf")
    monkeypatch.setattr(session, "_format", lambda _: "base")
    asked: list[str] = []

    class Line(Playing):
        def events(self, asked_: Any, **options: Any) -> Generator[Item, None, None]:
            assert "\n" in options["stop"]
            text = asked_[0]["content"].rpartition("English: ")[2].partition("\n")[0]
            asked.append(text)
            yield piece(text.upper(), finished=True, reason="stop")

    updates = list(translate(Line(), LONG, Job("one\n\ntwo\n  - three\n", "en", "de")))
    assert last_text(updates) == "ONE\n\nTWO\n  - THREE\n"
    assert asked == ["one", "two", "three"]
