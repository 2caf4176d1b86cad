"""The engine outside ZeroGPU, with an archive whose ``llama-server`` is the impostor."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import sys
import tarfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from llama_loader import processes, settings
from llama_loader.supervisor import Supervisor
from translator import answering, zerogpu
from translator.engine import Ask, Engine, Failure, Piece, Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Impostor

    from translator.engine import Item

ASK = Ask(({"role": "user", "content": "Count."},), 10)


_STARTS = 2
"""The impostor is started once to list devices, then to serve: these do what ``behave`` says."""


class Rig:
    """An engine on an archive that is made when the server's behaviour is set."""

    def __init__(self, impostor: Impostor, folder: Path) -> None:
        self._impostor = impostor
        self._archive = folder / "release.tar.gz"
        model = folder / "model.gguf"
        model.write_bytes(b"GGUF")
        options = {
            "url": self._archive.as_uri(),
            "allow_cpu": "1",
            "gguf_path": str(model),
            "store": str(folder / "store"),
        }
        self.engine = Engine(settings.load(options, {"PATH": "/bin:/usr/bin"}))

    def behave(self, **behaviour: Any) -> Engine:
        self._impostor.behave(**behaviour)
        with tarfile.open(self._archive, "w:gz") as tar:
            for name in ("llama-server", "behaviour.json"):
                tar.add(self._impostor.folder / name, f"bin/{name}")
            backend = tarfile.TarInfo("bin/libggml-cpu-x64.so")
            tar.addfile(backend, io.BytesIO())
        return self.engine

    def answer(self) -> list[Item]:
        return list(self.engine.stream(ASK))

    def text(self) -> str:
        return "".join(one.text for one in self.answer() if isinstance(one, Piece))


