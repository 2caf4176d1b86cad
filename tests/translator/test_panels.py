"""The pure parts of the page: words, pictures, panels, advice."""

import dataclasses
import re
from typing import Any, get_args

import pytest

from llama_loader.events import Downloading, Note
from llama_space.values import Failure, Figures, Phase, Progress, Status, Waiting
from translator import panels, texts

WORDS = texts.every()["en"]
RUNNING = Status(
    "ready",
    release="b11549-1",
    architecture="90",
    digest="ab" * 32,
    verified=True,
    model="model.gguf",
    devices=("CUDA0",),
    memory={"CUDA0": 3 * 1024**3},
    tokens_per_second=41.6,
    server_pid=1,
    timeline=(("resolve", 0.08), ("start", 0.5)),
    calls=(Figures(0.0, 0.2, 1.0, 30, warm=False), Figures(1.0, 0.1, 0.5, 12, warm=True)),
)


def test_the_colophon_names_everything_that_runs() -> None:
    shown = panels.colophon(RUNNING, WORDS)
    facts = ("b11549-1", "sm_90", "ab" * 32, "CUDA0", "3.22 GB", "model.gguf", "42 tokens/s")
    for fact in (*facts, "resolve 80 ms<br>start 0.50 s"):
        assert fact in shown
    newest = "0.50 s · first words after 0.10 s · 12 tok"
    assert f"{newest}<br>1.00 s · first words after 0.20 s · 30 tok · cold" in shown
    assert "verified" in panels.pill(RUNNING, WORDS)


@pytest.mark.parametrize("locale", texts.LOCALES)
@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({}, "verified"),
        ({"verified": False}, "unverified"),
        ({"verified": False, "release": None}, "unchecked"),
    ],
)
def test_verified_is_said_only_of_what_a_pin_or_a_signature_vouches_for(
    changed: dict[str, Any], name: str, locale: str
) -> None:
    words = texts.every()[locale]
    state = dataclasses.replace(RUNNING, **changed)
    shown = [panels.pill(state, words), panels.colophon(state, words)]
    for trust in ("verified", "unverified", "unchecked"):
        said = [f">{words[trust]}<" in shown[1], f"· {words[trust]}" in shown[0]]
        assert said == [trust == name] * 2, trust
    assert texts.every()["en"]["unverified"] == "digests match, not pinned"  # a contract
    assert ("pill ready unverified" in shown[0]) == (name == "unverified")
    assert ("stamp unverified" in shown[1]) == (name == "unverified")


def test_each_phase_and_a_server_that_has_ended_are_said_in_words() -> None:
    for phase in get_args(Phase):
        assert WORDS[phase] in panels.pill(Status(phase), WORDS)
    assert WORDS["asleep"] not in panels.pill(dataclasses.replace(RUNNING, warm=True), WORDS)
    assert WORDS["asleep"] in panels.pill(dataclasses.replace(RUNNING, warm=False), WORDS)


@pytest.mark.parametrize("locale", texts.LOCALES)
def test_a_visitor_s_line_names_no_release_architecture_or_file(locale: str) -> None:
    words = texts.every()[locale]
    coming = Progress("prepare", Downloading("model-Q4_K_M.gguf", 3_000_000, 20_000_000))
    preparing = Status("preparing", progress=coming)
    for state in (RUNNING, preparing):
        line = panels.pill(state, words)
        assert not re.search(r"b11549|sm_90|gguf|llama", line)
    for stage in get_args(Waiting):
        assert "llama" not in texts.patience(Progress(stage, seconds=3), locale)


def test_an_owner_s_failure_says_what_to_set_and_links_to_the_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = Failure("NO_GPU", "no NVIDIA GPU found", "attach one", 5)
    for no_name in ("", 'a/b"><script>'):
        monkeypatch.setenv("SPACE_ID", no_name)
        assert "href" not in panels.failure(found, WORDS)
    monkeypatch.setenv("SPACE_ID", "someone/translator")
    shown = panels.failure(found, WORDS)
    assert 'href="https://huggingface.co/spaces/someone/translator/settings"' in shown
    assert "YAKULINGO_SPACES_ALLOW_CPU=1" in shown
    assert WORDS["for_owner"] in shown
    visitors = panels.failure(Failure("ZEROGPU_QUOTA", "no seconds left", "come back", 5), WORDS)
    assert "href" not in visitors
    assert WORDS["for_owner"] not in visitors


def test_what_comes_from_elsewhere_is_escaped() -> None:
    evil = "<script>alert(1)</script>"
    state = Status(
        "failed",
        release=evil,
        model=evil,
        devices=(evil,),
        memory={evil: 5},
        timeline=((evil, 1.0),),
        notes=(Note(evil, evil, evil),),
        failure=Failure(evil, evil, evil, 1),
    )
    shown = panels.colophon(state, WORDS) + panels.failure(state.failure, WORDS)
    assert evil not in shown + panels.pill(state, WORDS) + panels.status("done", evil, evil)
    assert "&lt;script&gt;" in shown
    line = panels.status("done", "Done", "\u2068日本語\u2069 → \u2068English\u2069 · 42 tok")
    assert "<bdi>日本語</bdi> → <bdi>English</bdi> · 42 tok" in line


def test_while_it_prepares_the_latest_progress_is_shown() -> None:
    news = Progress("prepare", Downloading("y", 3_000_000, 20_000_000))
    state = Status("preparing", progress=news)
    assert "3 MB of 20 MB" in panels.pill(state, WORDS)
    assert "12 s" in panels.pill(dataclasses.replace(state, elapsed=12.3), WORDS)
