"""docs/architecture.md names modules, folders and verbs: each of them exists."""

import re

import pytest
from verbs import PROJECT

PAGE = (PROJECT / "docs/architecture.md").read_text("utf-8")
PATHS = sorted(set(re.findall(r"`((?:spaces|farm|build|tests)/[\w/.-]+)`", PAGE)))
MODULES = sorted(set(re.findall(r"\w: ([a-z_]+\.py)", PAGE)))


@pytest.mark.parametrize("path", PATHS)
def test_named_path_exists(path: str) -> None:
    assert (PROJECT / path).exists()


@pytest.mark.parametrize("module", MODULES)
def test_module_of_a_start_exists_in_the_loader(module: str) -> None:
    assert (PROJECT / "spaces/llama_loader" / module).is_file()


def test_page_names_at_least_twelve_changes_and_ten_terms() -> None:
    terms, changes = (
        part.count("\n| ") - 2 for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[-2:]
    )
    assert terms >= 10
    assert changes >= 12
    assert len(PATHS) >= 15
    assert len(MODULES) >= 7
