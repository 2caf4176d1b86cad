"""One release, built once in a real container, for all the tests of this folder."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent.parent
INVOKE = (sys.executable, "-m", "invoke")


def invoke(*argv: str, timeout: float = 3000) -> subprocess.CompletedProcess[str]:
    """Run an invoke verb as a person would, from the project's root."""
    return subprocess.run(
        [*INVOKE, *argv], cwd=PROJECT, capture_output=True, text=True, timeout=timeout, check=False
    )


def succeed(*argv: str, timeout: float = 3000) -> str:
    """Run an invoke verb that must succeed; returns what it printed."""
    done = invoke(*argv, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@dataclass(frozen=True)
class Release:
    """A folder with a built release, and what the build printed."""

    folder: Path
    log: str


@pytest.fixture(scope="session")
def engine() -> str:
    """A Docker engine that answers; its absence fails where CI demands it, else skips."""
    from farm.engines.docker import connect
    from farm.errors import EngineError

    try:
        version: str = connect().version()["Version"]
    except EngineError as error:
        if os.environ.get("FARM_REQUIRE_ALL") == "1":
            pytest.fail(error.render())
        pytest.skip(f"no Docker engine: {error.message}")
    return version


@pytest.fixture(scope="session")
def base_image(engine: str) -> str:
    """The Debian 12 devel image, made from the distribution's packages."""
    del engine
    tag = "llama-farm-base:bookworm"
    succeed("base-image", "--line", "cpu", "--tag", tag)
    return tag


@pytest.fixture(scope="session")
def cpu_release(base_image: str, tmp_path_factory: pytest.TempPathFactory) -> Release:
    """The cpu set of the pinned llama.cpp, compiled in a container."""
    folder = tmp_path_factory.mktemp("release")
    log = succeed("build-cpu", "--engine", "docker", "--image", base_image, "--out", str(folder))
    return Release(folder, log)
