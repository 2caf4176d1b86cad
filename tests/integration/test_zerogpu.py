"""The real ``spaces`` package forks real workers, a real llama-server answers; only the GPU and
ZeroGPU's device API are imitated (rigs/zerogpu.py).
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests
from verbs import PROJECT
from waiting import comes
from zerogpu import (
    ILLEGAL_DURATION,
    Emulator,
    Garbage,
    Grant,
    NoSuchToken,
    Queued,
    Quota,
    Refused,
)

from llama_loader import processes
from llama_loader.server import free_port

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

_UP_WITHIN = 120.0
"""Seconds; gradio takes 5 to import on an idle machine."""
_VISITOR = "e30.e30.e30"
"""The token that the Hub's proxy adds for each visitor; a JWT that says nothing."""
_LONG = 4000
"""Tokens that no test waits for."""


@dataclass
class Answer:
    """What came back from one call, as it comes."""

    items: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""
    event_id: str = ""
    session: str = ""

    @property
    def text(self) -> str:
        return "".join(one["text"] for one in self.pieces)

    @property
    def pieces(self) -> list[dict[str, Any]]:
        return [one for one in self.items if one["kind"] == "Piece"]

    @property
    def failure(self) -> dict[str, Any]:
        assert self.items, self.error
        assert self.items[-1]["kind"] == "Failure", self.items[-1]
        return self.items[-1]

    @property
    def good(self) -> bool:
        return bool(self.pieces) and self.pieces[-1]["finished"] and not self.error


