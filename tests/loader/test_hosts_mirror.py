"""A mirror that passes the Hub's headers on, and has no Xet storage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llama_loader import self_test
from tests.loader.test_model import from_hub
from tests.rigs import hub

if TYPE_CHECKING:
    import pytest

BYTES = self_test.MODEL.read_bytes()
TELL = (
    "from llama_loader import model, settings; s = settings.load();"
    "print(model.get(s, sink=lambda e: print(getattr(e, 'code', '-'))))"
)


def test_mirror_that_names_a_xet_storage_and_gives_no_way_to_it_is_asked_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "XET_TOKEN", "/api/xet-read-token?of=another")  # answered with 404
    served = hub.Hub(files={"sub/m.gguf": BYTES}, xet="http://127.0.0.1:9")
    with hub.serving(served):
        told = from_hub(served, tmp_path, TELL).splitlines()
    assert told[0] == "XET_UNREACHABLE"
    assert Path(told[-1]).read_bytes() == BYTES
