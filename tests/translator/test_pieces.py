"""Texts cut into pieces and put together again: nothing is lost, and nothing is too large."""

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from translator import pieces
from translator.pieces import Slice

LINES = st.sampled_from(
    [
        "A sentence. Another one!",
        "- item",
        "  * nested **bold** item",
        "1. first",
        "# Heading",
        "> quoted",
        "| a | b |",
        "|---|---|",
        "```python",
        "```",
        "~~~",
        "    x = {1: 2}",
        "\tindented words",
        "今日は。明日も晴れ？",
        "https://example.com/a?b=c",
        "see https://example.com/x, and `code`",
        "",
        "   ",
        "12:30",
        "\u2028",
        "a" * 70,
    ]
)
TEXTS = st.one_of(
    st.text(max_size=300),
    st.lists(st.one_of(LINES, st.text(max_size=40)), max_size=30).map("\n".join),
    st.lists(LINES, max_size=30).map("\r\n".join),
)
DOCUMENT = """\
# The garden

Some **bold** words, with https://example.com/a?b=c and `code`.
A second line.

- first item
  - nested item
1. numbered
> quoted

| Name | Age |
|------|-----|
| Anna | 12  |

```python
print("kept")
```
The end.
"""


@given(TEXTS, st.integers(3, 400), st.booleans())
def test_joined_pieces_are_the_text_and_none_exceeds_the_bound(
    text: str, most: int, by_line: bool
) -> None:
    made = pieces.cut(text, most, by_line=by_line)
    assert "".join(piece.text for piece in made) == text
    for piece in made:
        assert piece.text
        if not piece.kept:
            assert pieces.weight(piece.text) <= most
            assert piece.text == piece.text.rstrip()
            assert any(map(str.isalpha, piece.text))
            assert not by_line or len(piece.text.splitlines()) == 1


@given(TEXTS)
def test_finer_pieces_are_the_piece_and_each_is_smaller(text: str) -> None:
    parts = pieces.finer(text)
    if parts:
        assert "".join(part.text for part in parts) == text
        assert all(part.kept or len(part.text) < len(text) for part in parts)


@given(TEXTS)
def test_text_is_its_own_faithful_answer(text: str) -> None:
    for piece in pieces.cut(text, 3000):
        if not piece.kept:
            assert pieces.faithful(piece.text, piece.text)


@given(TEXTS, st.text(max_size=200))
@example("0\r    = A\rA", "A\x1eA")
def test_line_breaks_survive_any_answer_that_counts_as_faithful(text: str, answer: str) -> None:
    for piece in pieces.cut(text, 3000):
        if not piece.kept and pieces.faithful(piece.text, answer):
            made = pieces.mended(piece.text, answer)
            assert len(made.splitlines()) == len(piece.text.splitlines())


def test_code_is_kept_and_prose_around_it_is_not() -> None:
    made = pieces.cut(DOCUMENT, 3000)
    kept = "".join(piece.text for piece in made if piece.kept)
    assert '```python\nprint("kept")\n```' in kept
    assert [piece.text.splitlines()[0] for piece in made if not piece.kept] == [
        "# The garden",
        "The end.",
    ]


def test_short_text_is_one_piece_and_long_ones_are_cut_at_paragraphs() -> None:
    paragraph = "One sentence of five words. And another of five.\n"
    assert [one.text for one in pieces.cut(paragraph, 3000)] == [paragraph.strip(), "\n"]
    text = "\n".join([paragraph] * 4)
    made = [one.text for one in pieces.cut(text, 110) if not one.kept]
    assert made == [f"{paragraph}\n{paragraph}".strip()] * 2


def test_long_line_is_cut_at_sentences_before_spaces() -> None:
    text = "One is here. Two is v1.2 here! 三つ目。四つ目？ " + "word " * 10
    made = [one.text for one in pieces.cut(text, 40) if not one.kept]
    assert made[0] == "One is here. Two is v1.2 here!"
    assert made[1] == "三つ目。四つ目？"
    assert all(one.startswith("word") for one in made[2:])


