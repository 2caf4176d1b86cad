import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
TABLE = TESTS.parent / "docs" / "threats.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TABLE.read_text("utf-8").splitlines()
    if line.startswith("| ")
]


def test_every_test_that_the_threats_name_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", TABLE.read_text("utf-8")))
    sources = [path.read_text("utf-8") for path in TESTS.rglob("test_*.py")]
    there = {name for text in sources for name in re.findall(r"def (test_\w+)", text)}
    assert len(named) > 40
    assert named - there == set()


def test_a_threat_without_a_test_says_what_is_left() -> None:
    threats = [row for row in ROWS if row[0] not in {"attacker", "---"}]
    assert len(threats) > 20
    for row in threats:
        assert "`test_" in row[3] or row[4], row[1]
