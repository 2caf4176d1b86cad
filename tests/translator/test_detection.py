"""Which language a text is in, measured on sentences and short inputs of our own writing."""

import time
from pathlib import Path

import pytest

from translator import detection, languages

CORPUS = Path(__file__).parents[1] / "data" / "languages"


def corpus(name: str) -> list[tuple[str, str]]:
    """Return a file's texts, each after the code of its language."""
    lines = (CORPUS / f"{name}.txt").read_text("utf-8").splitlines()
    return [(code, text) for code, _, text in (line.partition("\t") for line in lines)]


def missed(rows: list[tuple[str, str]]) -> list[tuple[str, str, str]]:
    found = [(code, detection.detect(text).code, text) for code, text in rows]
    return [(code, guess, text) for code, guess, text in found if guess != code]


def test_sentences_are_recognised_in_all_languages() -> None:
    rows = corpus("sentences")
    assert len(rows) >= 200
    assert len({code for code, _ in rows}) >= 30
    wrong = missed(rows)
    assert len(wrong) <= 0.05 * len(rows), wrong


def test_short_inputs_are_recognised_mostly() -> None:
    rows = corpus("short")
    assert len(rows) >= 100
    assert all(len(text.rstrip(" ?").split()) <= 3 for _, text in rows)
    wrong = missed(rows)
    assert len(wrong) <= 0.2 * len(rows), wrong


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("国語学会の会長が来た", "ja"),
        ("東京都", "ja"),
        ("営業時間", "ja"),
        ("这是什么", "zh-Hans"),
        ("這是什麼", "zh-Hant"),
        ("謝謝", "zh-Hant"),
        ("Hugging Face の Space で動きます", "en"),
        ("これは GPU を使います", "ja"),
        (
            "Siehe https://www.example.com/the/and/of/that/you/were/looking/for und sag Bescheid",
            "de",
        ),
        ("Tie\u0302\u0301ng Vie\u0323\u0302t", "vi"),
    ],
)
def test_mixed_and_ambiguous_texts(text: str, code: str) -> None:
    assert detection.detect(text).code == code


@pytest.mark.parametrize("text", ["", " \n", "123 ¥!?", "🙂", "ⵣⵣⵣ"])
def test_text_without_letters_of_a_known_script_is_english_without_confidence(text: str) -> None:
    assert detection.detect(text) == detection.Guess("en", 0.0)


def test_confidence_is_lower_for_a_word_that_several_languages_have() -> None:
    sure = detection.detect("The bridge was closed for repairs, so we took the ferry instead.")
    unsure = detection.detect("hotel")
    assert 0 <= unsure.confidence < sure.confidence <= 1


@pytest.mark.parametrize("unit", ["'", "a", "a ", "あ", "我", "\u0301", "://", "é'", "\x00"])
def test_hostile_text_of_a_million_characters_takes_no_time(unit: str) -> None:
    detection.detect("warm")
    began = time.process_time()
    detection.detect(unit * 1_000_000)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("source", "target", "text", "expected"),
    [
        ("auto", "en", "猫です", ("ja", "en")),
        ("auto", "de", "猫です", ("ja", "de")),
        ("auto", "ja", "Guten Morgen", ("de", "ja")),
        ("ja", "ja", "猫です", ("ja", "ja")),
        ("fr", "en", "a cat", ("fr", "en")),
        # one sentence that is in its target already: nothing turns a chosen target round
        ("auto", "en", "The cat is not on the table.", ("en", "en")),
        ("auto", "ja", "猫がテーブルの上にいません。", ("ja", "ja")),
    ],
)
def test_chosen_target_is_never_replaced(
    source: str, target: str, text: str, expected: tuple[str, str]
) -> None:
    made = detection.pair(source, target, text)
    assert (made[0].code, made[1].code) == expected
    for code in languages.known():
        assert detection.pair("auto", code, text)[1].code == code


@pytest.mark.parametrize(
    ("target", "text", "expected"),
    [
        ("en", "The cat is not on the table.", ("en", "ja")),
        ("ja", "猫がテーブルの上にいません。", ("ja", "en")),
        ("en", "Die Katze ist nicht auf dem Tisch.", ("de", "en")),
        ("fr", "Le chat n'est pas sur la table.", ("fr", "en")),
    ],
)
def test_sentence_in_its_automatic_target_turns_that_round(
    target: str, text: str, expected: tuple[str, str]
) -> None:
    source, into = detection.pair("auto", target, text, automatic=True)
    assert (source.code, into.code) == expected


@pytest.mark.parametrize("word", ["Hello", "hotel", "Tokyo", "Gift", "no", "Translation"])
def test_single_word_does_not_turn_an_automatic_target_round(word: str) -> None:
    source, target = detection.pair("auto", "en", word, automatic=True)
    assert target.code == "en"
    assert source.code != "en"
