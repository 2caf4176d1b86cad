"""The page's words in both locales."""

import re

from verbs import PROJECT

from tests.translator.test_panels import WORDS
from translator import languages, panels, texts


def test_the_browser_s_first_language_of_ours_is_taken() -> None:
    headers = {
        None: "en",
        "": "en",
        "ja": "ja",
        "de-DE,de;q=0.9": "en",
        "ja-JP,en;q=0.9": "ja",
        "en-GB,en;q=0.9,ja;q=0.8": "en",
        "de,ja;q=0.5,en;q=0.4": "ja",
    }
    assert {header: texts.accepted(header) for header in headers} == headers


def test_both_locales_have_all_words_with_the_same_blanks() -> None:
    for name, english in texts.every()["en"].items():
        japanese = texts.every()["ja"][name]
        assert japanese
        for blank in ("{count}", "{limit}", "{language}", "{place}", "YAKULINGO"):
            assert (blank in english) == (blank in japanese), name


def test_every_stage_of_a_start_has_its_word() -> None:
    folders = (PROJECT / "spaces/llama_space", PROJECT / "spaces/llama_loader")
    source = "".join(path.read_text() for folder in folders for path in folder.rglob("*.py"))
    stages = set(
        re.findall(
            r'(?:(?<!console)\.stage|Stage|timeline\.add|timeline=\()\(\s*"([a-z ]+)"', source
        )
    )
    assert {"resolve", "fetch", "model", "start", "page cache"} <= stages
    assert {name for name in stages if f"stage_{name}" not in WORDS} == set()


def test_a_duration_has_the_digits_that_mean_something() -> None:
    durations = {0.012: "12 ms", 0.5: "0.50 s", 9.99: "9.99 s", 61.2: "61 s"}
    assert {value: panels.seconds(value) for value in durations} == durations


def test_every_language_has_a_name_in_both_locales() -> None:
    for code, known in languages.known().items():
        assert languages.shown(code, "en").endswith(known.english)
        assert languages.shown(code, "ja") == known.native or " · " in languages.shown(code, "ja")
    assert languages.shown("de", "ja") == "Deutsch · ドイツ語"
