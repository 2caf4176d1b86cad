"""Which languages the page has, and which one a caller means."""

import pytest

from translator import languages


def test_the_first_pair_comes_first_and_nothing_twice() -> None:
    codes = list(languages.known())
    assert codes[:2] == ["ja", "en"]
    assert len(codes) == len(set(codes)) == 56


CALLED = {
    "ja": ["ja", "Japanese", "日本語"],
    "de": ["german", " Deutsch ", "ドイツ語", "de-AT"],
    "zh-Hans": ["zh", "zh-CN", "zh_hans", "zh-Hans-CN", "Chinese", "中文"],
    "zh-Hant": ["zh-TW", "zh-hk", "zh-Hant-HK"],
    "en": ["en-US"],
    "es": ["es-419"],
    "fr-CA": ["fr-CA"],
    "fr": ["fr-CH"],
    "pt-BR": ["pt", "pt-BR", "Português"],
    "pt-PT": ["pt-PT"],
    "ar-SA": ["ar"],
    "sw-KE": ["sw"],
    "no": ["nb-NO"],
    "fil-PH": ["tl"],
    "he": ["iw"],
    "sr": ["sr-Latn-RS"],
    "vi": ["Tie\u0302\u0301ng Vie\u0323\u0302t"],
}


@pytest.mark.parametrize("code", CALLED)
def test_a_language_is_found_by_what_people_call_it(code: str) -> None:
    for name in CALLED[code]:
        found = languages.find(name)
        assert found is not None
        assert (name, found.code) == (name, code)


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
