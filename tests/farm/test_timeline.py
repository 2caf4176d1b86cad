from xml.etree import ElementTree as ET

import pytest

from farm.terminal.timeline import Span, rows, seconds, svg

SPANS = (
    Span("source", "farm", 1.5, 37_700_000),
    Span("build", "farm", 613.0),
    Span("fetch & verify", "loader", 0.04, 9_800_000),
    Span("first token", "server", 0.61),
)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0004, "0 ms"), (0.042, "42 ms"), (0.61, "0.61 s"), (613.2, "613 s")]
)
def test_durations_have_the_digits_that_mean_something(value: float, text: str) -> None:
    assert seconds(value) == text


def test_the_table_has_a_row_for_each_span_and_the_total() -> None:
    lines = rows(SPANS)
    assert len(lines) == len(SPANS) + 1
    assert "37.7 MB" in lines[0]
    assert lines[-1].split() == ["total", "615", "s"]


def test_the_picture_has_every_name_and_figure_and_asks_for_nothing() -> None:
    picture = svg(SPANS, title="a < b")
    texts = [(element.text or "").replace("\xa0", " ") for element in ET.fromstring(picture).iter()]
    assert "a < b" in texts
    told = "\n".join(texts)
    for span in SPANS:
        assert span.name in told
        assert span.figures in told
    assert "http" not in picture.replace("http://www.w3.org/2000/svg", "").replace(
        "https://www.textualize.io", ""
    )
