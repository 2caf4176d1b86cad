"""Which languages the page has, and which one a caller means."""

from __future__ import annotations

import pytest

from translator import languages


def test_the_first_pair_comes_first_and_nothing_twice() -> None:
    codes = list(languages.known())
    assert codes[:2] == ["ja", "en"]
    assert len(codes) == len(set(codes)) == 56


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("ja", "ja"),
        ("Japanese", "ja"),
        ("日本語", "ja"),
        ("german", "de"),
        (" Deutsch ", "de"),
        ("ドイツ語", "de"),
        ("zh", "zh-Hans"),
        ("zh-CN", "zh-Hans"),
        ("zh_hans", "zh-Hans"),
        ("zh-Hans-CN", "zh-Hans"),
        ("Chinese", "zh-Hans"),
        ("中文", "zh-Hans"),
        ("zh-TW", "zh-Hant"),
        ("zh-hk", "zh-Hant"),
        ("zh-Hant-HK", "zh-Hant"),
        ("en-US", "en"),
        ("de-AT", "de"),
        ("es-419", "es"),
        ("fr-CA", "fr-CA"),
        ("fr-CH", "fr"),
        ("pt", "pt-BR"),
        ("pt-BR", "pt-BR"),
        ("pt-PT", "pt-PT"),
        ("Português", "pt-BR"),
        ("ar", "ar-SA"),
        ("sw", "sw-KE"),
        ("nb-NO", "no"),
        ("tl", "fil-PH"),
        ("iw", "he"),
        ("sr-Latn-RS", "sr"),
        ("Tie\u0302\u0301ng Vie\u0323\u0302t", "vi"),
    ],
)
def test_a_language_is_found_by_what_people_call_it(name: str, code: str) -> None:
    found = languages.find(name)
    assert found is not None
    assert found.code == code


@pytest.mark.parametrize("name", ["Klingon", "", "-", "x-klingon", "-en", "z" * 1_000_000])
def test_unknown_language_is_none(name: str) -> None:
    assert languages.find(name) is None
    assert len(name) < 100 or not languages.near(name)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("Germn", "German"), ("Japanesse", "Japanese"), ("zh-Hanz", "Chinese (Simplified)")],
)
def test_mistyped_language_has_near_ones(name: str, wanted: str) -> None:
    assert languages.find(name) is None or name == "zh-Hanz"
    assert wanted in languages.near(name)


def test_every_language_is_called_by_what_nothing_else_is() -> None:
    for one in languages.known().values():
        for name in (one.code, one.english, one.native, one.japanese, *one.also.split()):
            found = languages.find(name)
            assert found is not None
            assert found.code == one.code
