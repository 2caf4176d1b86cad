"""Every link of a document leads somewhere: its file is in the repository, its heading exists."""

import re
import subprocess
from pathlib import Path

import pytest
from verbs import PROJECT

_LINK = re.compile(r"\]\(([^)\s]+)\)|<(?:a|img|source)[^>]*(?:href|src|srcset)=\"([^\"]+)\"")
_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
FILES = subprocess.run(
    ["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True
).stdout.splitlines()
PAGES = [name for name in FILES if name.endswith(".md")]


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_of_a_document_lead_to_a_file_and_its_heading(page: str) -> None:
    path = PROJECT / page
    links = ["".join(found) for found in _LINK.findall(_CODE.sub("", path.read_text("utf-8")))]
    relative = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in relative if not leads(path, link)] == []


def test_no_text_names_a_document_that_is_not_in_the_repository() -> None:
    absent = re.compile(r"\b(DESIGN|FACTS|FAULTS|REPORTS|SMALLER)(\.md|'s| §| \d|: [a-z-])")
    texts = [name for name in FILES if name.endswith((".py", ".md", ".toml", ".yml"))]
    assert len(texts) > len(PAGES) > 50
    assert [one for one in texts if absent.search((PROJECT / one).read_text("utf-8"))] == []


def leads(page: Path, link: str) -> bool:
    """Tell whether a relative link of a page leads to a file, and to a heading that it has."""
    name, _, heading = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    site = PROJECT / "docs"
    if not target.exists() or (page.is_relative_to(site) and leaves(site, target)):
        return False
    return not heading or heading in anchors(target)


def leaves(site: Path, target: Path) -> bool:
    """Tell whether it is a document that the site does not have: Sphinx refuses such a link."""
    return target.suffix == ".md" and not target.is_relative_to(site)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.strip().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", [name for name in PAGES if name.startswith("docs/ja/")])
def test_japanese_guide_has_the_headings_code_and_rows_of_the_english_one(page: str) -> None:
    japanese, english = PROJECT / page, PROJECT / page.replace("/ja/", "/")
    assert outline(japanese) == outline(english)


def outline(page: Path) -> list[str]:
    """Return what each line of a page begins: a heading of a level, a fence, a row, an item."""
    text = page.read_text("utf-8")
    return re.findall(r"^(#+ |```|\| |- |   - |[0-9]+\. )", text, re.MULTILINE)
