"""A GPU, a CUDA release and a model: what these tests need, and what they say where it is not."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llama_loader import host, settings
from llama_loader.host import HostFacts
from tests.rigs.heard import heard

SPACES = Path(__file__).parent.parent.parent / "spaces"


@pytest.fixture(scope="session")
def machine() -> HostFacts:
    facts = host.detect(settings.load())
    if not facts.gpus or facts.gpu_source == "zerogpu":
        pytest.skip("no NVIDIA GPU here")
    return facts


@pytest.fixture(scope="session")
def release(machine: HostFacts) -> Path:
    del machine  # without a GPU there is nothing to run it on
    folder = os.environ.get("FARM_GPU_RELEASE")
    if not folder:
        pytest.skip("FARM_GPU_RELEASE names no release folder; `nox -s gpu` builds one")
    return Path(folder)


@pytest.fixture(scope="session")
def model() -> Path:
    return Path(os.environ["FARM_GPU_MODEL"])


class Loader:
    """The loader as a person calls it, with one store for all tests."""

    def __init__(self, release: Path, store: Path) -> None:
        self.options = (
            *("--manifest", (release / "manifest.json").resolve().as_uri()),
            *("--store", str(store)),
        )
        self._warnings = (store.parent / "stderr").open("a+")

    def run(self, command: str, *argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return heard(
            self._command(command, *argv),
            env={**os.environ, "PYTHONPATH": _path(), **variables},
            timeout=300,
        )

    def json(self, command: str, *argv: str, **variables: str) -> Any:
        done = self.run(command, *argv, "--json", **variables)
        return json.loads(done.stdout)

    @contextmanager
    def serving(self, model: Path, *argv: str, **variables: str) -> Iterator[dict[str, Any]]:
        self._warnings.truncate(0)
        process = subprocess.Popen(
            self._command("serve", "--model", str(model), "--json", "--no-key", *argv),
            env={**os.environ, "PYTHONPATH": _path(), **variables},
            stdout=subprocess.PIPE,
            stderr=self._warnings,
            text=True,
        )
        try:
            assert process.stdout is not None
            told: dict[str, Any] = json.loads(process.stdout.readline())
            assert process.stdout.readline().startswith("ready ")
            yield told
        finally:
            process.terminate()
            process.communicate(timeout=30)

    def warnings(self) -> str:
        """What the last server's loader said on stderr."""
        self._warnings.seek(0)
        return self._warnings.read()

    def close(self) -> None:
        self._warnings.close()

    def _command(self, command: str, *argv: str) -> list[str]:
        # the loader's own options come before what is for llama-server
        return [sys.executable, "-m", "llama_loader", command, *self.options, *argv]


def _path() -> str:
    return f"{SPACES}:{os.environ.get('PYTHONPATH', '')}"


@pytest.fixture(scope="session")
def loader(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loader]:
    made = Loader(release, tmp_path_factory.mktemp("gpu") / "store")
    yield made
    made.close()
