"""A Hub that is silent in the middle of a download."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from llama_loader import model, self_test
from llama_loader.events import Note
from llama_loader.settings import load
from tests.rigs.hub import Hub, serving

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


class Slow(Hub):
    """Answers after a while."""

    def judge(self, path: str, authorization: str | None) -> tuple[int, str, bytes]:
        time.sleep(0.5)
        return super().judge(path, authorization)


def test_download_of_which_no_byte_comes_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = self_test.MODEL.read_bytes()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(model, "_SILENCE", 0.1)
    told: list[object] = []
    with serving(Slow(files={"m.gguf": content})) as hub:
        variables = {"GGUF_REPO_ID": "me/model", "GGUF_FILENAME": "m.gguf"}
        names = {f"YAKULINGO_SPACES_{name}": value for name, value in variables.items()}
        wanted = load(environ={"HOME": str(tmp_path), "HF_ENDPOINT": hub.url, **names})
        assert model.get(wanted, sink=told.append).read_bytes() == content
    notes = [event for event in told if isinstance(event, Note)]
    assert {(note.code, note.message) for note in notes} == {
        ("DOWNLOAD_SILENT", "no byte of me/model/m.gguf has come for 0.1 s")
    }
