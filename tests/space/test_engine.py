"""The engine outside ZeroGPU, with an archive whose ``llama-server`` is the impostor."""

import dataclasses
import fcntl
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import impostor_archive
import pytest
from huggingface_hub import constants
from verbs import PROJECT
from waiting import comes

from llama_loader import client, hub_client, processes, self_test
from llama_loader import server as server_module
from llama_loader.errors import NetworkError, ServerError, SettingError
from llama_loader.events import Event, Note, Stage
from llama_space import Engine, Failure, Piece, Progress, worker, zerogpu
from llama_space.request import Request
from llama_space.values import Item, Reserved
from tests.rigs.heard import heard
from tests.rigs.refusals import refused

CHAT = [{"role": "user", "content": "Count."}]

_STARTS = 2
"""The impostor is started once to list devices, then to serve: these do what ``behave`` says."""


class Rig:
    """An engine on an archive that is made when the server's behaviour is set."""

    def __init__(self, folder: Path) -> None:
        self._archive = folder / "release.tar.gz"
        model = folder / "model.gguf"
        model.write_bytes(self_test.MODEL.read_bytes())
        self.given = {
            "llama_cpp_url": self._archive.as_uri(),
            "allow_cpu": True,
            "gguf_path": model,
            "store": folder / "store",
        }
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """The engine, which begins to prepare when it is first asked for."""
        self._engine = self._engine or Engine(**self.given)
        return self._engine

    def behave(self, **behaviour: Any) -> None:
        """Set what the server of the next archive does."""
        impostor_archive.write(self._archive, **behaviour)

    def behaving(self, **behaviour: Any) -> Engine:
        """Return the engine on a server that behaves so."""
        self.behave(**behaviour)
        return self.engine

    def answer(self) -> list[Item]:
        return list(self.engine.events(CHAT))

    def text(self) -> str:
        return "".join(one.text for one in self.answer() if isinstance(one, Piece))


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    made = Rig(tmp_path)
    yield made
    if made._engine is not None:
        made._engine._record.wait(20)
        made._engine.close()
    assert list(place.glob("*/*")) == []


def test_an_answer_and_what_is_remembered_of_it(rig: Rig) -> None:
    engine = rig.behaving()
    items = rig.answer()
    assert [one.text for one in items if isinstance(one, Piece)] == ["one", " two", " three", ""]
    last = [one for one in items if isinstance(one, Piece)][-1]
    assert last == Piece("", finished=True, tokens=3, tokens_per_second=50.0, reason="stop")
    state = engine.status()
    assert (state.phase, state.model, state.verified) == ("ready", "model.gguf", False)
    assert state.tokens_per_second == 50.0
    assert state.warm
    assert state.server_pid is not None
    (call,) = state.calls
    assert call.tokens == 3
    assert call.warm
    assert call.first_token is not None
    assert call.first_token <= call.seconds
    assert items[-1] == dataclasses.replace(call, reason="stop")
    assert (state.device, state.gpu_seconds_reserved, state.gpu_seconds_used) == ("CPU", 0, 0)
    assert {"fetch", "start", "first token"} <= set(state.seconds)
    assert "UNVERIFIED" in {note.code for note in state.notes}
    assert pickle.loads(pickle.dumps(state)) == state  # noqa: S301
    json.dumps(dataclasses.asdict(state))
    engine.retry()  # leaves a good preparation alone
    assert rig.text() == "one two three"
    assert engine.status().server_pid == state.server_pid


