"""The loader's sentences in Japanese: complete by code, with the English beneath."""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from verbs import PROJECT

from llama_loader import server_log, settings
from llama_loader.errors import HostError
from llama_loader.events import Note
from llama_space.values import Failure, Progress, Status, Waiting
from translator import panels, texts

JAPANESE = re.compile("[ぁ-んァ-ヶ一-龠]")
PACKAGES = tuple(
    PROJECT / "spaces" / name for name in ("llama_loader", "llama_space", "translator")
)
CODE = re.compile(r"[A-Z][A-Z0-9]+(_[A-Z0-9]+)+|OFFLINE|UNREACHABLE|UNVERIFIED|SYSTEM|UNEXPECTED")
NOT_CODES = {row.variable.removeprefix(settings.PREFIX) for row in settings._FIELDS.values()} | {
    *settings._INHERITED,
    *("GGML_NO_BACKTRACE", "LLAMA_UPLOAD_THREADS", "HF_HOME", "LD_LIBRARY_PATH"),
    *("SPACES_ZERO_GPU", "XDG_CACHE_HOME", "PCI_BUS_ID", "HF_HUB_DISABLE_IMPLICIT_TOKEN"),
    *("HUGGING_FACE_HUB_TOKEN", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    *("HF_HUB_OFFLINE", "HF_TOKEN_PATH", "TRANSFORMERS_OFFLINE", "SPACE_ID", "GRADIO_ROOT_PATH"),
    *("HF_XET_CLIENT_READ_TIMEOUT", "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "LLAMA_SPACE"),
    *("GRADIO_TEMP_DIR", "GRADIO_NUM_WORKERS", "HF_XET_LOG_DEST"),
}
"""Names of variables and a value of one; two of them are codes too."""


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for package in PACKAGES:
        for path in sorted(package.rglob("*.py")):
            yield path, ast.parse(path.read_text())


def codes_in_the_source() -> set[str]:
    found = {
        node.value.partition("/")[0]  # what follows is the case
        for _, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and CODE.fullmatch(node.value.partition("/")[0])
    }
    found |= {name.partition("/")[0] for _, name, _ in server_log._CAUSES}
    return (found - NOT_CODES) | {"OFFLINE", "ZEROGPU_DURATION"}


def test_every_code_of_loader_and_page_has_a_japanese_sentence_and_hint() -> None:
    known = texts.read("sentences_ja.json")
    assert codes_in_the_source() == set(known)
    for code in known:
        what, hint, original = texts.say(Note(code, "the loader's words"), "ja")
        assert JAPANESE.search(what), code
        assert JAPANESE.search(hint), code
        assert "the loader's words" in original
        assert "{" not in what + hint


def test_variables_have_the_prefix_that_the_owner_took(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in filter(lambda one: one.startswith(settings.PREFIX), list(os.environ)):
        monkeypatch.delenv(name)
    monkeypatch.setenv("LLAMA_SPACE_N_CTX", "4096")
    assert "LLAMA_SPACE_LLAMA_CPP_SHA256" in texts.say(Note("UNVERIFIED", ""), "ja")[1]


def test_english_is_the_loader_s_own() -> None:
    assert texts.say(Note("NO_GPU", "no GPU", "add one"), "en") == ("no GPU", "add one", "")
    assert texts.say(Note("OF_TOMORROW", "what", "hint"), "ja") == ("what", "hint", "")


@pytest.mark.parametrize("stage", get_args(Waiting))
def test_what_a_visitor_waits_for_is_said_in_japanese_with_its_seconds(stage: Waiting) -> None:
    shown = texts.patience(Progress(stage, seconds=3.2), "ja")
    assert JAPANESE.search(shown)
    assert "3 秒" in shown
    assert "秒" not in texts.patience(Progress(stage), "ja")


def test_the_english_original_stands_under_the_japanese_and_both_are_escaped() -> None:
    japanese, english = texts.every()["ja"], texts.every()["en"]
    error = HostError(
        "GLIBC_TOO_OLD", "llama-server needs GLIBC_<9>, which this system does not have"
    )
    failed = Failure.of(error)
    shown = panels.failure(failed, japanese)
    assert "このシステムは古すぎます" in shown
    assert "<summary>英語の原文</summary>" in shown
    assert "llama-server needs GLIBC_&lt;9&gt;, which" in shown
    assert "<details" not in panels.failure(failed, english)
    assert english["no_hint"] in panels.failure(failed, english)
    note = Note("UNVERIFIED", "u is not pinned: its bytes are run without a check")
    state = Status("ready", notes=(note,))
    assert "固定されていないバイト列" in panels.colophon(state, japanese)
    assert all(note.message in panels.colophon(state, words) for words in (english, japanese))
