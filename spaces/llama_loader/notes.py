"""What the store tells a person, in words: each with what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_loader.events import Note

if TYPE_CHECKING:
    from pathlib import Path


def archive_not_pinned(url: str, digest: str) -> Note:
    """Nothing says which bytes the archive must have."""
    return Note(
        "UNVERIFIED",
        f"{url} is not pinned: these bytes are run as they came; their sha256 is {digest}",
        f"set YAKULINGO_SPACES_LLAMA_CPP_SHA256={digest}",
    )


def manifest_not_pinned(url: str, digest: str) -> Note:
    """Nothing says which bytes the manifest must have."""
    return Note(
        "MANIFEST_NOT_PINNED",
        f"manifest {url} is not pinned; its sha256 is {digest}",
        f"set YAKULINGO_SPACES_LLAMA_CPP_MANIFEST_SHA256={digest}",
    )


def store_temporary(usual: Path, why: OSError, instead: Path) -> Note:
    """The usual store cannot be written."""
    return Note(
        "STORE_TEMPORARY",
        f"{usual} cannot be written ({why.strerror}); installing to {instead}, "
        "which is gone with this machine's temporary files",
        "set HF_HOME or --store to a folder that can be written",
    )
