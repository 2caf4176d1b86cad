"""What may be a secret never stands in an error, a hint or a line of progress.

Each sentence of ``sentences.json`` is used, and gets all of its values where it is.
"""

import copy
import io
import time
from pathlib import Path

import pytest

from llama_loader import errors, selection, server_log, settings
from llama_loader.console import Console
from llama_loader.errors import LoaderError, SettingError, mistyped, without_secrets
from llama_loader.events import Downloading
from tests.rigs.sentences import says_nothing, uses, values

SECRET = "s3cret"


@pytest.mark.parametrize(
    "url",
    [
        f"https://h/x?sig={SECRET}",
        f"https://h/x?a=1&sig='{SECRET}'",
        f"https://h/x?a;b={SECRET}",
        f"https://h/x?a,b={SECRET}",
        f"https://h/x?(a)={SECRET}",
        f"https://h/x?a?b={SECRET}",
        f"https://h/x#token={SECRET}",
        f"HTTPS://h/x?sig={SECRET}",
        f"https://user:{SECRET}@h/x",
        f"https://user:{SECRET}@more@h/x",
        f"https://user:a/{SECRET}@h/x",
        f"https://user:a?{SECRET}@h/x",
        f"HtTpS://{SECRET}@h/x",
        f"hf://OWNER/REPO@main/x?token={SECRET}",
        f"hf://user:{SECRET}@OWNER/REPO/x",
    ],
)
def test_no_secret_of_a_url_is_shown(url: str) -> None:
    for text in (url, f"cannot read '{url}'.", f"({url}), then", f"{url}\nhttps://other/"):
        assert SECRET not in without_secrets(text)
    assert SECRET not in LoaderError("X", url, hint=f"try {url}").render()
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    Console(stream)(Downloading(url, 0, None))
    assert SECRET not in stream.getvalue()
    assert "downloading" in stream.getvalue()


def test_an_error_as_text_has_its_code_and_hint_and_can_be_copied() -> None:
    error = SettingError("X", f"no https://h/x?sig={SECRET}", hint="give one")
    for one in (error, copy.copy(error)):
        assert str(one) == "X: no https://h/x?…; give one"
        assert (one.code, one.hint, one.status) == ("X", "give one", 2)
    assert str(LoaderError("X", "a\nb")) == "X: a b"


@pytest.mark.parametrize("text", ["a" * 64_000, "http://h?" + ")" * 64_000 + "x"])
def test_long_text_from_outside_is_looked_through_at_once(text: str) -> None:
    """A mirror's status line or header of 64 kB took half a minute at each attempt."""
    began = time.process_time()
    LoaderError("X", text).render()
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://h/x.tar.gz is cut", "https://h/x.tar.gz is cut"),
        ("'https://h/x?q=1' is cut", "'https://h/x?…' is cut"),
        ("(see https://u:p@h:8080/x)", "(see https://…@h:8080/x)"),
        ("hf://O/R@v1/m.json is cut", "hf://O/R@v1/m.json is cut"),
        ("file:///a/b c?", "file:///a/b c?"),
        ("a ? b # c @ d", "a ? b # c @ d"),
    ],
)
def test_the_rest_can_be_read(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        f"user:{SECRET}@mirror.example/manifest.json?sig={SECRET}",
        f"https:/u:{SECRET}@h/x?sig={SECRET}",
        f"https://user:pa {SECRET}@h.invalid/m.json",
        f"//u:{SECRET}@h.invalid/x#{SECRET}",
        f"hf://user:{SECRET}@owner/repo/m.json",
    ],
)
def test_no_secret_of_what_is_no_url_is_shown(text: str) -> None:
    assert SECRET not in mistyped(text)
    assert mistyped("htps://mirror.example/m.json") == "htps://mirror.example/m.json"
    for variable in ("LLAMA_CPP_MANIFEST_URL", "LLAMA_CPP_URL"):
        name = f"YAKULINGO_SPACES_{variable}"
        if text.startswith("hf://"):
            continue  # a URL as far as settings can tell
        with pytest.raises(SettingError, match=name) as caught:
            settings.load(environ={name: text})
        assert SECRET not in caught.value.render()


SENTENCES = errors._SENTENCES
SOURCES = [
    path
    for package in ("llama_loader", "llama_space")
    for path in sorted((Path(errors.__file__).parents[1] / package).glob("*.py"))
]


def test_each_sentence_gets_all_of_its_values_where_an_error_or_a_note_is_made() -> None:
    found = [(name, given) for _, names, given in uses(SOURCES) for name in names]
    assert len(found) > 90
    for name, given in found:
        if name in SENTENCES:
            assert values(SENTENCES[name]) <= given, name
        else:
            assert "/" not in name, name
    for kind, name, _ in server_log._CAUSES:
        assert values(SENTENCES[name]) <= {"end", "when", "lines"}, name
        assert kind(name, end="e", when="w", lines="l").code == name.partition("/")[0]


def test_each_sentence_is_said_somewhere() -> None:
    causes = Path(errors.__file__).with_name("causes.json")
    source = "".join(path.read_text() for path in (*SOURCES, causes))
    computed = {name for name in SENTENCES if name.endswith("/release")}  # selection._nothing
    assert [name for name in SENTENCES.keys() - computed if f'"{name}"' not in source] == []
    assert [name for name, told in SENTENCES.items() if not told.get("hint")] == []
    assert [name for name, told in SENTENCES.items() if says_nothing(told)] == []
    assert {name.partition("/")[0] for name in computed} == {*selection._CHECKS}


def test_sentence_of_a_case_has_the_code_alone_and_a_hint_of_its_own() -> None:
    error = SettingError("SETTING_CONFLICT/prefixes", first="A", other="B")
    assert error.render() == (
        "error[SETTING_CONFLICT]: A and B are set to different values\n"
        "hint: unset one of them: both name the same setting"
    )
    assert SettingError("HUB_CLIENT_MISSING", hint="wait").hint == "wait"
    assert copy.copy(error).render() == error.render()
    assert LoaderError("X", "").message == ""
