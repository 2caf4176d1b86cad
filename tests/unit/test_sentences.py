"""The loader's sentences in Japanese: complete by code, and with the values of the English."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from verbs import PROJECT

from llama_loader import server_log, settings
from llama_loader.errors import HostError, LoaderError, ServerError, SettingError
from llama_loader.events import Downloading, Note, Resolving, Stage, Unpacking
from llama_space import event_text
from llama_space.values import Failure, Status
from translator import panels, sentences, texts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from llama_loader.events import Event

JAPANESE = re.compile("[ぁ-んァ-ヶ一-龠]")
PACKAGES = tuple(
    PROJECT / "spaces" / name for name in ("llama_loader", "llama_space", "translator")
)
CODE = re.compile(r"[A-Z][A-Z0-9]+(_[A-Z0-9]+)+|OFFLINE|UNREACHABLE|UNVERIFIED|SYSTEM|UNEXPECTED")
NOT_CODES = {row.variable.removeprefix(settings.PREFIX) for row in settings._FIELDS.values()} | {
    *settings._INHERITED,
    *("GGML_NO_BACKTRACE", "HF_HOME", "LD_LIBRARY_PATH"),
    *(
        "SPACES_ZERO_GPU",
        "XDG_CACHE_HOME",
        "PCI_BUS_ID",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN",
        "SSL_CERT_FILE",
    ),
    *("HF_HUB_OFFLINE", "HF_TOKEN_PATH", "TRANSFORMERS_OFFLINE", "SPACE_ID", "GRADIO_ROOT_PATH"),
    *("HF_XET_CLIENT_READ_TIMEOUT", "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS"),
}
"""Names of variables and a value of one; two of them are codes too."""


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for package in PACKAGES:
        for path in sorted(package.rglob("*.py")):
            yield path, ast.parse(path.read_text())


def codes_in_the_source() -> set[str]:
    found = {
        node.value
        for _, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and CODE.fullmatch(node.value)
    }
    return (found - NOT_CODES) | {"OFFLINE", "ZEROGPU_DURATION"}


@dataclass(frozen=True)
class Site:
    """A place that says something: its code, and its English with a mark for each value."""

    code: str
    message: str
    hint: str
    marks: tuple[str, ...]


class Marked:
    """Writes an f-string's text with «1», «2» … where its values go."""

    def __init__(self) -> None:
        self.marks: dict[str, str] = {}

    def text(self, node: ast.expr | None) -> str | None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if not isinstance(node, ast.JoinedStr):
            return None
        return "".join(self._part(part) for part in node.values)

    def _part(self, part: ast.expr) -> str:
        if isinstance(part, ast.Constant):
            return str(part.value)
        assert isinstance(part, ast.FormattedValue)
        shown = ast.unparse(part.value)
        if shown == "quoted":  # server_log.explain: what every end of a server is followed by
            return f"; its last lines: {self._mark(shown)}"
        if shown == "_MEMORY_HINT":
            return server_log._MEMORY_HINT
        return self._mark(shown)

    def _mark(self, shown: str) -> str:
        return self.marks.setdefault(shown, f"«{len(self.marks) + 1}»")


def sites() -> list[Site]:
    """Every call that is given a code and then a sentence with values."""
    found = []
    for path, tree in sources():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or len(node.args) < 2:
                continue
            code, message = node.args[0], node.args[1]
            if not isinstance(code, ast.Constant) or code.value not in sentences.codes():
                continue
            marked = Marked()
            text = marked.text(message)
            if text is None or not marked.marks or _on_the_command_line_only(path, text):
                continue
            of_message = tuple(marked.marks.values())
            hints = [word.value for word in node.keywords if word.arg == "hint"] or node.args[2:3]
            hint = marked.text(hints[0]) if hints else ""
            found.append(Site(str(code.value), text, hint or "", of_message))
    return found


def _on_the_command_line_only(path: Path, text: str) -> bool:
    names = {"__main__.py", "server_plan.py", "suppose.py"}
    return path.name in names or "--suppose" in text


def test_every_code_of_loader_and_page_has_a_japanese_sentence_and_hint() -> None:
    assert codes_in_the_source() == sentences.codes()
    for code in sentences.codes():
        said = sentences.say(code, "«no entry has this»", "", "ja")
        assert JAPANESE.search(said.what), code
        assert JAPANESE.search(said.hint), code
        assert said.original == "«no entry has this»"


@pytest.mark.parametrize("site", sites(), ids=lambda site: f"{site.code}:{site.message[:40]}")
def test_the_values_of_the_english_are_in_the_japanese(site: Site) -> None:
    said = sentences.say(site.code, site.message, site.hint, "ja")
    shown = said.what + said.hint
    assert JAPANESE.search(said.what)
    missing = [mark for mark in site.marks if mark not in shown]
    assert not missing, shown
    assert "{" not in shown


def test_there_are_sites_to_look_at() -> None:
    assert len(sites()) > 60


