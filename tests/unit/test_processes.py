from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from llama_loader import processes

if TYPE_CHECKING:
    import subprocess

ENVIRON = processes.environment({"PATH": os.environ["PATH"]})


def say(text: str, folder: Path) -> tuple[int, bytes]:
    program = processes.spawn(["/bin/echo", text], ENVIRON, folder=folder)
    with program:
        assert program.stdout is not None
        return program.pid, program.stdout.read()


def test_every_argument_arrives_as_it_was_given(tmp_path: Path) -> None:
    assert say("a b\nc\udcff", tmp_path)[1] == b"a b\nc\xff\n"


def test_a_program_outlives_the_thread_that_asked_for_it(tmp_path: Path) -> None:
    """The kernel's parent-death signal comes when the starting thread ends."""
    programs: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        programs.append(processes.spawn(["/bin/true"], ENVIRON, folder=tmp_path))
        programs.append(processes.spawn(["/bin/sleep", "60"], ENVIRON, folder=tmp_path))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    short, long = programs
    with short, long:
        assert processes.ended(short, 5)  # reaped here, not by the thread that keeps it
        assert not processes.ended(long, 0.2)
        assert processes.stop(long, grace=5) == -signal.SIGTERM


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


def test_run_never_runs_in_the_callers_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ggml loads every ``libggml-*.so`` of the working folder."""
    monkeypatch.chdir(tmp_path)
    assert processes.run(["/bin/pwd"], ENVIRON, timeout=10).output == "/\n"
    own = tmp_path / "own"
    own.mkdir()
    assert processes.run(["/bin/pwd"], ENVIRON, timeout=10, folder=own).output == f"{own}\n"


def test_what_cannot_be_an_argument_is_an_error_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="null byte"):
        processes.spawn(["/bin/echo", "a\0b"], ENVIRON, folder=tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        processes.spawn(["/bin/echo"], ENVIRON, folder=tmp_path / "nowhere")


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
