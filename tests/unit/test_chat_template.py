"""The chat template in a GGUF header."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguf
import pytest

from llama_loader import gguf_header

if TYPE_CHECKING:
    from pathlib import Path


def written(path: Path, template: str | None) -> Path:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_token_list(["a", "b"])
    writer.add_block_count(7)
    if template is not None:
        writer.add_chat_template(template)
    writer.add_context_length(128)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("template", ["{{ messages }}", "訳" * 300])
def test_the_template_is_read_as_it_is(tmp_path: Path, template: str) -> None:
    assert gguf_header.chat_template(written(tmp_path / "m.gguf", template)) == template


def test_a_model_without_one_has_none(tmp_path: Path) -> None:
    assert gguf_header.chat_template(written(tmp_path / "m.gguf", None)) is None


def test_what_cannot_be_read_has_none(tmp_path: Path) -> None:
    whole = written(tmp_path / "m.gguf", "{{ messages }}").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (0, 3, 20, len(whole) // 2):
        cut.write_bytes(whole[:length])
        assert gguf_header.chat_template(cut) is None
    assert gguf_header.chat_template(tmp_path / "nowhere.gguf") is None
