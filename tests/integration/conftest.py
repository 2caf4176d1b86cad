"""What tests of sets on many hosts share."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from spread_run import TINY, Held

from farm import pipeline
from farm.request import BuildRequest


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    made = Held(tmp_path / "held")
    made.folder.mkdir()
    shutil.copytree(TINY, made.tree)
    wait = made.folder / "wait"
    wait.write_text(
        f"#!/bin/sh\necho begun >> {made.folder}/begun\n"
        f"while [ ! -e {made.folder}/go ]; do sleep 0.1; done\n"
    )
    wait.chmod(0o755)
    with (made.tree / "CMakeLists.txt").open("a", encoding="utf-8") as file:
        file.write(f'\nadd_custom_target(held ALL COMMAND "{wait}")\n')
        file.write("add_dependencies(llama-cli held)\n")
    yield made
    made.let_go()


@pytest.fixture
def request_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuildRequest:
    monkeypatch.setattr(pipeline, "STATE", tmp_path / "state")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CCACHE_DIR", str(tmp_path / "ccache"))
    return BuildRequest(engine="dask", worker_engine="local", out=tmp_path / "out")
