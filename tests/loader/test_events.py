"""Events in words and in steps, without what may be a secret."""

import pytest

from llama_loader import events
from llama_loader.events import Downloading, Event, Note, Stage, Timeline

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
def test_event_is_one_line_with_readable_sizes_and_no_secrets(event: Event, said: str) -> None:
    assert events.line(event) == said


def test_what_is_kept_of_an_event_has_no_secrets() -> None:
    kept = Note("UNVERIFIED", SECRET, SECRET)
    assert kept.message == kept.hint == "https://hub/file?…"


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
