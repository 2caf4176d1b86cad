"""What the Hub reads of the Space: its front matter and its requirements."""

import re
from pathlib import Path
from typing import Any

import gradio
import huggingface_hub
import pytest

from llama_loader import settings

SPACE = Path(__file__).parents[2] / "spaces"
KNOWN = {
    # https://huggingface.co/docs/hub/spaces-config-reference
    *("title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "python_version"),
    *("app_file", "pinned", "license", "short_description", "suggested_hardware"),
    *("startup_duration_timeout", "models", "preload_from_hub", "tags"),
}
COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}


@pytest.fixture(scope="module")
def card() -> dict[str, Any]:
    loaded = huggingface_hub.RepoCard.load(SPACE / "README.md")
    found: dict[str, Any] = loaded.data.to_dict()
    return found


def test_the_front_matter_has_only_what_the_hub_knows(card: dict[str, Any]) -> None:
    assert set(card) <= KNOWN
    assert {card["colorFrom"], card["colorTo"]} <= COLOURS
    assert len(card["short_description"]) <= 60
    assert re.fullmatch(r"[0-9]+(s|m|h)", card["startup_duration_timeout"])


def test_it_is_a_gradio_space_for_zerogpu(card: dict[str, Any]) -> None:
    assert card["sdk"] == "gradio"
    assert card["sdk_version"] == gradio.__version__
    assert card["python_version"] == "3.12"
    assert (SPACE / card["app_file"]).is_file()
    hardware = {one.value for one in huggingface_hub.SpaceHardware}
    assert card["suggested_hardware"] in hardware
    assert card["suggested_hardware"] == huggingface_hub.SpaceHardware.ZERO_A10G.value


def test_the_default_model_is_preloaded(card: dict[str, Any]) -> None:
    assert card["models"] == [settings.DEFAULT_REPO]
    assert card["preload_from_hub"] == [f"{settings.DEFAULT_REPO} {settings.DEFAULT_FILE}"]


def test_what_every_space_brings_is_not_listed() -> None:
    lines = (SPACE / "requirements.txt").read_text().splitlines()
    names = {re.split(r"[^\w.-]", line.strip())[0].lower() for line in lines if line.strip()}
    assert names.isdisjoint({"gradio", "spaces", "huggingface_hub", "huggingface-hub"})


def test_every_variable_that_the_readme_names_is_one(card: dict[str, Any]) -> None:
    del card
    named = set(re.findall(r"YAKULINGO_SPACES_\w+", (SPACE / "README.md").read_text()))
    real = {row.variable for row in settings._FIELDS.values()}
    assert named
    assert named <= real
