"""The page's colours: letters can be read on every surface, in light and in dark."""

import re

import pytest
from verbs import PROJECT

STYLE = (PROJECT / "spaces/translator/style.css").read_text()
LEAST = 4.5
"""WCAG 2.2, success criterion 1.4.3 (AA), for letters of any size."""
LETTERS = ("ink", "ink-2", "ink-3", "indigo", "loud", "good", "amber")
SURFACES = ("sheet", "desk")
PAIRS = [
    *((letters, surface) for letters in LETTERS for surface in SURFACES),
    *((letters, "wash") for letters in ("ink", "ink-2", "indigo")),
    *((letters, "loud-wash") for letters in ("ink", "ink-2", "loud", "indigo")),
    ("amber", "amber-wash"),
    *(("on-indigo", "indigo"), ("on-indigo", "indigo-2"), ("sheet", "loud")),
]


def colours(scheme: str) -> dict[str, str]:
    """The variables of a scheme; dark has those of light where it sets none."""
    light, dark = STYLE.split("/* gradio's own surfaces", 1)[0].split(".dark .gradio-container", 1)
    found = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", light))
    if scheme == "dark":
        found |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", dark))
    return found


def luminance(colour: str) -> float:
    parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("letters", "surface"), PAIRS)
def test_letters_stand_out(scheme: str, letters: str, surface: str) -> None:
    named = colours(scheme)
    dark, light = sorted((luminance(named[letters]), luminance(named[surface])))
    assert (light + 0.05) / (dark + 0.05) >= LEAST


def test_nothing_on_the_page_is_fetched_from_elsewhere() -> None:
    script = (PROJECT / "spaces/translator/page.js").read_text()
    assert not re.search(r"url\(|@import|https?://", STYLE + script)
