"""Locks between real processes: one holds, another asks, one is killed."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from farm import run_lock
from farm.errors import BuildError
from tests.rigs.refusals import refused

HOLDS = """
import sys
from pathlib import Path
from farm import run_lock
with run_lock.held(["cu130-sm90"], [Path(sys.argv[1])]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the lock until its stdin is closed."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process


def test_a_set_that_another_process_builds_is_refused_and_the_process_named(
    tmp_path: Path,
) -> None:
    out = tmp_path / "dist"
    with holder(out) as other:
        with (
            refused("SET_IS_BEING_BUILT", BuildError, status=1) as caught,
            run_lock.held(["cu130-sm120", "cu130-sm90"], [out]),
        ):
            pass
        said = caught.value.render().splitlines()
        assert said[0].endswith(f"cu130-sm90 is being built into {out} by process {other.pid}")
        assert said[1].startswith("hint: ")
        with run_lock.held(["cu130-sm120"], [out]), run_lock.held(["cu130-sm90"], [tmp_path]):
            pass
    with run_lock.held(["cu130-sm90"], [out]):
        pass
    assert list(out.iterdir()) == []


def test_turn_that_is_not_given_back_is_not_awaited_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_lock, "PATIENCE", 0.3)
    with holder(tmp_path) as other:
        with (
            refused("FOLDER_LOCKED", BuildError, f"process {other.pid} has locked {tmp_path}"),
            run_lock.turn(tmp_path, "cu130-sm90"),
        ):
            pass
        assert f"note[FOLDER_LOCKED]: waiting: process {other.pid}" in capsys.readouterr().err


def test_a_lock_goes_with_a_process_that_is_killed(tmp_path: Path) -> None:
    with holder(tmp_path) as other:
        other.kill()
        other.wait()
    with run_lock.held(["cu130-sm90"], [tmp_path]):
        assert (tmp_path / ".cu130-sm90.lock").is_file()
    assert list(tmp_path.iterdir()) == []


def test_whoever_takes_turns_is_alone(tmp_path: Path) -> None:
    """Eight threads, each its own open file, count up with a gap between reading and writing."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    inside = threading.Semaphore(1)
    crowded: list[str] = []

    def count() -> None:
        for _ in range(50):
            with run_lock.turn(tmp_path, "manifest"):
                if not inside.acquire(blocking=False):
                    crowded.append("two at a time")
                    continue
                counter.write_text(str(int(counter.read_text()) + 1))
                inside.release()

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert crowded == []
    assert counter.read_text() == "400"


def test_link_in_the_place_of_a_lock_costs_no_person_a_file(tmp_path: Path) -> None:
    mine, out = tmp_path / "letter", tmp_path / "out"
    mine.write_text("mine")
    out.mkdir()
    (out / ".a.lock").symlink_to(mine)
    (out / run_lock.IN_USE).symlink_to(mine)
    with refused("OUT_NOT_WRITABLE", BuildError), run_lock.turn(out, "a"):
        pass
    with pytest.raises(OSError, match="symbolic"):
        run_lock.use(out)
    assert mine.read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        refused("OUT_NOT_WRITABLE", BuildError, "Not a directory"),
        run_lock.held(["cu130-sm90"], [tmp_path / "file" / "dist"]),
    ):
        pass
