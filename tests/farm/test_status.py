"""`invoke status` of this machine, and what `invoke clean` lists, removes and leaves alone."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import until

from farm import run_lock
from farm.errors import UsageError
from farm.inputs.packages import cache_folder
from farm.terminal import show, status
from farm.terminal.status import Leavings
from tests.rigs.heard import heard
from tests.rigs.refusals import refused

PROJECT = Path(__file__).parent.parent.parent


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a machine with a cache, a checkout's state, and no engine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CCACHE_DIR", str(tmp_path / "own-ccache"))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path / 'nobody.sock'}")
    for name in ("downloads", "sources", "builds", "ccache", "somebodys"):
        folder = tmp_path / "llama-server-farm" / name
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"x" * 100_000)
    for name in ("logs", "trees", "notes-of-a-person"):
        (tmp_path / "state" / name).mkdir(parents=True)
        (tmp_path / "state" / name / "file").write_bytes(b"x" * 50_000)
    (tmp_path / "own-ccache").mkdir()
    return tmp_path


def test_clean_lists_every_thing_of_the_farm_with_its_size_and_the_sum(
    machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Leavings(state=machine / "state") as left:
        show.leavings(left)
    out, err = capsys.readouterr()
    for name in ("downloads", "sources", "builds", "ccache", "logs", "trees"):
        assert f"{name}: " in out
    assert "somebodys" not in out
    assert "notes" not in out
    assert re.search(r" [45][0-9]{2}\.[0-9] kB  in all\n\Z", out)
    assert err.startswith("note[ENGINE_NOT_ASKED]: no Docker engine answers at unix://")


def test_clean_removes_what_the_farm_made_and_nothing_else(machine: Path) -> None:
    deep = machine / "llama-server-farm" / "sources" / ".part-x" / ("d/" * 1100)
    heard(["mkdir", "-p", deep], check=True)
    with Leavings(state=machine / "state") as left:
        told = list(left.remove())
    assert len(told) == 6
    assert all(line.startswith("removed ") for line in told)
    assert [path.name for path in (machine / "state").iterdir() if path.is_dir()] == [
        "notes-of-a-person"
    ]
    cache = machine / "llama-server-farm"
    assert [path.name for path in cache.iterdir() if path.is_dir()] == ["somebodys"]
    assert (machine / "own-ccache").is_dir()


def test_clean_leaves_a_folder_that_is_a_link_alone(machine: Path) -> None:
    linked = machine / "llama-server-farm" / "models"
    linked.symlink_to(machine / "own-ccache")
    with Leavings(state=machine / "state") as left:
        list(left.remove())
    assert linked.is_symlink()
    assert (machine / "own-ccache").is_dir()


def test_clean_leaves_what_another_run_uses(machine: Path) -> None:
    """The other run is another process: it holds its cache until it ends, however it ends."""
    hold = "from farm.inputs.packages import cache_folder as f; f('builds'); print(1); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as run:
        assert run.stdout is not None
        run.stdout.readline()
        with Leavings(state=machine / "state") as left:
            told = list(left.remove())
        run.kill()
    stays = [line for line in told if line.startswith("stays: ")]
    assert len(stays) == 4
    assert all(line.endswith("a run of the farm uses it") for line in stays)
    assert (machine / "llama-server-farm" / "builds" / "file").is_file()
    assert not (machine / "state" / "logs").exists()
    with Leavings(state=machine / "state") as left:
        assert all(line.startswith("removed") for line in left.remove())


def test_a_run_that_begins_while_clean_removes_waits_for_it(machine: Path) -> None:
    begin = "from farm.inputs.packages import cache_folder as f; f('builds'); print(1)"
    with Leavings(state=machine / "state"):
        run = subprocess.Popen([sys.executable, "-c", begin], cwd=PROJECT, stdout=subprocess.PIPE)
        waits = re.compile(rf"-> FLOCK .* {run.pid} ")
        until(lambda: bool(waits.search(Path("/proc/locks").read_text())), "it waits for the lock")
    assert run.communicate()[0] == b"1\n"


def test_a_process_holds_few_folders_at_a_time(tmp_path: Path) -> None:
    for number in range(20):
        run_lock.use(tmp_path / str(number))
    with run_lock.unused(tmp_path / "0") as free:
        assert free
    with run_lock.unused(tmp_path / "19") as free:
        assert not free


def test_a_folder_that_cannot_be_written_is_used_without_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    run_lock.use(tmp_path)


def test_status_tells_the_sum(machine: Path) -> None:
    cache_folder("downloads")
    told = status.disk()
    assert told.startswith("disk: ")
    assert told.endswith("the engine not counted (invoke clean lists and removes them)")
    assert machine.is_dir()


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine, no release, an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path / 'nobody.sock'}")
    monkeypatch.setenv("CCACHE_DIR", str(tmp_path / "ccache"))


@pytest.mark.usefixtures("bare")
def test_no_release_and_no_engine_are_one_calm_line_each(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status.tell(None, None)
    none, local, docker, disk = capsys.readouterr().out.splitlines()
    assert none == (
        f"no release: there is no {Path('dist').absolute()} (give a release folder;"
        " invoke build-cuda or invoke build-cpu makes one)"
    )
    assert local.startswith("compiler cache, local engine: ")
    assert docker.startswith("compiler cache, docker engine: no Docker engine answers at unix://")
    assert docker.endswith("/nobody.sock (DOCKER_HOST)")
    assert disk.startswith("disk: ")


@pytest.mark.usefixtures("bare")
def test_host_that_is_supposed_without_a_release_is_an_error_and_nothing_else(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with refused("RELEASE_MISSING", UsageError):
        status.tell(None, "capability=9.0")
    assert capsys.readouterr().out == ""
