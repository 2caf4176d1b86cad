"""What a person sees of three sets: real builds, on terminals of two widths and in a file."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import terminal
from needs import must_or_skip
from verbs import INVOKE, PROJECT, invoke

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


def test_no_colour_where_none_is_wanted(tmp_path: Path) -> None:
    status, written = terminal.run(command(tmp_path, "local"), 80, environment(NO_COLOR="1"))
    assert status == 0, written
    assert not terminal.has_colour(written)
    assert "3 of 3 sets" in written


def test_a_set_that_fails_is_told_and_the_estimate_is_of_the_others(tmp_path: Path) -> None:
    status, written = terminal.run(command(tmp_path, "local", "second"), 80, environment())
    lines = terminal.lines(written)
    assert status == 1
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


def test_a_second_run_of_a_set_ends_at_once_with_one_line(tmp_path: Path) -> None:
    """Two real verbs, one source that is held in its build, one folder of tarballs."""
    tree, go = tmp_path / "llama.cpp", tmp_path / "go"
    shutil.copytree(PROJECT / "tests" / "rigs" / "tiny_llama", tree)
    wait = f"while [ ! -e {go} ]; do sleep 0.1; done"
    with (tree / "CMakeLists.txt").open("a", encoding="utf-8") as file:
        file.write(f'\nadd_custom_target(held ALL COMMAND sh -c "{wait}" VERBATIM)\n')
        file.write("add_dependencies(llama-cli held)\n")
    argv = ("build-cpu", "--engine", "local", "--source", str(tree), "--out", f"{tmp_path}/dist")
    argv += ("--patches", "none")
    with subprocess.Popen(
        [*INVOKE, *argv], cwd=PROJECT, stderr=subprocess.PIPE, text=True
    ) as first:
        assert first.stderr is not None
        try:
            begun = next(line for line in first.stderr if line.startswith("cpu-cpu compile"))
            second = invoke(*argv)
        finally:
            go.touch()
        assert first.wait(120) == 0, begun + first.stderr.read()
    assert second.returncode == 1
    error, hint = second.stderr.splitlines()[-2:]
    assert error.startswith("error[SET_IS_BEING_BUILT]: cpu-cpu is being built into ")
    assert error.endswith(f"by process {first.pid}")
    assert hint.startswith("hint: wait for that run")
    assert sorted(path.suffix for path in (tmp_path / "dist").glob(".*")) == []
    assert (tmp_path / "dist" / "manifest.json").is_file()


def test_the_error_of_a_set_that_was_alone_is_said_once(tmp_path: Path) -> None:
    tree = shutil.copytree(PROJECT / "tests" / "rigs" / "tiny_llama", tmp_path / "llama.cpp")
    (tree / "plugin.c").write_text("int broken( {\n", "utf-8")
    options = ("--engine", "local", "--source", str(tree), "--out", str(tmp_path / "dist"))
    options += ("--patches", "none")
    failed = invoke("build-cpu", *options)
    assert failed.returncode == 1
    assert failed.stderr.count("error[COMPILE_FAILED]") == 1
