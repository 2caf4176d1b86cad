"""``llama_space.Engine`` in real forked workers of the real ``spaces`` package.

ZeroGPU's device API (rigs/zerogpu.py) and llama-server (rigs/impostor_server.py) are imitated.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import impostor_archive
import pytest
from verbs import PROJECT
from waiting import comes
from zerogpu import Emulator, Quota

from llama_loader import processes

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("space_packages")]

TEXT = "one two three"
_WITHIN = 1.0
"""Seconds after the app's end: no worker and no server may live longer."""


class Call:
    """One thing that the app was told to do."""

    def __init__(self) -> None:
        self.lines: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def next(self) -> dict[str, Any]:
        return self.lines.get(timeout=120)  # gradio is imported, on a busy machine in a minute

    def value(self) -> Any:
        line = self.next()
        assert "value" in line, line
        return line["value"]

    def all(self) -> list[Any]:
        """Every value; the call must end well."""
        values = []
        while "value" in (line := self.next()):
            values.append(line["value"])
        assert line.get("end"), line
        return values

    def error(self) -> dict[str, Any]:
        """The error that the call ended with."""
        while "value" in (line := self.next()):
            pass
        assert "error" in line, line
        return line


class App:
    """The app of rigs/engine_app.py in a process of its own."""

    def __init__(self, emulator: Emulator, home: Path, environment: dict[str, str]) -> None:
        self.emulator = emulator
        self.store = home / "hub" / "llama-loader"
        self._scratch = home / "tmp"
        self._scratch.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, str(PROJECT / "tests/rigs/engine_app.py")],
            env={
                **os.environ,
                **environment,
                **emulator.environment,
                "TMPDIR": str(self._scratch),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._calls = {0: Call()}
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        try:
            assert self._calls[0].next()["end"]
        except BaseException:
            self.quit()
            raise

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # the package prints sentences of its own
                told = json.loads(line)
                self._calls[told["id"]].lines.put(told)

    def begin(self, what: str) -> Call:
        number = len(self._calls)
        call = self._calls[number] = Call()
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"id": number, "do": what}) + "\n")
        self.process.stdin.flush()
        return call

    def all(self, what: str) -> list[Any]:
        return self.begin(what).all()

    def status(self) -> dict[str, Any]:
        (found,) = self.all("status")
        status: dict[str, Any] = found
        return status

    def scratch(self) -> list[Path]:
        """What the servers keep on the disk."""
        return list(self._scratch.glob("llama-server*"))

    def quit(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., App]]:
    """Starts apps of which a test needs one of its own."""
    with Emulator() as emulator:
        apps: list[App] = []

        def start(**behaviour: Any) -> App:
            apps.append(_app(emulator, tmp_path, **behaviour))
            return apps[-1]

        yield start
        for app in apps:
            app.quit()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    with Emulator() as emulator:
        app = _app(emulator, tmp_path_factory.mktemp("app"), between=0.05)
        yield app
        app.quit()


@pytest.fixture
def app(running: App) -> Iterator[App]:
    """An app for all tests that leave it alive; each must leave the GPU free."""
    yield running
    assert running.emulator.await_free()
    assert running.process.poll() is None


def _app(emulator: Emulator, home: Path, **behaviour: Any) -> App:
    archive, model = home / "release.tar.gz", home / "model.gguf"
    variables = {name: behaviour.pop(name) for name in [*behaviour] if name.isupper()}
    impostor_archive.write(archive, **behaviour)
    model.write_bytes((PROJECT / "spaces/llama_loader/tiny.gguf").read_bytes())
    environment = {
        "PYTHONPATH": str(PROJECT / "spaces"),
        "HOME": str(home),
        "HF_HOME": str(home / "hub"),
        "YAKULINGO_SPACES_ALLOW_CPU": "1",
        "YAKULINGO_SPACES_LLAMA_CPP_URL": archive.as_uri(),
        "YAKULINGO_SPACES_GGUF_PATH": str(model),
        **{f"YAKULINGO_SPACES_{name}": value for name, value in variables.items()},
    }
    return App(emulator, home, environment)


def test_a_call_in_the_apps_process_borrows_a_gpu_and_answers(app: App) -> None:
    before = len(app.emulator.seen("/schedule"))
    assert "".join(app.all("chat")) == TEXT
    assert "".join(app.all("complete")) == TEXT
    assert len(app.emulator.seen("/schedule")) == before + 2
    assert app.all("shared") == [False]


def test_the_values_of_a_call_end_with_its_figures(app: App) -> None:
    *items, last = app.all("events")
    assert items[0]["kind"] == "Progress"
    assert last["kind"] == "Figures"
    assert (last["tokens"], last["tokens_per_second"], last["reason"]) == (3, 50, "stop")
    asked = app.emulator.seen("/schedule")[-1].query["durationSeconds"]
    assert (last["reserved"], 0 < last["used"] < 10) == (int(asked), True)


