"""Variables that the Hub's client, or a library of it, reads too."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from llama_loader.settings import load

if TYPE_CHECKING:
    import pytest


def test_old_name_of_the_token_counts_after_the_new_one() -> None:
    old = {"HUGGING_FACE_HUB_TOKEN": "hf_old", "HOME": "/nowhere"}
    assert load(environ=old).hf_token == "hf_old"
    assert load(environ={**old, "HF_TOKEN": "hf_new"}).hf_token == "hf_new"
    assert load(environ={**old, "HUGGING_FACE_HUB_TOKEN": " "}).hf_token is None


def test_empty_variable_of_the_progress_bars_is_gone_before_they_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TQDM_MININTERVAL", "")
    load()
    assert "TQDM_MININTERVAL" not in os.environ
