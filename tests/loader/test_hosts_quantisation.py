"""A model by its repository and quantisation, as llama.cpp's ``-hf`` takes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from llama_loader import self_test
from llama_loader.errors import SettingError
from llama_loader.settings import load
from tests.loader.test_model import from_hub, path_from_hub
from tests.rigs.hub import Hub, serving

if TYPE_CHECKING:
    from pathlib import Path

BYTES = self_test.MODEL.read_bytes()
NAMES = (
    "m.i1-Q4_K_M.gguf",
    "m-Q4_K_S.gguf",
    "mmproj-Q8_0.gguf",
    "Q8_0/m-Q8_0-00001-of-00002.gguf",
    "Q8_0/m-Q8_0-00002-of-00002.gguf",
    "README-Q4_K_M.md",
    "m-IQ4_K_M.gguf",
)
AT_HAND = "from llama_loader import model, settings;print(model.at_hand(settings.load()))"


@pytest.mark.parametrize(
    ("wanted", "file"),
    [("Q4_K_M", NAMES[0]), ("q4_k_m", NAMES[0]), ("Q4_K_S", NAMES[1]), ("Q8_0", NAMES[3])],
)
def test_quantisation_names_the_file_that_is_fetched(
    tmp_path: Path, wanted: str, file: str
) -> None:
    with serving(Hub(files=dict.fromkeys(NAMES, BYTES))) as hub:
        repo = f"me/model:{wanted}"
        assert from_hub(hub, tmp_path, AT_HAND, GGUF_REPO_ID=repo, GGUF_FILENAME="") == "None"
        path = path_from_hub(hub, tmp_path, GGUF_REPO_ID=repo, GGUF_FILENAME="")
    assert str(path).endswith(f"/{file}")
    offline = {"GGUF_REPO_ID": repo, "GGUF_FILENAME": "", "OFFLINE": "1"}
    assert path_from_hub(hub, tmp_path, **offline) == path
    assert from_hub(hub, tmp_path, AT_HAND, **offline) == str(path)


def test_quantisation_that_the_repository_does_not_have_is_told_with_those_that_it_has(
    tmp_path: Path,
) -> None:
    with (
        serving(Hub(files=dict.fromkeys(NAMES, BYTES))) as hub,
        pytest.raises(AssertionError, match=r"no GGUF file of Q2_K; there are: m\.i1-Q4_K_M"),
    ):
        path_from_hub(hub, tmp_path, GGUF_REPO_ID="me/model:Q2_K", GGUF_FILENAME="")


def test_quantisation_beside_a_file_is_a_conflict() -> None:
    given = {"YAKULINGO_SPACES_GGUF_REPO_ID": "me/model:Q4_K_M", "HOME": "/nowhere"}
    assert load(environ=given).gguf_repo_id == "me/model:Q4_K_M"
    with pytest.raises(SettingError, match="names a quantisation") as caught:
        load(environ={**given, "YAKULINGO_SPACES_GGUF_FILENAME": "m.gguf"})
    assert caught.value.code == "SETTING_CONFLICT"
