"""Names: what the documents name exists, no two classes share one; and every threat is answered."""

import re
from collections import Counter

import pytest
from verbs import PROJECT

DOCS = PROJECT / "docs"
TESTS = {
    name
    for path in (PROJECT / "tests").rglob("test_*.py")
    for name in re.findall(r"def (test_\w+)", path.read_text("utf-8"))
}
ARCHITECTURE = (DOCS / "architecture.md").read_text("utf-8")
PATHS = sorted(set(re.findall(r"`((?:spaces|farm|build|tests)/[\w/.-]+)`", ARCHITECTURE)))
MODULES = sorted(set(re.findall(r"\w: ([a-z_]+\.py)", ARCHITECTURE)))


@pytest.mark.parametrize(("page", "least"), [("faults", 60), ("threats", 40), ("hosts", 20)])
def test_every_test_that_a_table_names_exists(page: str, least: int) -> None:
    named = set(re.findall(r"`(test_\w+)`", (DOCS / f"{page}.md").read_text("utf-8")))
    assert len(named) > least
    assert named - TESTS == set()


@pytest.mark.parametrize("path", PATHS)
def test_path_that_the_architecture_names_exists(path: str) -> None:
    assert len(PATHS) >= 15
    assert (PROJECT / path).exists()


@pytest.mark.parametrize("module", MODULES)
def test_module_of_a_start_exists_in_the_loader(module: str) -> None:
    assert len(MODULES) >= 7
    assert (PROJECT / "spaces/llama_loader" / module).is_file()


def test_the_table_has_every_row_of_the_bytes() -> None:
    faults = (DOCS / "faults.md").read_text("utf-8")
    rows = re.findall(r"^\| ([\d, ]+) \|", faults, re.MULTILINE)
    assert set(range(1, 109)) <= {int(number) for row in rows for number in row.split(",")}


def test_a_threat_without_a_test_says_what_is_left() -> None:
    table = (DOCS / "threats.md").read_text("utf-8")
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ")]
    threats = [row for row in rows if row[0].strip() not in {"attacker", "---"}]
    assert len(threats) > 20
    for row in threats:
        assert "`test_" in row[3] or row[4].strip(), row[1]


def test_no_two_classes_share_a_name() -> None:
    sources = [path for half in ("farm", "spaces") for path in (PROJECT / half).rglob("*.py")]
    texts = [path.read_text("utf-8") for path in sources]
    names = Counter(name for text in texts for name in re.findall(r"(?m)^ *class (\w+)[(:]", text))
    assert len(names) > 200
    assert [name for name, count in names.items() if count > 1] == []