@pytest.mark.parametrize(
    ("environ", "shown"),
    [
        ({"YAKULINGO_SPACES_N_CTX": "lots"}, ("'lots'", "16 から 16777216", "4096")),
        ({"YAKULINGO_SPACES_LLAMA_DEVICE": "the first"}, ("'the first'", "CUDA0", "auto")),
        ({"YAKULINGO_SPACES_LLAMA_CPP_SHA256": "ab" * 32}, ("YAKULINGO_SPACES_LLAMA_CPP_URL",)),
        ({"HF_TOKEN": "two words"}, ("HF_TOKEN", "空白を含まない")),
    ],
)
def test_a_wrong_setting_is_said_in_japanese(environ: dict[str, str], shown: tuple[str]) -> None:
    with pytest.raises(SettingError) as caught:
        settings.load(environ=environ)
    error = caught.value
    said = sentences.say(error.code, error.message, error.hint, "ja")
    for part in (*environ, *shown):
        assert part in said.what + said.hint
    assert error.message in said.original


def test_what_every_variable_accepts_is_said_in_japanese() -> None:
    accepted = {row.kind.accepts for row in settings._FIELDS.values()}
    known = sentences._table()["words"]
    assert accepted <= set(known)


@pytest.mark.parametrize(
    ("status", "lines"),
    [
        (1, ["E couldn't bind HTTP server socket"]),
        (127, ["error while loading shared libraries: libcublas.so.12"]),
        (1, ["CUDA error: no kernel image is available"]),
        (1, ["cudaMalloc failed: out of memory", "allocating 512.00 MiB on device 0"]),
        (1, ["error loading model: invalid magic"]),
        (-9, ["loading"]),
        (-11, ["loading"]),
        (3, ["loading"]),
    ],
)
def test_an_end_of_the_server_is_quoted_in_japanese(status: int, lines: list[str]) -> None:
    error = server_log.explain(status, lines, loading=True)
    said = sentences.say(error.code, error.message, error.hint, "ja")
    assert JAPANESE.search(said.what)
    assert lines[0].removeprefix("E ") in said.what
    assert ") while loading" not in said.what


def wrapped(inner: LoaderError) -> tuple[str, str]:
    message = f"the test run with the loader's own tiny model failed: {inner.message}"
    return f"{message} (your model is not the cause); with your model: it died", inner.hint


def test_a_failed_test_run_blames_the_runtime_in_japanese_too() -> None:
    inner = ServerError("NO_ANSWER", "llama-server does not answer at /completion: refused")
    said = sentences.say(inner.code, *wrapped(inner), "ja")
    for part in ("お使いのモデルが原因ではありません", "/completion", "it died"):
        assert part in said.what
    assert "このマシンでは動きません" in said.hint


@pytest.mark.parametrize(
    ("event", "shown"),
    [
        (Resolving("https://hub/m.json"), "https://hub/m.json を読んでいます"),
        (Downloading("a.tar", 5_540_000, 11_080_000), "a.tar を取得中: 5.54 MB / 11.1 MB（50%）"),
        (Downloading("a.tar", 1234, None), "a.tar を取得中: 1.23 kB"),
        (Unpacking("a.tar", 1, 2), "a.tar を展開中: 1 B / 2 B（50%）"),
        (Stage("verify", 0.25, 31_700_000), "検証: 0.2 秒（31.7 MB）"),
        (Stage("first token", 0.06), "初トークン: 0.1 秒"),
        (Note("STORE_BUSY", "another process installs it; waiting for that"), "別のプロセスが"),
    ],
)
def test_progress_is_said_in_japanese_with_its_bytes_and_seconds(event: Event, shown: str) -> None:
    assert sentences.progress(event_text.event(event), "ja").startswith(shown)
    assert sentences.progress(event_text.event(event), "en") == event_text.event(event)


def test_every_line_of_progress_in_the_source_has_a_japanese_one() -> None:
    """What ``Progress`` and ``latest`` are given, and what a beat adds: the seconds so far."""
    beaten = ("starting llama-server", "llama-server loads m.gguf", "llama-server is started anew")
    lines = [*beaten, *(f"{one} (3 s)" for one in beaten), "waiting for words (3 s)"]
    for line in (*lines, "preparing", "ZeroGPU lends a GPU as soon as one is free"):
        shown = sentences.progress(line, "ja")
        assert JAPANESE.search(shown), line
        assert ("3 秒" in shown) == ("3 s" in line)


def test_the_english_original_stands_under_the_japanese_and_both_are_escaped() -> None:
    japanese, english = texts.every()["ja"], texts.every()["en"]
    error = HostError(
        "GLIBC_TOO_OLD", "llama-server needs GLIBC_<9>, which this system does not have"
    )
    failed = Failure.of(error)
    shown = panels.failure(failed, japanese)
    assert "GLIBC_&lt;9&gt; が、このシステムにありません" in shown
    assert "<summary>英語の原文</summary>" in shown
    assert "llama-server needs GLIBC_&lt;9&gt;, which" in shown
    assert "<details" not in panels.failure(failed, english)
    assert english["no_hint"] in panels.failure(failed, english)


def test_notes_are_said_in_the_page_s_language() -> None:
    note = Note(
        "UNVERIFIED", "u is not pinned: these bytes are run as they came; their sha256 is d"
    )
    state = Status("ready", notes=(note,))
    assert "u が固定されていません" in panels.colophon(state, texts.every()["ja"])
    assert note.message in panels.colophon(state, texts.every()["en"])


def test_a_message_of_any_length_is_answered_at_once() -> None:
    said = sentences.say("OUT_OF_MEMORY", "; its last lines: " * 10_000, "", "ja")
    assert JAPANESE.search(said.what)
