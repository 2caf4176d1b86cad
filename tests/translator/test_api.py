"""The page's endpoints as programs call them."""

from typing import Any

import gradio
import pytest

from tests.translator.test_session import BROKEN, SETTINGS, Playing, piece
from translator import api
from translator.session import VisitorQueue


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("猫", "Klingon"), "LANGUAGE_UNKNOWN: there is no language 'Klingon'; give a code"),
        (("猫", "Germn"), "near ones: German"),
        (("猫", "auto"), "name a target_language"),
        (("猫", "en", 3), "TEXT_EXPECTED: source_language must be a text, not 3"),
        ((None, "en"), "TEXT_EXPECTED: text must be a text, not None"),
        (("The cat is here.", "en"), "LANGUAGE_SAME: the text is in the language of target_lang"),
        (("", "en"), "nothing to translate"),
        (("猫" * 21, "en"), "21 characters, 20 are allowed"),
        (("猫", "en"), "SERVER_CRASHED: it died; try again"),
    ],
)
def test_the_endpoint_raises_a_sentence(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(gradio.Error, match=words):
        list(api.endpoint(Playing(BROKEN), SETTINGS, VisitorQueue(1, 0))(*arguments))


@pytest.mark.parametrize("tag", ["zh-TW", "Chinese (Traditional)", "繁體中文"])
def test_endpoint_takes_tags_and_names_and_answers_in_what_was_named(tag: str) -> None:
    engine = Playing(piece("A", finished=True))
    assert list(api.endpoint(engine, SETTINGS, VisitorQueue(1, 0))("Guten Morgen", tag)) == ["A"]
    (asked, _) = engine.asked[0]  # type: ignore[misc]
    assert "from German to Chinese (Traditional)" in str(asked)


def test_detect_tells_language_name_and_confidence() -> None:
    found = api.detect("Guten Morgen, wie geht es Ihnen?")
    assert (found["language"], found["name"]) == ("de", "German")
    assert 0.5 < float(found["confidence"]) <= 1
    with pytest.raises(gradio.Error, match="TEXT_EXPECTED"):
        api.detect(3)  # type: ignore[arg-type]