class App:
    """The app of rigs/zerogpu_app.py in a process of its own, and its HTTP API."""

    def __init__(self, emulator: Emulator, environment: dict[str, str]) -> None:
        self.emulator = emulator
        self.headers: dict[str, str] = {}
        port = free_port()
        self._url = f"http://127.0.0.1:{port}/gradio_api"
        self.process = subprocess.Popen(
            [sys.executable, str(PROJECT / "tests/rigs/zerogpu_app.py"), str(port)],
            cwd=PROJECT,
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
        )

    def up(self) -> bool:
        assert self.process.poll() is None, "the app has ended"
        try:
            return requests.get(f"{self._url}/info", timeout=5).ok
        except OSError:
            return False

    def state(self) -> dict[str, Any]:
        posted = requests.post(f"{self._url}/call/state", json={"data": []}, timeout=10).json()
        url = f"{self._url}/call/state/{posted['event_id']}"
        text = requests.get(url, timeout=10).text
        found: dict[str, Any] = json.loads(text.split("data: ", 1)[1])[0]
        return found

    def ask(self, tokens: int = 3, *, seen: Callable[[Answer], None] | None = None) -> Answer:
        """Call and wait for the end; ``seen`` gets every new item."""
        answer = Answer(session=uuid.uuid4().hex)  # as every browser tab has one
        data = {"data": ["Tell a long story.", tokens], "session_hash": answer.session}
        url, headers = f"{self._url}/call/ask", self.headers
        posted = requests.post(url, json=data, headers=headers, timeout=10)
        answer.event_id = posted.json()["event_id"]
        url = f"{self._url}/call/ask/{answer.event_id}"
        with requests.get(url, stream=True, timeout=120) as response:
            kind = ""
            for raw in response.iter_lines(chunk_size=1):
                name, _, value = raw.decode().partition(": ")
                kind = value if name == "event" else kind
                if name == "data" and kind == "generating":
                    answer.items.append(json.loads(json.loads(value)[0]))
                    if seen is not None:
                        seen(answer)
                elif name == "data" and kind in {"complete", "error"}:
                    answer.error = value if kind == "error" else ""
                    return answer
        return answer

    def begin(self, tokens: int = _LONG) -> tuple[threading.Thread, Answer]:
        """Call in a thread; returns when the first words are here."""
        first = threading.Event()
        shared = Answer()

        def note(answer: Answer) -> None:
            shared.items, shared.event_id = answer.items, answer.event_id
            shared.session = answer.session
            if answer.text:
                first.set()

        def run() -> None:
            shared.items = self.ask(tokens, seen=note).items

        thread = threading.Thread(target=run)
        thread.start()
        assert first.wait(60)
        return thread, shared

    def stop(self, answer: Answer) -> None:
        """What the browser sends for a stop button."""
        body = {"session_hash": answer.session, "fn_index": 0, "event_id": answer.event_id}
        requests.post(f"{self._url}/cancel", json=body, timeout=30).raise_for_status()

    def worker(self) -> int:
        return self.emulator.workers()[-1]

    def server(self) -> int:
        pid: int = self.state()["server_pid"]
        return pid

    def quit(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    with Emulator() as running:
        yield running


@pytest.fixture(scope="module")
def environment(
    space_packages: None,
    real_manifest: str,
    real_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, str]:
    """What a Space's owner sets."""
    del space_packages
    return {
        "PYTHONPATH": str(PROJECT / "spaces"),
        "HF_HOME": str(tmp_path_factory.mktemp("hub")),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "YAKULINGO_SPACES_ALLOW_CPU": "1",
        "YAKULINGO_SPACES_LLAMA_CPP_MANIFEST_URL": real_manifest,
        "YAKULINGO_SPACES_GGUF_PATH": str(real_model),
    }


@pytest.fixture(scope="module")
def running(emulator: Emulator, environment: dict[str, str]) -> Iterator[App]:
    app = App(emulator, {**environment, **emulator.environment})
    try:
        assert comes(app.up, _UP_WITHIN)
        yield app
    finally:
        app.quit()


@pytest.fixture
def app(running: App) -> Iterator[App]:
    """The app; every test must leave the GPU free, and the queue passable."""
    yield running
    assert running.emulator.await_free()
    assert running.process.poll() is None


def test_it_reports_at_startup_and_is_ready_without_a_gpu(app: App) -> None:
    assert len(app.emulator.seen("/startup-report")) == 1
    assert comes(lambda: app.state()["phase"] == "ready", 60)
    state = app.state()
    assert (state["architecture"], len(state["digest"])) == ("cpu", 64)
    assert [name for name, _ in state["timeline"]][:2] == ["resolve", "fetch"]


def test_a_worker_and_its_server_are_used_again(app: App) -> None:
    before = len(app.emulator.workers())
    first = app.ask()
    assert first.good, first
    server = app.server()
    second = app.ask()
    assert second.good
    assert app.server() == server
    assert len(app.emulator.workers()) == max(before, 1)
    state = app.state()
    assert [call["warm"] for call in state["calls"]][-1] is True
    assert state["warm"] is True
    assert state["tokens_per_second"] > 0
    assert {"start", "first token"} <= {name for name, _ in state["timeline"]}
    cold, warm = [int(one.query["durationSeconds"]) for one in app.emulator.seen("/schedule")][:2]
    assert warm <= cold <= 30


def test_a_second_worker_gets_a_server_of_its_own(app: App) -> None:
    app.ask()
    old_worker, old_server = app.worker(), app.server()
    app.emulator.script(Grant(fresh=True))
    assert app.ask().good
    assert app.worker() != old_worker
    assert app.server() != old_server
    assert comes(lambda: not processes.lives(old_server), 1.0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_dies_with_its_worker(app: App, number: signal.Signals) -> None:
    assert app.ask().good
    worker, server = app.worker(), app.server()
    assert processes.lives(server)
    os.kill(worker, number)
    assert comes(lambda: not processes.lives(server), 1.0)
    assert comes(lambda: app.state()["warm"] is False, 5.0)
    assert app.ask().good
    assert app.worker() != worker


def test_a_worker_killed_in_the_middle_of_an_answer(app: App) -> None:
    """As ZeroGPU does with one that takes longer than it asked for."""
    app.ask()
    server = app.server()
    thread, answer = app.begin()
    os.kill(app.worker(), signal.SIGKILL)
    thread.join(30)
    assert answer.pieces
    assert answer.failure["code"] == "ZEROGPU_ABORTED"
    assert "shorter text" in answer.failure["hint"]
    assert comes(lambda: not processes.lives(server), 1.0)
    assert app.ask().good


@pytest.mark.parametrize(
    ("scripted", "code", "words"),
    [
        (Quota(), "ZEROGPU_QUOTA", "quota exceeded"),
        (Quota(result="pending-overquota-exceeded"), "ZEROGPU_QUOTA", "credits"),
        (ILLEGAL_DURATION, "ZEROGPU_DURATION", "larger than the maximum allowed"),
        (Refused(503), "ZEROGPU_BUSY", "No GPU was available"),
        (Refused(500), "ZEROGPU_FAILED", "500"),
        (Queued(2, fails=True), "ZEROGPU_QUOTA", "No GPU was available after"),
        (Garbage(), "ZEROGPU_FAILED", ""),
    ],
)
def test_what_zerogpu_refuses_is_a_value_with_a_hint(
    app: App, scripted: Any, code: str, words: str
) -> None:
    app.emulator.script(scripted)
    answer = app.ask()
    assert answer.failure["code"] == code
    assert words in answer.failure["message"]
    assert answer.failure["hint"]
    assert answer.error == ""
    assert app.ask().good


def test_call_is_asked_for_once_more_with_the_seconds_that_the_visitor_has_left(app: App) -> None:
    assert app.ask().good
    before, app.emulator.quota = len(app.emulator.seen("/schedule")), 12.0
    app.headers = {"X-IP-Token": _VISITOR}
    try:
        assert app.ask().good
        asked = [int(one.query["durationSeconds"]) for one in app.emulator.seen("/schedule")]
        assert asked[before:] == [15, 12]
        assert app.state()["calls"][-1]["reserved"] == 12
        app.emulator.quota = 0.5
        refused = app.ask().failure
    finally:
        app.emulator.quota, app.headers = None, {}
    assert refused["code"] == "ZEROGPU_QUOTA"
    assert "15s requested vs. 0s left" in refused["message"]
    assert "Try again in 1:00:00" in refused["message"]
    assert len(app.emulator.seen("/schedule")) == before + 3


@pytest.mark.parametrize("scripted", [Queued(pings=3), Queued(cut=True), NoSuchToken()])
def test_a_queue_a_lost_connection_and_a_gpu_given_back_already_are_no_trouble(
    app: App, scripted: Any
) -> None:
    app.emulator.script(scripted)
    answer = app.ask()
    assert answer.good
    if scripted == Queued(pings=3):
        assert (answer.items[0]["kind"], answer.items[0]["stage"]) == ("Progress", "queue")
    assert app.ask().good


def test_four_calls_at_once_share_one_gpu(app: App) -> None:
    answers: list[Answer] = []
    threads = [threading.Thread(target=lambda: answers.append(app.ask())) for _ in range(4)]
    before = len(app.emulator.seen("/schedule"))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [answer.good for answer in answers] == [True] * 4
    assert len(app.emulator.seen("/schedule")) == before + 4


def test_stopped_in_mid_stream_the_server_is_free_for_the_next_call(app: App) -> None:
    app.ask()
    worker, server = app.worker(), app.server()
    thread, answer = app.begin()
    began = time.monotonic()
    app.stop(answer)
    assert app.emulator.await_free(5)
    assert time.monotonic() - began < 5
    thread.join(30)
    assert not thread.is_alive()
    assert app.ask().good
    assert (app.worker(), app.server()) == (worker, server)


def test_a_server_that_dies_in_a_worker_is_replaced_there(app: App) -> None:
    app.ask()
    worker, server = app.worker(), app.server()
    thread, answer = app.begin()
    os.kill(server, signal.SIGKILL)
    thread.join(30)
    assert answer.failure["code"] in {"NO_ANSWER", "ANSWER_CUT"}
    assert "ask again" in answer.failure["hint"]
    assert app.ask().good
    assert app.worker() == worker
    assert app.server() != server


def test_only_one_function_is_decorated(app: App) -> None:
    asked = app.emulator.seen("/schedule")
    assert len({one.query["taskId"] for one in asked}) == 1
    assert asked[0].query["gpuSize"] == "large"


def test_a_setting_that_cannot_work_is_a_value(
    emulator: Emulator, environment: dict[str, str]
) -> None:
    """And a worker is never asked for: all that can fail without a GPU fails before."""
    before = len(emulator.seen("/schedule"))
    wrong = {"YAKULINGO_SPACES_LLAMA_CPP_MANIFEST_URL": "file:///nowhere/manifest.json"}
    app = App(emulator, {**environment, **emulator.environment, **wrong})
    try:
        assert comes(app.up, _UP_WITHIN)
        answer = app.ask()
        assert answer.failure["exit_status"] == 3
        assert "/nowhere/manifest.json" in answer.failure["message"]
        state = app.state()
        assert state["phase"] == "failed"
        assert state["failure"]["code"] == answer.failure["code"]
    finally:
        app.quit()
    assert len(emulator.seen("/schedule")) == before
