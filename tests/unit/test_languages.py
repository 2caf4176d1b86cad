"""Which language a text is in, and what becomes what."""

from __future__ import annotations

import pytest

from translator import languages


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("今日はいい天気です。", "ja"),
        ("カタカナ", "ja"),
        ("東京都", "ja"),
        ("国語学会の会長が来た", "ja"),
        ("这是什么", "zh-Hans"),
        ("這是什麼", "zh-Hant"),
        ("오늘은 날씨가 좋네요", "ko"),
        ("Это хорошая книга, и мы её читали.", "ru"),
        ("Дякую, їм подобається.", "uk"),
        ("Чекај, њихова кућа.", "sr"),
        ("Това е ъгъл.", "bg"),  # noqa: RUF001
        ("این چیست؟", "fa"),
        ("ما هذا؟", "ar-SA"),
        ("یہ کیا ہے؟ لڑکی", "ur"),
        ("यह क्या है", "hi"),
        ("τι είναι αυτό", "el"),
        ("מה זה", "he"),
        ("นี่คืออะไร", "th"),
        ("What is this, and why?", "en"),
        ("Je ne sais pas ce que vous voulez, mais les enfants sont là.", "fr"),
        ("Das ist nicht gut, und ich weiß es.", "de"),
        ("El perro y los gatos están en la casa.", "es"),
        ("Tokyo", "en"),
        ("", "en"),
        ("123 ¥!?", "en"),
        ("Hugging Face の Space で動きます", "en"),
        ("これは GPU を使います", "ja"),
    ],
)
def test_a_text_is_recognised(text: str, code: str) -> None:
    assert languages.detect(text) == code


@pytest.mark.parametrize("code", list(languages.known()))
def test_every_language_s_thanks_is_recognised_by_its_script(code: str) -> None:
    """Latin ones share a script; of the others each sample must speak for itself."""
    one = languages.known()[code]
    if one.thanks.isascii() or languages.detect(one.thanks) == "en":
        assert any(letter.isascii() for letter in one.thanks if letter.isalpha())
        return
    same_letters = {"ar-EG", "mr", "bg", "sr", "uk", "fa", "ur", "zh-Hans", "zh-Hant"}
    assert languages.detect(one.thanks) == code or code in same_letters


def test_the_first_pair_comes_first_and_nothing_twice() -> None:
    codes = list(languages.known())
    assert codes[:2] == ["ja", "en"]
    assert len(codes) == len(set(codes)) == 56


@pytest.mark.parametrize(
    ("source", "target", "text", "expected"),
    [
        ("auto", "en", "猫です", ("ja", "en")),
        ("auto", "en", "a cat", ("en", "ja")),
        ("auto", "ja", "猫です", ("ja", "en")),
        ("auto", "de", "猫です", ("ja", "de")),
        ("ja", "ja", "猫です", ("ja", "ja")),
        ("fr", "en", "a cat", ("fr", "en")),
    ],
)
def test_a_detected_source_that_is_the_target_turns_the_pair_round(
    source: str, target: str, text: str, expected: tuple[str, str]
) -> None:
    made = languages.pair(source, target, text)
    assert (made[0].code, made[1].code) == expected


@pytest.mark.parametrize(
    ("name", "code"),
    [("ja", "ja"), ("Japanese", "ja"), ("日本語", "ja"), ("zh_hans", "zh-Hans"), ("pt", "pt-BR")],
)
def test_a_language_is_found_by_what_people_call_it(name: str, code: str) -> None:
    found = languages.find(name)
    assert found is not None
    assert found.code == code


def test_an_unknown_language_is_none() -> None:
    assert languages.find("Klingon") is None
