"""Archives and folders whose ``llama-server`` is the impostor (impostor_server.py)."""

import io
import json
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PROGRAM = f"#!{sys.executable} -IS\n{Path(__file__).with_name('impostor_server.py').read_text()}"


def write(archive: Path, **behaviour: Any) -> None:
    """Write a ``.tar.gz`` whose server does what ``behaviour`` says."""
    with tarfile.open(archive, "w:gz") as tar:
        _add(tar, "bin/llama-server", _PROGRAM, 0o755)
        _add(tar, "bin/behaviour.json", json.dumps(behaviour), 0o644)
        _add(tar, "bin/libggml-cpu-x64.so", "", 0o644)


def _add(tar: tarfile.TarFile, name: str, text: str, mode: int) -> None:
    entry, content = tarfile.TarInfo(name), text.encode()
    entry.size, entry.mode = len(content), mode
    tar.addfile(entry, io.BytesIO(content))


def starts(store: Path) -> int:
    """How often the impostor was started from a store, for whatever purpose."""
    return sum(len(path.read_text().splitlines()) for path in (store / "runtimes").rglob("starts"))


@dataclass(frozen=True)
class Impostor:
    """A folder whose ``llama-server`` does what ``behave`` says (rigs/impostor_server.py)."""

    folder: Path

    def behave(self, **behaviour: Any) -> Path:
        """Set what it does; returns the folder, as a runtime."""
        (self.folder / "behaviour.json").write_text(json.dumps(behaviour))
        return self.folder

    def seen(self) -> dict[str, Any]:
        """What the last one saw: ``argv``, ``environ``, ``pid``, ``cwd``."""
        found: dict[str, Any] = json.loads((self.folder / "seen.json").read_text())
        return found

    def starts(self) -> int:
        """How often it was started."""
        return len((self.folder / "starts").read_text().splitlines())


def folder(place: Path) -> Impostor:
    """Make a folder with the impostor."""
    place.mkdir()
    program = place / "llama-server"
    program.write_text(_PROGRAM)
    program.chmod(0o755)
    return Impostor(place)
