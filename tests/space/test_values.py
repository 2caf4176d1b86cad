import inspect
import re

import pytest

import llama_space
from llama_loader import doctor, events, report, selection
from llama_loader.errors import SettingError
from llama_loader.events import Downloading, Event, Note, Stage, Timeline
from llama_space.values import Address, Failure, Record

SECRET = "https://hub/file?Signature=abc"


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (Downloading(SECRET, 0, None), "downloading https://hub/file?…: 0 B"),
        (
            Downloading("a.tar", 5_540_000, 11_080_000),
            "downloading a.tar: 5.54 MB of 11.1 MB (50%)",
        ),
        (Downloading("a.tar", 1234, None), "downloading a.tar: 1.23 kB"),
        (Downloading("a.tar", 0, 17_000_000_000), "downloading a.tar: 0 B of 17 GB (0%)"),
        (Stage("resolve", 0.06), "resolve: 0.1 s"),
        (
            Note("UNVERIFIED", f"{SECRET} is", "do this"),
            "UNVERIFIED: https://hub/file?… is; do this",
        ),
    ],
)
def test_events_in_words(event: Event, said: str) -> None:
    assert events.line(event) == said


def test_what_is_kept_of_an_event_has_no_secrets() -> None:
    kept = Note("UNVERIFIED", SECRET, SECRET)
    assert kept.message == kept.hint == "https://hub/file?…"


def test_later_news_take_the_place_of_the_earlier() -> None:
    record = Record()
    for event in (Downloading("a", 1, 2), Downloading("b", 1, 2), Downloading("a", 2, 2)):
        record.hear(event)
    latest = record.status().progress
    assert latest is not None
    assert latest.text == "downloading a: 2 B of 2 B (100%)"


@pytest.mark.parametrize("total", [300_000, None])
def test_download_that_comes_byte_by_byte_is_heard_in_steps(total: int | None) -> None:
    heard: list[Event] = []
    told = Timeline(heard.append)
    for done in range(300_001):
        told(Downloading("a", done, total))
    told(Downloading("b", 0, total))
    assert heard[0] == Downloading("a", 0, total)
    assert 5_000 < len(heard) < 50_000
    assert heard[-1] == Downloading("b", 0, total)
    if total:
        assert heard[-2] == Downloading("a", total, total)


def test_a_value_shows_no_secrets_and_an_error_has_one_line() -> None:
    assert "secret" not in repr(Address("http://127.0.0.1:1/v1", "secret"))
    failure = Failure.of(SettingError("BAD", f"two\nlines of {SECRET}", hint=f"see {SECRET}"))
    assert failure == Failure("BAD", "two lines of https://hub/file?…", "see https://hub/file?…", 2)


def test_class_that_a_page_is_made_of_has_in_its_docstring_what_its_fields_mean() -> None:
    """``docs/conf.py`` and the doctor's schema are made of docstrings, and of no comments."""
    known = {**vars(selection), **vars(report), **vars(doctor)}
    kinds = [known[name] for name in doctor.json_schema()["$defs"]]
    for kind in (*kinds, *(getattr(llama_space, name) for name in llama_space.__all__)):
        assert not re.findall(r"^    (?:\w+: .*  )?# .*", inspect.getsource(kind), re.MULTILINE)