def test_lines_alone_come_without_their_marks() -> None:
    made = pieces.cut(DOCUMENT, 3000, by_line=True)
    words = [piece.text for piece in made if not piece.kept]
    assert words == [
        "The garden",
        "Some **bold** words, with https://example.com/a?b=c and `code`.",
        "A second line.",
        "first item",
        "nested item",
        "numbered",
        "quoted",
        "Name | Age",
        "Anna | 12",
        "The end.",
    ]


def test_answer_gets_the_marks_and_indentation_of_its_source() -> None:
    source = "- one\n  - two\n\n# three\n| four | 5 |"
    assert pieces.mended(source, "* EINS\n* ZWEI\n## DREI\n\n| VIER | 5 |") == (
        "- EINS\n  - ZWEI\n\n# DREI\n| VIER | 5 |"
    )
    assert pieces.mended("one line", "zwei\n\nZeilen") == "zwei Zeilen"


@pytest.mark.parametrize(
    ("source", "answer", "right"),
    [
        ("one", "eins", True),
        ("one\ntwo", "eins zwei", False),
        ("one\n\ntwo", "eins\nzwei", True),
        ("see https://a.example/b", "siehe https://a.example/b", True),
        ("see https://a.example/b", "siehe dort", False),
        ("a **bold** word", "ein **fettes** Wort", True),
        ("a **bold** word", "ein fettes Wort", False),
        ("| a | b |\n| c | d |", "| A | B |\n| C | D |", True),
        ("| a | b |\n| c | d |", "A B\nC D", False),
        ("run `ls`", "führe `ls` aus", True),
        ("run `ls`", "führe ls aus", False),
        ("run `ls`.", "`ls` を実行。", True),
        ("<i>one</i>", "<i>eins</i>", True),
        ("<i>one</i>", "eins", False),
        ("{\\an8}one", "{\\an8}eins", True),
        ("{\\an8}one", "eins", False),
        ("1 < 2 and <3", "1 kleiner als 2 und Herz", True),
        ("[text](https://a.example)", "[Text](https://a.example)", True),
        ("[text](https://a.example)", "[Text](https://b.example)", False),
    ],
)
def test_answers_form_is_compared(source: str, answer: str, right: bool) -> None:
    assert pieces.faithful(source, answer) is right


def test_line_is_cut_at_its_links_and_marks() -> None:
    assert pieces.finer("See **this** [page](https://a.example/b).") == [
        Slice("See"),
        Slice(" ", kept=True),
        Slice("**", kept=True),
        Slice("this"),
        Slice("**", kept=True),
        Slice(" ", kept=True),
        Slice("[", kept=True),
        Slice("page"),
        Slice("](https://a.example/b)", kept=True),
        Slice(".", kept=True),
    ]
    assert pieces.finer("nothing to cut here") == []


def test_context_is_the_last_sentences_of_both() -> None:
    assert pieces.context("A. B. C.", "X. Y. Z.", 99) == ("B. C.", "Y. Z.")
    assert pieces.context("A. B. C.", "X, Y. Z.", 99) == ("C.", "Z.")
    assert pieces.context("A. B. C.", "X. Y. Z.", 3) is None
    assert pieces.context("A.", "", 99) is None


@pytest.mark.parametrize(
    "unit",
    [
        *("a", "- ", "|", "`", "[", "](", "*", "a. ", "。", "1. ", "```\n", " \n", "\n"),
        *("http://", "http://)"),
    ],
)
def test_hostile_text_takes_time_in_proportion(unit: str) -> None:
    text = unit * (40_000 // len(unit))
    began = time.process_time()
    pieces.cut(text, 1800)
    pieces.finer(text)
    pieces.faithful(text, text)
    pieces.mended(text, text)
    pieces.context(text, text, 1800)
    assert time.process_time() - began < 6
