import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
TABLE = TESTS.parent / "docs" / "faults.md"


def test_every_test_that_the_table_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", TABLE.read_text()))
    sources = [path.read_text() for path in TESTS.rglob("test_*.py")]
    there = {name for text in sources for name in re.findall(r"def (test_\w+)", text)}
    assert len(named) > 60
    assert named - there == set()


def test_the_table_has_every_row_of_the_bytes() -> None:
    rows = re.findall(r"^\| ([\d, ]+) \|", TABLE.read_text(), re.MULTILINE)
    numbers = {int(number) for row in rows for number in row.split(",")}
    assert set(range(1, 109)) <= numbers
