import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from needs import must_or_skip
from waiting import comes

from llama_loader import processes, self_test
from llama_loader import server as server_module
from llama_loader.errors import IntegrityError, LoaderError, ServerError
from llama_loader.events import Event, Note
from llama_loader.server import Server
from llama_loader.server_plan import ServerPlan
from tests.loader.test_server import without
from tests.rigs.impostor_archive import Impostor
from tests.rigs.refusals import refused

NO_MEMORY = "allocating 9000.00 MiB on device 0: cudaMalloc failed: out of memory"


class Pauses(threading.Event):
    """Notes down how long it was waited for, and does not wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.seconds.append(timeout or 0.0)
        return self.is_set()


class Rig:
    """A supervised impostor whose pauses are noted down instead of waited for."""

    def __init__(self, runtime: Path, **changes: Any) -> None:
        words: dict[str, Any] = {"model": Path("/m"), "startup_timeout": 20.0} | changes
        plan = ServerPlan(runtime, environ=processes.environment({}), **words)
        self.damage: IntegrityError | None = None
        self.events: list[Event] = []
        self.server = Server(plan, before=self.look, sink=self.events.append)
        self.server.start()
        self.server._stopped = stopped = Pauses()
        self.pauses = stopped.seconds

    def wait(self, seconds: float) -> None:
        """Let time pass for what has been counted."""
        self.server._restarts = [one - seconds for one in self.server._restarts]

    def look(self) -> None:
        """At the runtime, before each start."""
        if self.damage is not None:
            raise self.damage

    def kill(self) -> None:
        pid = self.server.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        self.server.wait(5)


@pytest.fixture
def rigs() -> Iterator[Any]:
    made: list[Rig] = []

    def make(runtime: Path, **changes: Any) -> Rig:
        made.append(Rig(runtime, **changes))
        return made[-1]

    yield make
    for rig in made:
        rig.server.stop()


def test_a_dead_one_is_started_anew_on_the_same_port(rigs: Any, impostor: Impostor) -> None:
    rig = rigs(impostor.behave())
    first, port = rig.server.pid, rig.server.port
    assert rig.server.ensure().pid == rig.server.suspect().pid == first
    assert (rig.pauses, rig.events) == ([], [])
    rig.kill()
    assert rig.server.ensure().pid not in {first, None}
    assert rig.server.port == port
    assert rig.server.client().completion("x", max_tokens=1).text == "!"
    assert rig.pauses == [0.25]
    assert isinstance(rig.events[0], Note)
    assert "SIGKILL" in rig.events[0].message


THIEF = """
import os, socket, sys
os.setuid(65534)
port, tries = int(sys.argv[1]), 0
print("begun", flush=True)
while True:
    for options in ((2,), (15,), (2, 15)):  # SO_REUSEADDR, SO_REUSEPORT
        for host in ("127.0.0.1", "0.0.0.0"):
            with socket.socket() as thief:
                for one in options:
                    thief.setsockopt(socket.SOL_SOCKET, one, 1)
                try:
                    thief.bind((host, port))
                    thief.listen()
                except OSError:
                    tries += 1
                else:
                    sys.exit(f"taken after {tries}")
