"""Files that are read, translated line by line, and written back."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from translator import documents, pieces
from translator.documents import Document
from translator.texts import Refusal

LIMIT = 1000
SRT = """\
1\r
00:00:01,000 --> 00:00:02,500\r
Hello there.\r
- How are you?\r
\r
2\r
00:00:03,000 --> 00:00:04,000\r
{\\an8}<i>Fine</i>\r
\r
3\r
00:00:05,000 --> 00:00:06,000\r
1984\r
"""
VTT = """\
WEBVTT - title

STYLE
::cue { color: red }

NOTE a remark

intro
00:01.000 --> 00:02.000 align:start
<v Anna>Hello there.

00:03.000 --> 00:04.000
How are you?"""


def read(name: str, data: bytes) -> Document:
    made = documents.read(name, base64.b64encode(data).decode(), LIMIT)
    assert isinstance(made, Document), made
    return made


def written(document: Document, answer: str) -> bytes:
    return base64.b64decode(document.written(answer))


def translated(name: str, data: bytes) -> bytes:
    document = read(name, data)
    return written(document, document.text.upper())


def refused(name: str, data: bytes) -> str:
    made = documents.read(name, base64.b64encode(data).decode(), LIMIT)
    assert isinstance(made, Refusal)
    return made.name


def test_srt_keeps_numbers_times_and_line_ends() -> None:
    assert translated("a.srt", SRT.encode()).decode() == (
        SRT.replace("Hello there.", "HELLO THERE.")
        .replace("How are you?", "HOW ARE YOU?")
        .replace("{\\an8}<i>Fine</i>", "{\\AN8}<I>FINE</I>")
    )
    document = read("a.srt", SRT.encode())
    assert document.text == "Hello there.\n- How are you?\n\n{\\an8}<i>Fine</i>\n\n1984"


def test_vtt_keeps_header_style_notes_and_settings() -> None:
    made = translated("a.vtt", VTT.encode()).decode()
    assert made == VTT.replace("<v Anna>Hello there.", "<V ANNA>HELLO THERE.").replace(
        "How are you?", "HOW ARE YOU?"
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["a.txt", "A.MD"])
def test_text_keeps_its_encoding_and_lines(encoding: str, name: str) -> None:
    text = "# Über\r\n\r\n  eins\nzwei\r\n"
    assert translated(name, b"\xfe\xff\x00h\x00i").decode("utf-16") == "HI"  # big-endian
    assert translated(name, text.encode(encoding)) == text.upper().encode(encoding)


def test_answer_that_would_break_subtitles_does_not() -> None:
    document = read("a.srt", SRT.encode())
    made = written(document, "\nto --> him\n\n \n").decode()
    assert "Hello there.\r\nto → him\r\n\r\n2\r\n" in made
    assert "<i>Fine</i>" in made
    assert made.count("-->") == 3
    again = read("a.srt", made.encode())
    assert len(again.worded) == len(document.worded)


REFUSED: dict[str, list[tuple[str, bytes]]] = {
    "file_kind": [("a.pdf", b"text"), ("a", b"text"), ("", b"text"), ("x" * 5000 + ".txt", b"x")],
    "file_not_text": [
        *(("a.txt", data) for data in (b"\x00\x01binary", b"\x89PNG\r\n", b"\x1b[31mred")),
        *(("a.txt", data) for data in ("Grüße".encode("latin-1"), "evil\u202etxt".encode())),
        *(("a.txt", data) for data in (b"\xff\xfe\x00\xd8", b"\xff\xfea")),
    ],
    "file_no_words": [("a.txt", b""), ("a.txt", b"123 456\n"), ("a.srt", b"no times here")],
    "file_large": [("a.txt", b"a" * (LIMIT + 1))],
}


@pytest.mark.parametrize("why", REFUSED)
def test_file_that_cannot_be_translated_is_refused_by_name(why: str) -> None:
    for name, data in REFUSED[why]:
        assert refused(name, data) == why
    assert documents.read("a.txt", "no base64!", LIMIT) == Refusal("file_not_text")


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("film.srt", "film.ja.srt"),
        ("../../etc/passwd.txt", "passwd.ja.txt"),
        ("C:\\Users\\me\\映画.vtt", "映画.ja.vtt"),
        ('a"\n<b>\u202e.txt', "ab.ja.txt"),
        (".txt", "text.ja.txt"),
        ("x" * 500 + ".txt", f"{'x' * 80}.ja.txt"),
    ],
)
def test_translation_is_named_after_its_file(name: str, made: str) -> None:
    assert read(name, b"0:01 --> 0:02\ntext").renamed("ja") == made


@given(
    st.lists(
        st.sampled_from(
            ["1", "00:01 --> 00:02", "Hello.", "- a b", "", "WEBVTT", "```", "\r", "é"]
        ),
        max_size=40,
    ).map("\n".join),
    st.sampled_from(["a.txt", "a.srt", "a.vtt"]),
)
def test_untranslated_file_is_written_as_it_was(text: str, name: str) -> None:
    data = text.encode()
    document = documents.read(name, base64.b64encode(data).decode(), LIMIT)
    if isinstance(document, Refusal):
        return
    assert written(document, document.text) == data
    made = pieces.cut(document.text, 60)
    assert written(document, "".join(one.text for one in made)) == data
