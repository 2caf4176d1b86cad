"""Source trees that are kept in the cache: used only where they still are what was put there."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from farm import durable, run_lock
from farm.inputs.packages import cache_folder
from farm.kept.folder_digest import folder_digest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def kept(key: str, make: Callable[[Path], None]) -> tuple[Path, str | None]:
    """Return a tree of the cache, made where it is not there or not what was recorded of it.

    Args:
        key: names everything that decides the tree's content.
        make: makes the tree as the new folder that it is given.

    Returns:
        The tree, and a line for a person where a changed one was made again.

    Raises:
        FarmError: what ``make`` raises; ``OUT_NOT_WRITABLE`` or ``WRITE_FAILED``.
    """
    sources = cache_folder("sources")
    tree, record = sources / key, sources / f"{key}.sha256"
    with run_lock.turn(sources, key):
        note = None
        if tree.is_dir():
            recorded = record.read_bytes() if record.is_file() else None
            if recorded == _digest(tree):
                return tree, None
            if recorded is not None:  # else it was cut off between the two
                note = f"note[SOURCE_CHANGED]: {tree} was changed by somebody; it is made again"
            shutil.rmtree(tree)
        make(tree)
        with durable.writing(record):
            durable.replace(record, _digest(tree))
    return tree, note


def _digest(tree: Path) -> bytes:
    return folder_digest(tree).encode()