"""


def test_other_user_gets_the_port_neither_during_restarts_nor_before_the_end(
    rigs: Any, impostor: Impostor
) -> None:
    if os.geteuid():
        must_or_skip("becoming another user needs root")
    rig = rigs(impostor.behave(), pinned_build=True)
    command = [sys.executable, "-c", THIEF, str(rig.server.port)]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as thief:
        assert thief.stdout.readline() == "begun\n"
        for _ in range(3):
            rig.kill()
            assert comes(lambda: rig.server.pid is None, 5)
            rig.server.ensure()
        assert thief.poll() is None
        rig.server.stop()
        _, told = thief.communicate(timeout=30)
    assert int(told.removeprefix("taken after ")) > 1000


def test_release_that_does_not_know_how_to_share_a_port_is_started_without(tmp_path: Path) -> None:
    without("--reuse-port", tmp_path / "llama-server", "exit 3")
    plan = ServerPlan(tmp_path, Path("/m"), processes.environment({}), pinned_build=True)
    server = Server(plan)
    with pytest.raises(ServerError, match="status 3 while loading"):
        server.start()
    assert not server.plan.keeps_port


def test_a_successor_is_not_executed_where_the_runtime_has_changed(
    rigs: Any, impostor: Impostor
) -> None:
    rig = rigs(impostor.behave())
    rig.kill()
    rig.damage = IntegrityError("RUNTIME_DAMAGED", "libggml.so changed")
    for _ in range(2):
        with pytest.raises(IntegrityError, match="changed"):
            rig.server.ensure()
    assert impostor.starts() == 1


def test_the_fifth_end_in_the_window_is_the_last(rigs: Any, impostor: Impostor) -> None:
    """Calls after it fail at once, and start nothing, until the window has passed."""
    rig = rigs(impostor.behave())
    for _ in range(4):
        rig.kill()
        rig.server.ensure()
    rig.kill()
    for _ in range(3):
        with refused("SERVER_GAVE_UP", ServerError, r"ended 5 times .*SIGKILL"):
            rig.server.ensure()
    assert (rig.pauses, impostor.starts()) == ([0.25, 0.5, 1.0, 2.0], 5)
    rig.wait(server_module.WINDOW)
    assert rig.server.ensure().pid
    assert impostor.starts() == 6


def test_ends_that_are_far_apart_are_bad_luck(rigs: Any, impostor: Impostor) -> None:
    rig = rigs(impostor.behave())
    for _ in range(5):
        rig.wait(server_module.WINDOW / 3)
        rig.kill()
        rig.server.ensure()
    assert max(rig.pauses) <= 2.0
    assert impostor.starts() == 6


def test_what_a_new_start_cannot_cure_is_said_at_once_and_tried_again_by_the_next_call(
    rigs: Any, impostor: Impostor
) -> None:
    rig = rigs(impostor.behave())
    impostor.behave(exit=1, say=["E error loading model: oh no"])
    rig.kill()
    for starts in (2, 3, 4, 5):
        with pytest.raises(LoaderError) as caught:
            rig.server.ensure()
        assert (caught.value.code, impostor.starts()) == ("BAD_MODEL", starts)
    with pytest.raises(ServerError, match="oh no") as caught:
        rig.server.ensure()
    assert (caught.value.code, impostor.starts()) == ("SERVER_GAVE_UP", 5)


@pytest.mark.parametrize(
    ("do", "starts", "code"),
    [
        ({"signal": 9, "bad_starts": 2}, 3, ""),
        ({"signal": 11}, 5, "SERVER_GAVE_UP"),
        ({"exit": 0, "say": ["usage: …"]}, 1, "SERVER_ARGUMENT_INVALID"),
    ],
)
def test_death_while_the_first_one_loads(
    impostor: Impostor, do: dict[str, Any], starts: int, code: str
) -> None:
    plan = ServerPlan(impostor.behave(**do), Path("/m"), processes.environment({}))
    keeper = Server(plan)
    keeper._stopped = Pauses()
    caught = ""
    try:
        keeper.keep()
    except LoaderError as error:
        caught = error.code
    finally:
        keeper.stop()
    assert (impostor.starts(), caught) == (starts, code)


def test_a_hang_is_found_by_a_completion_while_health_says_200(
    rigs: Any, impostor: Impostor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "TOKEN_DEADLINE", 0.3)
    rig = rigs(impostor.behave(bad_starts=1, answers=1))
    first = rig.server.pid
    assert rig.server.client().health() == 200
    assert rig.server.suspect().pid != first
    assert "hangs: llama-server was silent for 0.3 s at /v1/completions" in rig.events[0].message


def test_watching_finds_death_and_a_loop_that_is_stuck(
    rigs: Any, impostor: Impostor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "PROBE_EVERY", 0.1)
    monkeypatch.setattr(server_module, "PROBE_DEADLINE", 0.3)
    rig = rigs(impostor.behave(bad_starts=2, stuck_after=0.3))
    thread = threading.Thread(target=rig.server.watch)
    thread.start()

    def serves(starts: int) -> bool:
        return impostor.starts() == starts and rig.server.started is not None

    assert comes(lambda: serves(3))
    rig.kill()
    assert comes(lambda: serves(4))
    rig.server.stop()
    thread.join(5)
    assert not thread.is_alive()
    told = [event.message for event in rig.events]
    assert ["at /slots" in text for text in told] == [True, True, False]
    assert "SIGKILL" in told[2]


def test_a_stop_waits_for_a_restart_that_has_begun_and_leaves_nothing(
    rigs: Any, impostor: Impostor
) -> None:
    rig = rigs(impostor.behave())
    impostor.behave(loading=3600)
    rig.kill()

    def restart() -> None:
        with pytest.raises(ServerError, match="was stopped"):
            rig.server.ensure()

    thread = threading.Thread(target=restart)
    thread.start()
    assert comes(lambda: impostor.starts() == 2)
    rig.server.stop()
    pid = int((impostor.folder / "starts").read_text().split()[-1])
    assert not processes.lives(pid)
    thread.join(5)
    assert not thread.is_alive()
    assert len(rig.events) == 1
    with pytest.raises(ServerError, match="was stopped"):  # stopped is stopped
        rig.server.ensure()
    assert impostor.starts() == 2


def test_what_a_restart_gives_up_is_said_and_tried_again_later(
    rigs: Any, impostor: Impostor
) -> None:
    """Memory is short during one restart only: nothing is lost silently, nor for ever."""
    short = {"say": [NO_MEMORY], "exit": 1}
    rig = rigs(
        impostor.behave(),
        pinned_build=True,
        devices=("CUDA0",),
        model=self_test.MODEL,
        main_memory=1 << 30,
    )
    impostor.behave(**short, bad_starts=impostor.starts() + 1)
    rig.kill()
    assert rig.server.ensure().plan.fitted
    codes = [event.code for event in rig.events if isinstance(event, Note)]
    assert codes == ["SERVER_RESTARTED", "LAYERS_LEFT_OVER"]
    rig.kill()
    assert not rig.server.ensure().plan.fitted
