"""The local engine: its folders, its compiler cache, the machine of a build."""

import sys
from pathlib import Path

import pytest
from msgspec import structs
from tiny_release import TINY

from farm import (
    source,
    targets,
)
from farm.engines import local, shared_cache
from farm.engines.local import LocalEngine
from farm.errors import EngineError
from farm.plan import BuildPlan, Toolchain
from farm.tarball import build_record
from tests.farm.test_kept import of_this_test
from tests.rigs.heard import script
from tests.rigs.refusals import refused

TABLE = targets.load()


@pytest.fixture(autouse=True)
def private_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_this_test(tmp_path, monkeypatch)


def test_the_folder_of_cmake_is_no_part_of_the_local_engines_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = BuildPlan(TABLE.sets["cpu"], TABLE.line("cpu"), source.from_folder(TINY))
    told = []
    for name in ("one", "two"):
        program = script(tmp_path / name / "cmake", "#!/bin/sh\necho cmake version 3.31.10\n")
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
        told.append(LocalEngine().identity(plan))
    assert told[0] == told[1]
    assert "cmake version 3.31.10" in told[0]


def test_a_line_for_another_machine_is_refused_on_this_host_and_named_in_its_tarball() -> None:
    line = structs.replace(TABLE.line("cpu"), machine="aarch64")
    plan = BuildPlan(TABLE.sets["cpu"], line, source.from_folder(TINY))
    with refused("HOST_MACHINE", EngineError, match="is x86_64, and its line is built for aarch64"):
        LocalEngine().identity(plan)
    made = build_record.of(plan, Toolchain("local", "gcc", "4", None))
    record = build_record.decode(build_record.encode(made), what="it")
    assert record.line.machine == "aarch64"
    assert plan.artifact_name.endswith("-linux-aarch64.tar.zst")


def test_a_ccache_that_is_installed_beside_python_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("python", "ccache"):
        script(tmp_path / name, "#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert shared_cache.program() == str(tmp_path / "ccache")


def test_only_folders_that_nobody_holds_are_swept(tmp_path: Path) -> None:
    told: list[str] = []
    (tmp_path / "of-before").mkdir()
    with local.held_folder(tmp_path, "held.") as held:
        local.sweep_folders(tmp_path, told.append)
        assert held.is_dir()
    assert not held.exists()
    left = tmp_path / "left"
    left.mkdir()
    (left / "maker").write_text("another host\n1\n")
    local.sweep_folders(tmp_path, told.append)
    assert told == [f"note[LEFT_BEHIND]: removed {left}, whose maker was killed"]
    assert [path.name for path in tmp_path.iterdir()] == ["of-before"]
