"""How much memory a start takes: the model, and what a person gives llama-server after ``--``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from llama_loader import extra_arguments, gguf_header
from llama_loader.gguf_header import ModelSize

if TYPE_CHECKING:
    from collections.abc import Sequence


def measure(model: Path, n_ctx: int, extra: Sequence[str] = ()) -> ModelSize | None:
    """Size a start; None where the model cannot be read as GGUF.

    Args:
        model: the GGUF file.
        n_ctx: tokens, unless ``extra`` has another number.
        extra: arguments after ``--``. A draft model and a projector count where they can be read;
            cache types and layers that are kept from the GPU do not: the figure errs to the safe
            side.
    """
    given = tuple(extra)
    tokens = _context(given, n_ctx)
    size = gguf_header.measure(model, tokens)
    if size is None:
        return None
    draft = _named(given, "-md", "--model-draft", "--spec-draft-model")
    beside = gguf_header.measure(draft, tokens) if draft else None
    projector = _named(given, "-mm", "--mmproj")
    return ModelSize(
        size.file + (beside.file if beside else 0) + (_bytes(projector) if projector else 0),
        size.context + (beside.context if beside else 0),
    )


def _context(extra: tuple[str, ...], n_ctx: int) -> int:
    """Return the tokens that llama-server will take; 0 is what the model was trained for."""
    text = extra_arguments.last(extra, "-c", "--ctx-size") or ""
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text, re.ASCII) else n_ctx


def _named(extra: tuple[str, ...], *options: str) -> Path | None:
    text = extra_arguments.last(extra, *options)
    return Path(text) if text else None


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except (OSError, ValueError):  # llama-server says so
        return 0