@pytest.fixture
def rig(impostor: Impostor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    made = Rig(impostor, tmp_path)
    yield made
    made.engine.close()
    assert list(place.glob("*/*")) == []


def until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_an_answer_and_what_is_remembered_of_it(rig: Rig) -> None:
    engine = rig.behave()
    engine.begin()
    items = rig.answer()
    assert [one.text for one in items if isinstance(one, Piece)] == ["one", " two", " three", ""]
    last = items[-1]
    assert isinstance(last, Piece)
    assert (last.finished, last.tokens, last.tokens_per_second, last.reason) == (
        True,
        3,
        50,
        "stop",
    )
    state = engine.state()
    assert (state.phase, state.model, state.verified) == ("ready", "model.gguf", False)
    assert state.tokens_per_second == 50.0
    assert state.warm
    assert state.server_pid is not None
    (call,) = state.calls
    assert call.tokens == 3
    assert call.warm
    assert call.first_token is not None
    assert call.first_token <= call.seconds
    assert "UNVERIFIED" in {note.code for note in state.notes}
    assert pickle.loads(pickle.dumps(state)) == state  # noqa: S301
    json.dumps(dataclasses.asdict(state))


def test_what_fails_is_said_and_can_be_tried_again(rig: Rig) -> None:
    rig.engine.begin()
    (failure,) = [one for one in rig.answer() if not isinstance(one, Progress)]
    assert isinstance(failure, Failure)
    assert failure.exit_status == 3
    state = rig.engine.state()
    assert (state.phase, state.failure) == ("failed", failure)
    assert rig.answer() == [failure]
    rig.behave()
    rig.engine.retry()
    assert rig.text() == "one two three"
    assert rig.engine.state().failure is None


def test_a_server_that_cannot_start_is_a_failure_of_the_preparation(
    rig: Rig, impostor: Impostor
) -> None:
    rig.behave(exit=1, say=["E error loading model: oh no"]).begin()
    failure = rig.answer()[-1]
    assert isinstance(failure, Failure)
    assert (failure.code, failure.exit_status) == ("BAD_MODEL", 7)
    assert "oh no" in failure.message
    rig.behave()
    rig.engine.retry()
    assert rig.text() == "one two three"
    assert impostor.folder.is_dir()


def test_begun_twice_is_begun_once(rig: Rig) -> None:
    engine = rig.behave()
    engine.begin()
    engine.begin()
    assert rig.text() == "one two three"
    pid = engine.state().server_pid
    engine.retry()
    assert rig.text() == "one two three"
    assert engine.state().server_pid == pid


def test_not_begun(rig: Rig) -> None:
    (failure,) = rig.answer()
    assert isinstance(failure, Failure)
    assert failure.code == "NOT_BEGUN"


def test_death_in_an_answer_is_said_and_the_next_call_finds_a_server(rig: Rig) -> None:
    rig.behave(chat="die", bad_starts=_STARTS).begin()
    failure = rig.answer()[-1]
    assert isinstance(failure, Failure)
    assert failure.code in {"ANSWER_CUT", "NO_ANSWER"}
    assert "ask again" in failure.hint
    assert rig.text() == "one two three"


def test_a_hang_before_the_first_word_costs_time_not_the_answer(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "SILENCE", 0.5)
    monkeypatch.setattr(Supervisor.suspect, "__kwdefaults__", {"deadline": 0.5})
    rig.behave(hang_after=1.5, bad_starts=_STARTS).begin()
    assert until(lambda: rig.engine.state().phase == "ready")
    first = rig.engine.state().server_pid
    time.sleep(1.6)
    items = rig.answer()
    assert "".join(one.text for one in items if isinstance(one, Piece)) == "one two three"
    assert "restart" in {one.stage for one in items if isinstance(one, Progress)}
    assert rig.engine.state().server_pid != first


def test_a_request_that_is_refused_leaves_the_server_alone(rig: Rig) -> None:
    engine = rig.behave(chat="refuse")
    engine.begin()
    (failure,) = [one for one in rig.answer() if not isinstance(one, Progress)]
    assert isinstance(failure, Failure)
    assert failure.code == "REQUEST_REFUSED"
    assert "the prompt is too long" in failure.message
    pid = engine.state().server_pid
    assert pid is not None
    assert processes.lives(pid)


def test_a_stream_that_is_closed_ends_at_once(rig: Rig) -> None:
    engine = rig.behave(between=5)
    engine.begin()
    stream = engine.stream(ASK)
    assert any(isinstance(one, Piece) for one in stream)
    began = time.monotonic()
    stream.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 1
    assert len(engine.state().calls) == 1


def test_signs_of_life_come_while_no_word_does(rig: Rig) -> None:
    rig.behave(between=0.6).begin()
    assert "waiting" in {one.stage for one in rig.answer() if isinstance(one, Progress)}


def test_a_hundred_calls_leave_nothing_behind(rig: Rig) -> None:
    engine = rig.behave()
    engine.begin()

    def held() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    for _ in range(3):
        rig.answer()
    before = held()
    for number in range(100):
        if number % 10:
            assert rig.text() == "one two three"
        else:
            stream = engine.stream(ASK)
            next(stream)
            stream.close()  # type: ignore[attr-defined]
    assert held() == before
    assert len(engine.state().calls) == 20


def test_closed_is_closed(rig: Rig) -> None:
    engine = rig.behave()
    engine.begin()
    rig.answer()
    pid = engine.state().server_pid
    assert pid is not None
    engine.close()
    engine.close()
    assert not processes.lives(pid)
    assert not engine.state().warm


def test_the_doctors_page_is_text(rig: Rig) -> None:
    assert "verdict: a model " in rig.engine.doctor()


def test_seconds_are_computed_or_the_owners() -> None:
    given = settings.load({}, {"YAKULINGO_SPACES_ZEROGPU_DURATION": "33"})
    assert Engine(given).duration(ASK) == 33
    assert 15 <= Engine(settings.load({}, {})).duration(ASK) <= 120


def test_a_worker_that_was_ended_before_the_job_came_is_replaced_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    class Aborted(Exception):  # noqa: N818 - stands for gradio.Error
        title = "ZeroGPU worker error"

    def decorated(job: Any) -> Iterator[Any]:
        calls.append(job)
        if len(calls) % 2:
            raise Aborted("GPU task aborted")
        yield Progress("start", "")

    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(Error=Aborted))
    waits, *items = zerogpu.call(decorated, 1)  # type: ignore[arg-type]
    assert isinstance(waits, Progress)
    assert waits.stage == "queue"
    assert items == [Progress("start", "")]
    assert calls == [1, 1]
