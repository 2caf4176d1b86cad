"""Small files in which the kernel says what this machine is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def read(path: Path) -> str:
    """Return a file's text, empty where it is not there or may not be read."""
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""
