"""An archive for the loader, whose ``llama-server`` is the impostor (impostor_server.py)."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

_SOURCE = Path(__file__).with_name("impostor_server.py")


def write(archive: Path, **behaviour: Any) -> None:
    """Write a ``.tar.gz`` whose server does what ``behaviour`` says."""
    with tarfile.open(archive, "w:gz") as tar:
        _add(tar, "bin/llama-server", f"#!{sys.executable} -IS\n{_SOURCE.read_text()}", 0o755)
        _add(tar, "bin/behaviour.json", json.dumps(behaviour), 0o644)
        _add(tar, "bin/libggml-cpu-x64.so", "", 0o644)


def _add(tar: tarfile.TarFile, name: str, text: str, mode: int) -> None:
    entry, content = tarfile.TarInfo(name), text.encode()
    entry.size, entry.mode = len(content), mode
    tar.addfile(entry, io.BytesIO(content))


def starts(store: Path) -> int:
    """How often the impostor was started from a store, for whatever purpose."""
    return sum(len(path.read_text().splitlines()) for path in (store / "runtimes").rglob("starts"))
