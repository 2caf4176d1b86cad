"""Programs that are started ahead of time, and what becomes of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_loader import processes

SPACES = Path(__file__).parent.parent.parent / "spaces"
ENVIRON = processes.environment({"PATH": os.environ["PATH"]})


def children() -> set[int]:
    """The launchers of this process that wait for an order."""
    told = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    pids = [int(pid) for listed in told for pid in listed.read_text().split()]
    return {pid for pid in pids if b"prctl" in Path(f"/proc/{pid}/cmdline").read_bytes()}


def a_spare_launcher() -> int:
    say("use up a launcher that an earlier test left", Path("/"))
    before = children()
    processes.spawn_soon()
    deadline = time.monotonic() + 5
    while not (more := children() - before):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return more.pop()


def say(text: str, folder: Path) -> tuple[int, bytes]:
    program = processes.spawn(["/bin/echo", text], ENVIRON, folder=folder)
    with program:
        assert program.stdout is not None
        return program.pid, program.stdout.read()


def test_a_waiting_launcher_becomes_the_next_program(tmp_path: Path) -> None:
    pid = a_spare_launcher()
    processes.spawn_soon()  # there is one already
    assert say("a b\nc\udcff", tmp_path) == (pid, b"a b\nc\xff\n")
    assert say("another", tmp_path)[0] != pid


def test_a_launcher_that_was_killed_is_replaced(tmp_path: Path) -> None:
    pid = a_spare_launcher()
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.1)
    other, told = say("all the same", tmp_path)
    assert (other != pid, told) == (True, b"all the same\n")


def test_the_program_sees_its_folder_no_input_and_what_it_was_given(tmp_path: Path) -> None:
    script = "pwd; cat; env -0"
    program = processes.spawn(["/bin/sh", "-c", script], {"ONE": "1 = \n2"}, folder=tmp_path)
    with program:
        assert program.stdout is not None
        seen = program.stdout.read().decode()
    assert seen == f"{tmp_path}\nONE=1 = \n2\0PWD={tmp_path}\0"


def test_nothing_is_run_that_cannot_be_run(tmp_path: Path) -> None:
    program = processes.spawn([str(tmp_path / "no")], ENVIRON, folder=tmp_path)
    with program:
        assert program.stdout is not None
        assert program.stdout.read().endswith(b"/no: cannot execute: No such file or directory\n")
    assert program.returncode == 1


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_an_order_that_was_cut_off_runs_nothing(share: float, tmp_path: Path) -> None:
    order = processes._order(["/bin/touch", str(tmp_path / "run")], ENVIRON, tmp_path)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", processes._LAUNCHER, str(os.getpid())],
        input=order[: int(len(order) * share)],
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert not (tmp_path / "run").exists()


def test_a_launcher_without_an_order_ends_with_its_parent() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(SPACES)!r})\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_processes; print(test_processes.a_spare_launcher())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{done.stdout.strip()}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_child_that_was_forked_meanwhile_does_not_hold_a_start_up() -> None:
    """It has the waiting launcher's standard input open for as long as it lives."""
    script = """
import os, pathlib, select, sys
from llama_loader import processes
launched = processes._launcher()
read, write = os.pipe()
if not os.fork():
    os.close(write)
    os.read(read, 1)  # lives until the parent is done
    os._exit(0)
order = processes._order(["/bin/echo", "hello"], {"PATH": "/bin"}, pathlib.Path("/"))
processes._told(launched, order)
ready = bool(select.select([launched.stdout], [], [], 10)[0])
print(ready, ready and launched.stdout.read())
os.close(write)
launched.wait()
os.wait()
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert ran.stdout == "True b'hello\\n'\n"


def test_run_never_runs_in_the_callers_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ggml loads every ``libggml-*.so`` of the working folder."""
    monkeypatch.chdir(tmp_path)
    assert processes.run(["/bin/pwd"], ENVIRON, timeout=10).output == "/\n"
    own = tmp_path / "own"
    own.mkdir()
    assert processes.run(["/bin/pwd"], ENVIRON, timeout=10, folder=own).output == f"{own}\n"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("/opt/bin::/bin:", "/opt/bin:/bin"),
        (".:/bin:bin:../x", "/bin"),
        ("", "/usr/local/bin:/usr/bin:/bin"),
        (":.", "/usr/local/bin:/usr/bin:/bin"),
    ],
)
def test_the_path_has_absolute_folders_only(given: str, kept: str) -> None:
    assert processes.environment({"PATH": given})["PATH"] == kept


def test_the_dynamic_linker_gets_no_folder_that_it_would_split() -> None:
    folders = [Path("/a:b"), Path("/cuda"), Path("c"), Path("/d;e")]
    assert processes.environment({}, libraries=folders)["LD_LIBRARY_PATH"] == "/cuda"
    assert "LD_LIBRARY_PATH" not in processes.environment({}, libraries=folders[:1])
