"""What a press does, without a browser: streams, stops, resumes, and files."""

import base64
import json
from collections.abc import Generator
from types import SimpleNamespace
from typing import Any, cast

import gradio as gr
import pytest

from llama_loader import settings
from llama_space.values import Failure, Item, Piece
from tests.translator.test_session import Playing
from translator.handlers import Handlers
from translator.session import VisitorQueue

LONG = settings.load(environ={"YAKULINGO_SPACES_N_CTX": "512"})
TEXT = "".join(f"Paragraph {name} has some words to be read.\n\n" for name in "ABCDEFGHIJKL")
VISITOR = cast("gr.Request", SimpleNamespace(session_hash="one", headers={}))
LOST = Failure("ZEROGPU_QUOTA", "no seconds are left", "come back later", 5)
SRT = "1\n00:00:01,000 --> 00:00:02,000\nHello there.\n\n2\n00:00:03,000 --> 00:00:04,000\nBye.\n"


class Capitals(Playing):
    """An engine that answers in capitals, until it has no seconds left."""

    def __init__(self, seconds: int = 1000) -> None:
        super().__init__()
        self.seconds = seconds

    def events(self, asked: Any, **options: Any) -> Generator[Item, None, None]:
        del options
        self.asked.append(asked[-1]["content"].partition("\n\n")[2])
        if len(self.asked) > self.seconds:
            yield LOST
            return
        yield Piece(self.asked[-1].upper(), finished=True, tokens=1, tokens_per_second=1, reason="")


def made(engine: Capitals) -> Handlers:
    return Handlers(engine, LONG, VisitorQueue(1, 1))


def sent(name: str, text: str) -> tuple[str, str]:
    return name, base64.b64encode(text.encode()).decode()


def test_press_after_a_failure_resumes_at_the_piece_where_it_ended() -> None:
    engine = Capitals(seconds=2)
    page = made(engine)
    *_, last = page.press(TEXT, "en", "de", "yes", VISITOR)
    assert LOST.code in last[1]
    engine.seconds, before = 1000, len(engine.asked)
    *_, last = page.press(TEXT, "en", "de", "yes", VISITOR)
    assert last[0] == TEXT.upper()
    assert engine.asked[before - 1] == engine.asked[before]
    assert len(set(engine.asked)) == len(engine.asked) - 1


def test_press_after_a_stop_resumes_and_another_text_or_visitor_begins_anew() -> None:
    engine = Capitals()
    page = made(engine)
    running = page.press(TEXT, "en", "de", "yes", VISITOR)
    for _ in range(3):
        next(running)
    page.end(VISITOR)
    assert "Stopped" in list(running)[-1][1]
    first = len(engine.asked)
    list(page.press(TEXT, "en", "fr", "yes", VISITOR))
    assert engine.asked[first] == engine.asked[0]
    list(page.press(TEXT, "en", "fr", "yes", VISITOR))
    page.leave(VISITOR)
    assert not page._unfinished
    assert not page._stops


def test_visitors_who_name_themselves_anew_each_time_fill_no_memory() -> None:
    page = made(Capitals())
    for number in range(150):
        visitor = cast("gr.Request", SimpleNamespace(session_hash=str(number), headers={}))
        list(page.press("x" * 20_001, "ja", "en", "yes", visitor))
        list(page.press_file(*sent("a.txt", "Hello."), "en", "en", visitor))
    assert not page._unfinished
    for number in range(150):
        visitor = cast("gr.Request", SimpleNamespace(session_hash=str(number), headers={}))
        running = page.press(TEXT, "en", "de", "yes", visitor)
        for _ in range(3):
            next(running)
        page.end(visitor)
        list(running)
    assert list(page._unfinished) == [str(number) for number in range(50, 150)]
    page.press(TEXT, "en", "de", "yes", VISITOR).close()
    assert not page._stops


def test_second_press_ends_the_visitors_first() -> None:
    page = made(Capitals())
    first = page.press(TEXT, "en", "de", "yes", VISITOR)
    for _ in range(3):
        next(first)
    second = page.press("Other words.", "en", "de", "yes", VISITOR)
    next(second)
    next(second)
    assert "Stopped" in next(first)[1]
    assert list(second)[-1][0] == "OTHER WORDS."


def test_target_is_only_written_where_nobody_chose_it() -> None:
    english = "The cat is here, on the table."
    turned = list(made(Capitals()).press(english, "auto", "en", "", VISITOR))
    assert [one[3] for one in turned if isinstance(one[3], str)] == ["ja"]
    chosen = list(made(Capitals()).press(english, "auto", "en", "yes", VISITOR))
    assert not [one[3] for one in chosen if isinstance(one[3], str)]
    assert "choose another language" in chosen[-1][1]


def test_file_is_translated_with_progress_and_given_back() -> None:
    page = made(Capitals())
    steps = list(page.press_file(*sent("a.srt", SRT), "en", "de", VISITOR))
    file = json.loads(steps[-1][2])
    assert file["name"] == "a.de.srt"
    made_text = base64.b64decode(file["content"]).decode()
    assert made_text == SRT.replace("Hello there.", "HELLO THERE.").replace("Bye.", "BYE.")
    assert "a.de.srt is ready" in steps[-1][0]
    assert all(one[2] == "" for one in steps[:-1])
    assert not page._unfinished
    steps = list(page.press_file(*sent("a.txt", TEXT), "en", "de", VISITOR))
    assert any("Translating a.txt: 1 of " in str(one[0]) for one in steps)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.pdf", "x", "This file is none of .txt, .md, .srt, .vtt"),
        ("a.txt", "\x00", "not a text in UTF-8 or UTF-16"),
        ("a.txt", "x" * 20_001, "20,000 characters"),
        ("a.srt", "words", "nothing to translate"),
    ],
)
def test_file_that_cannot_be_translated_is_a_sentence(name: str, text: str, sentence: str) -> None:
    engine = Capitals()
    (step,) = made(engine).press_file(*sent(name, text), "en", "de", VISITOR)
    assert sentence in step[0]
    assert step[2] == ""
    assert not engine.asked