def test_several_requests_share_one_gpu(app: App) -> None:
    before = len(app.emulator.seen("/schedule"))
    *told, figures = app.all("together")
    assert [one["words"] for one in told] == [TEXT] * 3
    assert {one["worker"] for one in told} == {app.emulator.workers()[-1]}
    assert len(app.emulator.seen("/schedule")) == before + 1
    assert (figures["tokens"], figures["reason"]) == (9, "stop")
    assert 0 < figures["used"] < figures["reserved"]


def test_work_ends_before_its_seconds_do(started: Callable[..., App]) -> None:
    """Size and duration are the owner's wish."""
    app = started(between=0.5, ZEROGPU_DURATION="2", ZEROGPU_SIZE="xlarge")
    *told, figures = app.all("together")
    assert [one["words"] for one in told] == [TEXT]  # with a second one it would take too long
    assert figures["reserved"] == 2
    (asked,) = app.emulator.seen("/schedule")
    assert (asked.query["gpuSize"], asked.query["durationSeconds"]) == ("xlarge", "2")


def test_reserved_and_used_gpu_seconds_are_summed_up(app: App) -> None:
    before = app.status()
    app.all("chat")
    after = app.status()
    asked = int(app.emulator.seen("/schedule")[-1].query["durationSeconds"])
    assert after["gpu_seconds_reserved"] == before["gpu_seconds_reserved"] + asked
    assert 0 < after["gpu_seconds_used"] - before["gpu_seconds_used"] < 10


def test_three_calls_in_the_owners_own_function_share_its_worker_and_one_server(app: App) -> None:
    app.all("ready")
    before = len(app.emulator.seen("/schedule"))
    told = app.all("own")
    assert [one["text"] for one in told] == [TEXT] * 3
    assert len(app.emulator.seen("/schedule")) == before + 1
    assert {one["worker"] for one in told} == {app.emulator.workers()[-1]}
    servers = {one["server"] for one in told}
    assert len(servers) == 1
    (again, *_) = app.all("own")
    assert {again["server"]} == servers


def test_the_owners_own_function_has_a_server_for_openai_clients(app: App) -> None:
    (told,) = app.all("over_http")
    assert "three" in told["text"]
    assert told["worker"] == app.emulator.workers()[-1]


def test_the_main_process_of_zerogpu_has_no_server_and_says_what_to_do(app: App) -> None:
    error = app.begin("server").error()
    assert (error["error"], error["status"]) == ("NO_SERVER_HERE", 7)
    assert "@spaces.GPU" in error["hint"]


def test_a_refusal_is_raised_in_the_caller_and_costs_no_worker(app: App) -> None:
    app.all("chat")
    worker = app.emulator.workers()[-1]
    app.emulator.script(Quota())
    error = app.begin("chat").error()
    assert (error["error"], error["status"]) == ("ZEROGPU_QUOTA", 5)
    assert error["hint"]
    app.all("chat")
    assert app.emulator.workers()[-1] == worker


def test_an_error_in_a_worker_is_raised_in_the_caller_and_costs_no_worker(
    started: Callable[..., App],
) -> None:
    app = started(chat="refuse")
    first, second = app.begin("chat").error(), app.begin("chat").error()
    assert first["error"] == second["error"] == "REQUEST_REFUSED"
    assert first["status"] == 7
    assert len(app.emulator.workers()) == 1
    assert processes.lives(app.status()["server_pid"])


def test_an_answer_that_is_let_go_frees_the_gpu_within_a_second_and_the_server_lives(
    started: Callable[..., App],
) -> None:
    app = started(between=5)
    _, seconds = app.all("closed")
    assert seconds < _WITHIN
    assert app.emulator.await_free(0.1)
    server = app.status()["server_pid"]
    assert processes.lives(server)
    app.all("closed")
    assert app.status()["server_pid"] == server


@pytest.mark.parametrize("what", ["events", "own_words"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_app_that_is_ended_in_an_answer_leaves_no_worker_and_no_server(
    started: Callable[..., App], what: str, number: signal.Signals
) -> None:
    app = started(between=5)
    call = app.begin(what)
    if what == "own_words":
        server = call.value()["server"]
    else:
        while call.value()["kind"] != "Piece":
            pass
        server = app.status()["server_pid"]
    (worker,) = app.emulator.workers()
    assert processes.lives(worker)
    assert processes.lives(server)
    app.process.send_signal(number)
    app.process.wait(_WITHIN)
    assert comes(lambda: not processes.lives(worker) and not processes.lives(server), _WITHIN)
    assert app.scratch() == []


def test_workers_of_two_functions_end_with_the_app(started: Callable[..., App]) -> None:
    """Each inherits what the other has open; that must not keep either alive."""
    app = started()
    app.all("chat")
    (own, *_) = app.all("own")
    workers = app.emulator.workers()
    assert len(workers) == 2
    app.process.kill()
    app.process.wait()
    assert comes(lambda: not any(map(processes.lives, [*workers, own["server"]])), _WITHIN)