def test_keyword_hf_home_holds_the_store_and_the_models(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", constants.default_cache_path)
    del rig.given["store"]
    rig.given["hf_home"] = tmp_path / "home"
    assert rig.behaving().settings.store == tmp_path / "home/llama-loader"
    assert hub_client.cache() == tmp_path / "home/hub"


def test_what_fails_is_said_and_an_old_failure_is_no_answer_to_a_new_call(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (failure,) = [one for one in rig.answer() if not isinstance(one, Progress)]
    assert isinstance(failure, Failure)
    assert failure.exit_status == 3
    state = rig.engine.status()
    assert (state.phase, state.failure) == ("failed", failure)
    assert rig.answer() == [failure]
    with pytest.raises(NetworkError), rig.engine.server():
        pass
    with pytest.raises(NetworkError) as caught:
        list(rig.engine.prepare())  # which tries again
    assert (caught.value.exit_status, caught.value.code) == (3, failure.code)
    runtime = next(check for check in rig.engine.doctor().checks if check.name == "runtime")
    assert (runtime.ok, runtime.code) == (False, failure.code)
    rig.behave()
    monkeypatch.setattr("llama_space.values._AGAIN_AFTER", 0.0)  # it is old now
    assert rig.text() == "one two three"
    assert rig.engine.status().failure is None


def test_a_server_that_cannot_start_is_a_failure_of_the_preparation(rig: Rig) -> None:
    rig.behaving(exit=1, say=["E error loading model: oh no"])
    failure = rig.answer()[-1]
    assert isinstance(failure, Failure)
    assert (failure.code, failure.exit_status) == ("BAD_MODEL", 7)
    assert "oh no" in failure.message
    rig.behave()
    rig.engine.retry()
    assert rig.text() == "one two three"


def test_death_in_an_answer_is_said_and_the_next_call_finds_a_server(rig: Rig) -> None:
    engine = rig.behaving(chat="die", bad_starts=_STARTS)
    failure = rig.answer()[-1]
    assert isinstance(failure, Failure)
    assert failure.code in {"ANSWER_CUT", "NO_ANSWER"}
    assert "ask again" in failure.hint
    assert isinstance(failure.error(), ServerError)
    assert list(engine.chat(CHAT)) == ["one", " two", " three"]
    assert list(engine.complete("Count:", max_tokens=9, seed=1)) == ["one", " two", " three"]


def test_a_hang_before_the_first_word_costs_time_not_the_answer(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "SILENCE", 0.5)
    monkeypatch.setattr(server_module, "TOKEN_DEADLINE", 0.5)
    list(rig.behaving(answers=1, bad_starts=_STARTS).prepare())
    first = rig.engine.status().server_pid
    items = rig.answer()
    assert "".join(one.text for one in items if isinstance(one, Piece)) == "one two three"
    stages = {one.stage for one in items if isinstance(one, Progress)}
    assert {"waiting", "restart"} <= stages  # signs of life, while no word comes
    assert rig.engine.status().server_pid != first


def test_a_request_that_is_refused_is_raised_and_leaves_the_server_alone(rig: Rig) -> None:
    engine = rig.behaving(chat="refuse")
    with refused("REQUEST_REFUSED", ServerError, "the prompt is too long"):
        list(engine.chat(CHAT))
    failure = rig.answer()[-1]
    assert isinstance(failure, Failure)
    assert "raise LLAMA_SPACE_N_CTX" in failure.hint  # as a call that raises says it
    assert engine.status().warm


def test_a_stream_that_is_closed_ends_at_once_and_the_server_lives(rig: Rig) -> None:
    engine = rig.behaving(between=5)
    words = engine.chat(CHAT)
    assert next(words) == "one"
    began = time.monotonic()
    words.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 1
    assert len(engine.status().calls) == 1
    assert engine.status().warm


def test_a_hundred_calls_leave_nothing_behind(rig: Rig) -> None:
    engine = rig.behaving()

    def held() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    for _ in range(3):
        rig.answer()
    before = held()
    for number in range(100):
        if number % 10:
            assert rig.text() == "one two three"
        else:
            stream = engine.events(CHAT)
            next(stream)
            stream.close()
    assert comes(lambda: all(now <= then for now, then in zip(held(), before, strict=True)))
    assert len(engine.status().calls) == 20


def test_closed_engine_has_no_server_and_starts_one_for_the_next_call(rig: Rig) -> None:
    engine = rig.behaving()
    rig.answer()
    pid = engine.status().server_pid
    assert pid is not None
    engine.close()
    engine.close()
    assert not processes.lives(pid)
    state = engine.status()
    assert (state.phase, state.server_pid, state.warm) == ("closed", None, False)
    assert rig.text() == "one two three"
    state = engine.status()
    assert (state.phase, state.warm) == ("ready", True)
    assert state.server_pid not in {None, pid}


def test_close_ends_a_server_that_is_still_starting_before_it_returns(rig: Rig) -> None:
    engine = rig.behaving(loading=60)

    def starting() -> int | None:
        shared = worker._shared
        server = shared.server if shared is not None else None
        return server.pid if server is not None else None

    assert comes(lambda: starting() is not None)
    pid = starting()
    assert pid is not None
    began = time.monotonic()
    engine.close()
    assert not processes.lives(pid)
    assert time.monotonic() - began < 10
    assert engine._record.wait(20)
    assert engine._record.failure is not None
    assert engine._record.failure.code == "SERVER_STOPPED"
    state = engine.status()
    assert (state.phase, state.server_pid, state.failure) == ("closed", None, None)
    rig.behave()
    assert rig.text() == "one two three"


_INTERRUPTED = """
import contextlib, sys, time
from llama_space import Engine
archive, model, store, closes = sys.argv[1:]
engine = Engine(llama_cpp_url=archive, gguf_path=model, store=store, allow_cpu=True)
try:
    with contextlib.suppress(KeyboardInterrupt):
        list(engine.prepare())
        time.sleep(60)
finally:
    if closes == "closes":
        engine.close()
"""


@pytest.mark.parametrize(("closes", "loading"), [("closes", 60), ("leaves it to the end", 0)])
def test_a_second_ctrl_c_leaves_no_server_no_folder_and_no_traceback(
    tmp_path: Path, closes: str, loading: int
) -> None:
    archive, model, place = tmp_path / "a.tar.gz", tmp_path / "m.gguf", tmp_path / "tmp"
    impostor_archive.write(archive, deaf=True, loading=loading)  # SIGTERM alone does not end it
    model.write_bytes(self_test.MODEL.read_bytes())
    place.mkdir()
    given = [archive.as_uri(), str(model), str(tmp_path / "store"), closes]
    app = subprocess.Popen(
        [sys.executable, "-c", _INTERRUPTED, *given],
        env={**os.environ, "TMPDIR": str(place)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert comes(lambda: impostor_archive.starts(tmp_path / "store") == _STARTS, 30)
    (seen,) = (tmp_path / "store").rglob("seen.json")
    server = json.loads(seen.read_text())["pid"]
    for pause in (0.3, 0):
        app.send_signal(signal.SIGINT)
        time.sleep(pause)
    _, said = app.communicate(timeout=30)
    assert "Traceback" not in said
    assert not processes.lives(server)
    assert list(place.glob("*/*")) == []


def test_doctor_looks_at_what_was_prepared_and_fetches_nothing(rig: Rig, tmp_path: Path) -> None:
    """The archive is not pinned: a visitor's press must not bring the new bytes into the Space."""
    engine = rig.behaving()
    list(engine.prepare())
    installed = sorted(path.name for path in (tmp_path / "store" / "runtimes").iterdir())
    rig.behave(loading=0.1)
    report = engine.doctor()
    runtime = next(check for check in report.checks if check.name == "runtime")
    assert runtime.ok
    assert engine.status().digest in runtime.detail
    assert {"settings", "gpu", "runtime"} <= {check.name for check in report.checks}
    assert all(check.code for check in report.checks if not check.ok)
    assert "verdict: a model " in report.as_text()
    assert sorted(path.name for path in (tmp_path / "store" / "runtimes").iterdir()) == installed


def at_once(count: int, work: Callable[[], Any]) -> list[Any]:
    """Do something in so many threads; returns what came of each."""
    with ThreadPoolExecutor(count) as pool:
        return [one.result(30) for one in [pool.submit(work) for _ in range(count)]]


def test_prepare_gives_every_caller_all_events_and_waits(rig: Rig) -> None:
    engine = rig.behaving(loading=0.3)
    told: list[list[Event]] = at_once(3, lambda: list(engine.prepare()))
    assert engine.status().phase == "ready"
    assert told[0] == told[1] == told[2]
    stages = {one.name: one.seconds for one in told[0] if isinstance(one, Stage)}
    assert {"fetch", "start", "first token"} <= set(stages)
    assert stages["start"] >= 0.3
    assert "UNVERIFIED" in {one.code for one in told[0] if isinstance(one, Note)}
    assert list(engine.prepare()) == told[0]


def test_messages_that_make_no_sense_are_refused_before_anything_starts(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, messages = rig.behaving(), [{"role": "usr", "content": "x"}]
    monkeypatch.setattr(worker, "answer", None)
    with refused("MESSAGE_INVALID", SettingError, "role of message 1") as caught:
        engine.chat(messages)
    assert list(engine.events(messages)) == [Failure.of(caught.value)]


def test_two_first_calls_at_once_start_one_server(rig: Rig) -> None:
    engine = rig.behaving(loading=0.3)
    assert at_once(2, lambda: "".join(engine.chat(CHAT))) == ["one two three"] * 2
    assert len({call.warm for call in engine.status().calls}) == 1
    assert engine.status().server_pid is not None


def test_two_engines_share_no_key_no_answer_and_no_store(tmp_path: Path) -> None:
    """One server runs in a process: a call of the other engine ends it, also in an answer."""
    rigs = {}
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        rigs[name] = Rig(tmp_path / name)
        rigs[name].behave(words=[name] * 20_000, between=0.02)  # it never ends by itself
    try:
        keys: list[str] = []
        for name in ("first", "second", "first"):
            with rigs[name].engine.server() as address:
                keys.append(address.api_key)
            words = rigs[name].engine.chat(CHAT)
            assert next(words) == name
            port = int(address.base_url.rpartition(":")[2].partition("/")[0])
            for old in keys[:-1]:
                with refused("REQUEST_REFUSED", match="Invalid API Key"):
                    client.Client(port, old).completion("1", max_tokens=1)
        assert len({*keys}) == len(keys)
        assert next(rigs["second"].engine.chat(CHAT)) == "second"
        with pytest.raises(ServerError):
            assert {*words} == {"first"}
        runtimes = [tmp_path / name / "store" / "runtimes" for name in rigs]
        stores = [[one for one in place.iterdir() if one.is_dir()] for place in runtimes]
        assert [len(one) for one in stores] == [1, 1]
        assert not {one.name for one in stores[0]} & {one.name for one in stores[1]}
    finally:
        for rig in rigs.values():
            rig.engine.close()


def test_a_fork_has_an_engine_and_a_server_of_its_own(rig: Rig) -> None:
    """A ZeroGPU worker is a fork; it may be made while threads of the app hold any lock."""
    engine = rig.behaving()
    list(engine.prepare())
    pid = engine.status().server_pid
    with worker._lock, engine._record._changed:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        child = context.Process(target=_answer_in_a_fork, args=(engine, theirs))
        child.start()
    text, server = ours.recv()
    child.join(10)
    assert (text, child.exitcode) == ("one two three", 0)
    assert server != pid
    assert comes(lambda: not processes.lives(server))
    assert rig.text() == "one two three"


def test_a_fork_lets_go_of_what_the_preparation_has_open_in_the_store(rig: Rig) -> None:
    """Otherwise the fork waits for a lock that it holds itself, and cannot execute the program."""
    engine = rig.behaving()
    list(engine.prepare())
    lock, program = engine.settings.store / "a.lock", engine.settings.store / "program"
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    with lock.open("w") as held, program.open("wb") as written:
        fcntl.flock(held, fcntl.LOCK_EX)
        written.write(Path("/bin/true").read_bytes())
        program.chmod(0o755)
        child = context.Process(target=theirs.recv)
        child.start()
    try:
        with lock.open("w") as again:
            assert comes(lambda: _locked(again))
        subprocess.run([program], check=True)
    finally:
        ours.send(None)
        child.join(10)
    assert child.exitcode == 0


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _answer_in_a_fork(engine: Engine, told: Any) -> None:
    text = "".join(engine.chat(CHAT))
    told.send((text, engine.status().server_pid))


def test_importing_the_engine_loads_neither_gradio_nor_torch() -> None:
    heavy = ("gradio", "torch", "spaces", "requests", "huggingface_hub", "numpy")
    loaded = f"[name for name in {heavy} if name in sys.modules]"
    code = f"import sys; from llama_space import Engine; print({loaded})"
    done = heard([sys.executable, "-c", code], cwd=PROJECT / "spaces", check=True)
    assert done.stdout.strip() == "[]"


def test_a_setting_that_is_unknown_or_cannot_be_read_is_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which a failure replaces
    with pytest.raises(SettingError, match="n_ctx"):  # a near one
        Engine(nctx=1)
    with pytest.raises(SettingError):
        Engine(n_ctx="lots")
    monkeypatch.setenv("YAKULINGO_SPACES_N_CTX", "lots")
    with pytest.raises(SettingError, match="N_CTX"):
        Engine()


def test_app_is_told_in_lines_that_name_its_own_variables(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = heard(
        [sys.executable, "-c", "from llama_space import Engine; Engine()"],
        cwd=PROJECT / "spaces",
        env={"LLAMA_SPACE_ALLOW_CPU": "yes1"},
    )
    assert done.returncode == 1
    assert done.stderr.startswith(
        "llama_space: error[SETTING_INVALID]: LLAMA_SPACE_ALLOW_CPU is 'yes1', which"
    )
    assert "Traceback" not in done.stderr
    monkeypatch.setenv("LLAMA_SPACE_OFFLINE", "1")
    rig.behave()
    named = {"gguf_path": None, "gguf_repo_id": "me/none", "gguf_filename": "none.gguf"}
    rig.given |= named
    with refused("OFFLINE") as caught:
        list(rig.engine.chat(CHAT))
    assert "LLAMA_SPACE_OFFLINE=0" in caught.value.hint
    assert "name a file in the keyword gguf_path instead of gguf_repo_id" in caught.value.hint
    notes = [one for one in rig.engine._record._events if isinstance(one, Note)]
    assert [note.hint.partition("=")[0] for note in notes] == ["set LLAMA_SPACE_LLAMA_CPP_SHA256"]
    note = rig.engine._named(Note("MODEL_ON_CPU", "", "set YAKULINGO_SPACES_ALLOW_CPU=1"))
    assert note.hint == "set allow_cpu=1"  # a keyword of this engine


def test_a_worker_that_was_ended_before_the_job_came_is_replaced_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    class Aborted(Exception):  # noqa: N818 - stands for gradio.Error
        title = "ZeroGPU worker error"

    def decorated(ready: Any, wanted: Any) -> Iterator[Any]:
        calls.append((ready, wanted))
        if len(calls) % 2:
            raise Aborted("GPU task aborted")
        yield Progress("start")

    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(Error=Aborted))
    wanted = Request("text", {}, Reserved(20, 10))
    items = list(zerogpu.call(decorated, 1, wanted))  # type: ignore[arg-type]
    reserved = wanted.reserved
    assert items == [Progress("queue"), reserved, reserved, Progress("start")]
    assert calls == [(1, wanted), (1, wanted)]
