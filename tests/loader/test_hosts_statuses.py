"""A mirror that answers with a status alone, without the Hub's own words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from llama_loader import model
from llama_loader.errors import LoaderError
from llama_loader.settings import load
from tests.rigs.hub import Hub, serving

if TYPE_CHECKING:
    from pathlib import Path


class Mirror(Hub):
    """Answers everything with one status."""

    status = 0

    def judge(self, path: str, authorization: str | None) -> tuple[int, str, bytes]:
        del path, authorization
        return self.status, "", b""


@pytest.mark.parametrize(
    ("answer", "code", "exit_status", "words"),
    [
        (404, "FILE_NOT_FOUND", 2, "YAKULINGO_SPACES_GGUF_FILENAME"),
        (401, "HUB_REFUSED", 3, "HF_TOKEN"),
        (403, "HUB_REFUSED", 3, "HF_TOKEN"),
        (418, "HUB_UNREACHABLE", 3, "try again"),
    ],
)
def test_what_a_mirror_refuses_is_told_as_what_it_is(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: int,
    code: str,
    exit_status: int,
    words: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(Mirror, "status", answer)
    with serving(Mirror()) as mirror:
        wanted = load(environ={"HOME": str(tmp_path), "HF_ENDPOINT": mirror.url})
        with pytest.raises(LoaderError) as caught:
            model.get(wanted)
    error = caught.value
    assert (error.code, error.exit_status) == (code, exit_status)
    assert words in error.hint
    assert str(answer) in error.message
