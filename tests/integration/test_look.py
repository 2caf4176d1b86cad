"""What a person sees of three sets: real builds, on terminals of two widths and in a file."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import terminal
from needs import must_or_skip
from verbs import PROJECT, invoke

pytestmark = pytest.mark.timeout(600)

SETS = ("cpu-first", "cpu-second", "cpu-third")
COUNTED = re.compile(r"[1-9]\d*/[1-9]\d*")
ABOUT = re.compile(r", about (\d+:)?\d+:\d\d left")


@pytest.fixture(autouse=True)
def compiler() -> None:
    if shutil.which("g++") is None:
        must_or_skip("no g++")


def command(folder: Path, *argv: str) -> list[str]:
    rig = PROJECT / "tests" / "rigs" / "three_sets.py"
    return [sys.executable, "-W", "ignore", str(rig), str(folder), *argv]


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in {"NO_COLOR", "FORCE_COLOR", "COLUMNS"}}
    return {**kept, "PYTHONPATH": f"{PROJECT}:{PROJECT / 'spaces'}", **more}


@pytest.mark.parametrize(("engine", "columns"), [("local", 80), ("dask", 200)])
def test_a_terminal_shows_every_set_its_step_counter_and_the_end(
    tmp_path: Path, engine: str, columns: int
) -> None:
    status, written = terminal.run(command(tmp_path, engine), columns, environment())
    lines = terminal.lines(written)
    assert status == 0, written
    assert [line for line in lines if len(line) > columns] == []
    titles = [line for line in lines if " of 3 sets" in line]
    assert titles[0].startswith("0 of 3 sets")
    assert titles[-1].startswith("3 of 3 sets")
    assert any(ABOUT.search(title) for title in titles), "the estimated end"
    assert not ABOUT.search(titles[-1])
    rows = {name: [line for line in lines if line.startswith(name)] for name in SETS}
    assert any("waiting" in row for row in rows["cpu-third"])
    for shown in rows.values():
        assert "built" in shown[-1]
        # what a host tells of a set that takes a second may come after the set
        counted = any("compile" in row and COUNTED.search(row) for row in shown)
        assert counted or engine == "dask"
    assert any("worker " in row for row in rows["cpu-first"]) is (engine == "dask")
    assert terminal.has_colour(written)
    assert written.endswith("\n")
    assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l"), "the cursor is shown again"


def test_a_set_that_fails_is_told_without_colour_where_none_is_wanted(tmp_path: Path) -> None:
    argv = command(tmp_path, "local", "second")
    status, written = terminal.run(argv, 80, environment(NO_COLOR="1"))
    lines = terminal.lines(written)
    assert status == 1
    assert not terminal.has_colour(written)
    assert [line for line in lines if len(line) > 80 and not line.startswith("log: ")] == []
    assert any("unknown target 'no-such-target'" in line for line in lines)
    assert "failed" in [line for line in lines if line.startswith("cpu-second ")][-1]
    assert "built" in [line for line in lines if line.startswith("cpu-third ")][-1]


def test_a_dumb_terminal_gets_plain_lines(tmp_path: Path) -> None:
    status, written = terminal.run(command(tmp_path, "local"), 80, environment(), kind="dumb")
    written = written.replace("\r\n", "\n")  # what the terminal's driver makes of the end of a line
    assert status == 0, written
    assert not terminal.has_control(written)
    lines = written.splitlines()
    for name in SETS:
        assert any(line.startswith(f"{name} configure") for line in lines)
        assert any(line.startswith(f"{name} compile [") for line in lines)
        assert any(line.startswith(f"{name}: built") for line in lines)


def test_the_error_of_a_set_that_was_alone_is_said_once(tmp_path: Path) -> None:
    tree = shutil.copytree(PROJECT / "tests" / "rigs" / "tiny_llama", tmp_path / "llama.cpp")
    (tree / "plugin.c").write_text("int broken( {\n", "utf-8")
    options = ("--engine", "local", "--source", str(tree), "--out", str(tmp_path / "dist"))
    options += ("--patches", "none")
    failed = invoke("build-cpu", *options)
    assert failed.returncode == 1
    assert failed.stderr.count("error[COMPILE_FAILED]") == 1
