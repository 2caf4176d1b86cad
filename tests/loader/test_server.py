import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from waiting import comes, until

from llama_loader import devices, processes, self_test
from llama_loader import server as server_module
from llama_loader.errors import HostError, IntegrityError, LoaderError, ServerError
from llama_loader.server import Server
from llama_loader.server_plan import ServerPlan
from tests.rigs import http_served
from tests.rigs.heard import heard, script
from tests.rigs.impostor_archive import Impostor
from tests.rigs.refusals import refused

ENVIRON = processes.environment({"PATH": os.environ["PATH"]})
SPACES = Path(__file__).parent.parent.parent / "spaces"


def plan(runtime: Path, **changes: Any) -> ServerPlan:
    default = ServerPlan(
        runtime=runtime, model=Path("/m.gguf"), environ=ENVIRON, startup_timeout=20.0
    )
    return replace(default, **changes)


def gone(pid: int, within: float = 2.0) -> bool:
    return comes(lambda: not processes.lives(pid), within)


@pytest.fixture(autouse=True)
def nothing_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    yield
    assert list(place.iterdir()) == []


def without(option: str, program: Path, then: str) -> Path:
    """Write a server that does not know an option, and does something else without it."""
    refuse = f"case \"$*\" in *{option}*) echo 'error: invalid argument: {option}'; exit 1;; esac"
    return script(program, f"#!/bin/sh\n{refuse}\n{then}\n")


def failure(runtime: Path, **changes: Any) -> LoaderError:
    with pytest.raises(LoaderError) as caught:
        Server(plan(runtime, **changes)).start()
    return caught.value


def test_it_starts_answers_and_ends(impostor: Impostor) -> None:
    port = server_module.free_port()
    with Server(plan(impostor.behave(loading=0.2), port=port)) as server:
        assert server.started is not None
        assert 0.2 <= server.started[0] <= server.started[1]
        pid = server.pid
        assert pid is not None
        assert server.url == f"http://127.0.0.1:{port}"
        assert processes.listens(pid, port) is True
        assert processes.listens(os.getpid(), port) is False
        assert server.client().completion("x", max_tokens=1).text == "!"
        assert os.getpgid(pid) == pid
        assert not server.wait(0.01)
    assert gone(pid)
    assert server.pid is None
    server.stop()


def test_before_is_called_last_before_each_execution(impostor: Impostor) -> None:
    """It hashes the runtime: nothing that takes time may come between that and the execution."""
    ready: list[tuple[int, bool, list[str]]] = []
    server = Server(plan(impostor.behave()), before=lambda: ready.append(at()))

    def at() -> tuple[int, bool, list[str]]:
        limits = Path(f"/proc/{server.pid}/limits").read_text()
        # the last thing that the launcher does before it waits for the command
        core = next(line.split()[4:6] for line in limits.splitlines() if "core file" in line)
        return server.port, server.api_key is not None, core

    with server:
        assert ready == [(server.port, True, ["0", "0"])]


def test_the_time_of_before_is_not_taken_from_the_startup_timeout(impostor: Impostor) -> None:
    """A damaged runtime is downloaded again then."""
    limited = plan(impostor.behave(loading=60), startup_timeout=0.8)
    server = Server(limited, before=lambda: time.sleep(0.8))
    began = time.monotonic()
    with pytest.raises(ServerError, match=r"loads the model still|does not listen"):
        server.start()
    assert time.monotonic() - began > 1.5


def test_what_before_raises_or_a_stop_meanwhile_prevents_the_execution(impostor: Impostor) -> None:
    server = Server(plan(impostor.behave()))

    def damaged() -> None:
        raise IntegrityError("RUNTIME_DAMAGED", "it changed")

    for before, code in ((damaged, "RUNTIME_DAMAGED"), (server.stop, "SERVER_STOPPED")):
        server.before = before
        with refused(code, LoaderError):
            server.start()
    assert not (impostor.folder / "starts").exists()


def test_nothing_hostile_is_passed_on(impostor: Impostor, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LLAMA_ARG_CTX_SIZE", "AIP_HTTP_PORT", "LD_PRELOAD", "HF_TOKEN", "PYTHONPATH"):
        monkeypatch.setenv(name, "1" if name != "LD_PRELOAD" else "")
    with Server(plan(impostor.behave())):
        seen = impostor.seen()["environ"]
    assert set(seen) - {"LC_CTYPE"} == {"PATH", "GGML_NO_BACKTRACE"}


@pytest.mark.parametrize("pinned_build", [True, False])
def test_a_cpu_that_announces_too_much_is_tried_again_without_repacking(
    impostor: Impostor, pinned_build: bool
) -> None:
    runtime = impostor.behave(signal=signal.SIGILL, bad_starts=1)
    looked: list[int] = []

    def look() -> None:  # before every execution, a second try's too
        looked.append(impostor.starts() if looked else 0)

    with Server(plan(runtime, pinned_build=pinned_build), before=look) as server:
        assert "--no-repack" in impostor.seen()["argv"]
        assert not server.plan.repacked
    assert looked == [0, 1]
    assert impostor.starts() == 2


def test_a_build_too_old_for_that_is_told_as_what_it_is(tmp_path: Path) -> None:
    """Not as one that was given a wrong argument: nobody gave it any."""
    without("--no-repack", tmp_path / "llama-server", "kill -ILL $$")
    error = failure(tmp_path)
    assert (error.code, error.exit_status) == ("ILLEGAL_INSTRUCTION", 5)


def test_layers_that_do_not_fit_are_left_to_the_server(impostor: Impostor) -> None:
    no_memory = "allocating 9000.00 MiB on device 0: cudaMalloc failed: out of memory"
    runtime = impostor.behave(say=[no_memory], exit=1)
    changes = {"pinned_build": True, "model": self_test.MODEL, "main_memory": 1 << 30}
    error = failure(runtime, devices=("CUDA0",), **changes)
    assert (error.code, impostor.starts()) == ("OUT_OF_MEMORY", 2)  # once more, not for ever
    runtime = impostor.behave(say=[no_memory], exit=1, bad_starts=3)
    with Server(plan(runtime, devices=("CUDA0",), **changes)) as server:
        argv = impostor.seen()["argv"]
        assert argv[argv.index("--n-gpu-layers") + 1] == "-1"
        assert "--fit" not in argv
        assert server.plan.fitted


def test_a_port_that_is_taken_is_named(impostor: Impostor) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        port = other.getsockname()[1]
        error = failure(impostor.behave(), port=port)
    assert (error.code, error.exit_status) == ("PORT_IN_USE", 7)
    assert str(port) in error.message
    assert not (impostor.folder / "starts").exists()


STRANGER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
HEADING = "  sl  local_address rem_address st tx_queue tr tm->when retrnsmt uid timeout inode"
ROW = "   0: {}:{:04X} 00000000:0000 {} 00000000:00000000 00:00000000 00000000 0 0 {} 1 0 100"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], None),
        ([ROW.format("0100007F", 80, "0A", 0)], None),
        ([ROW.format("0100007F", 80, "0A", 7)], True),
        ([ROW.format("00000000", 80, "0A", 7)], True),
        ([ROW.format("0100007F", 80, "0A", 8)], False),
        ([ROW.format("0100007F", 81, "0A", 7)], False),
        ([ROW.format("0100007F", 80, "01", 7)], False),
        (["nonsense"], None),
    ],
)
def test_who_listens_is_read_from_the_table_of_sockets(
    rows: list[str], expected: object, tmp_path: Path
) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net/tcp").write_text("\n".join([HEADING, *rows]) + "\n")
    (tmp_path / "5/fd").mkdir(parents=True)
    (tmp_path / "5/fd/3").symlink_to("socket:[7]")
    assert processes.listens(5, 80, proc=tmp_path) is expected
    assert processes.listens(6, 80, proc=tmp_path / "nowhere") is None


def test_a_program_that_binds_the_port_first_never_sees_a_key(
    impostor: Impostor, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[bytes] = []
    start = processes.Program.start

    def watched(self: processes.Program, argv: list[str], environ: Any, **more: Any) -> Any:
        keys.append(more["text"].strip())
        return start(self, argv, environ, **more)

    monkeypatch.setattr(processes.Program, "start", watched)
    with http_served.sending(STRANGER) as (port, seen):
        for known in (True, False):  # whether /proc tells whose the port is
            if not known:
                monkeypatch.setattr(processes, "listens", lambda *_: None)
            runtime = impostor.behave(never_listen=port)
            ports = iter([port, port, server_module.free_port()])
            with monkeypatch.context() as patch:
                patch.setattr(server_module, "free_port", lambda _, ports=ports: next(ports))
                with Server(plan(runtime)) as server:
                    assert server.port != port
                    assert (server.api_key or "").encode() == keys[-1]
            with monkeypatch.context() as patch:  # also if there is no other free port
                patch.setattr(server_module, "free_port", lambda _: port)
                error = failure(runtime)
            assert error.code == "PORT_IN_USE"
            assert f"another program answers on port {port}" in error.message
    assert len(set(keys)) == len(keys) == 2 * (3 + 4)
    assert seen
    assert all(keys)
    assert not [one for one in seen for key in keys if key in one]


def test_a_program_that_takes_the_port_of_a_dead_server_never_sees_the_key(
    impostor: Impostor,
) -> None:
    with Server(plan(impostor.behave())) as server, http_served.sending(STRANGER) as (port, seen):
        client = server.client(timeout=5)
        client.port = port  # as if the server had ended and another program had its port
        server.port = port
        for ask in (
            lambda: client.completion("secret", max_tokens=1),
            lambda: list(client.chat([{"role": "user"}], max_tokens=1)),
            lambda: client.status("/slots", 5),
        ):
            with pytest.raises(ServerError, match="another program has its port"):
                ask()
        assert not any(seen)


def test_a_free_port_that_is_lost_to_somebody_is_tried_again(impostor: Impostor) -> None:
    runtime = impostor.behave(
        bad_starts=2, say=["E srv start: couldn't bind HTTP server socket, port: 1"], exit=1
    )
    with Server(plan(runtime)):
        assert impostor.starts() == 3


@pytest.mark.parametrize(
    ("do", "kind", "code", "words"),
    [
        ({"signal": 9}, ServerError, "SERVER_KILLED", "SIGKILL) while loading"),
        ({"completion": "die"}, ServerError, "CUDA_ERROR", "illegal memory access"),
        ({"completion": "refuse"}, ServerError, "REQUEST_REFUSED", "the context is full"),
        ({"completion": "garbage"}, ServerError, "NOT_LLAMA_SERVER", "not llama-server"),
    ],
)
def test_a_start_that_fails_says_why_and_leaves_no_process(
    impostor: Impostor, do: dict[str, Any], kind: type[LoaderError], code: str, words: str
) -> None:
    error = failure(impostor.behave(**do))
    assert (type(error), error.code) == (kind, code)
    assert words in error.message
    assert gone(impostor.seen()["pid"])


@pytest.mark.parametrize(
    ("do", "words"),
    [
        ({"never_listen": True, "say": ["thinking"]}, "does not listen after 2 s"),
        ({"loading": 60}, "loads the model still after 2 s"),
        ({"completion": "hang"}, "is loaded, but does not answer after 2 s"),
    ],
)
def test_a_start_that_takes_too_long(impostor: Impostor, do: dict[str, Any], words: str) -> None:
    started = time.monotonic()
    error = failure(impostor.behave(**do), startup_timeout=2.0)
    assert error.code == "START_TIMEOUT"
    assert words in error.message
    assert time.monotonic() - started < 8
    assert gone(impostor.seen()["pid"])


ELF = bytearray(Path(sys.executable).read_bytes()[:4096].ljust(4096, b"\0"))
OTHER_MACHINE = bytes(ELF[:18] + b"\xf3\0" + ELF[20:])
NO_LOADER = b"#!/lib/ld-nowhere.so.2\n"


@pytest.mark.parametrize(
    ("content", "mode", "reason"),
    [
        (None, 0, "it, or the dynamic loader that it needs, is not on this system"),
        (b"hello", 0o755, "it is no program, or built for another processor"),
        (OTHER_MACHINE, 0o755, "it is no program, or built for another processor"),
        (NO_LOADER, 0o755, "it, or the dynamic loader that it needs, is not on this system"),
        (b"#!/bin/sh\n", 0o644, "its disk is mounted noexec, or this user may not execute it"),
    ],
)
def test_what_cannot_be_executed_is_told_at_once_with_the_reason(
    tmp_path: Path, content: bytes | None, mode: int, reason: str
) -> None:
    program = tmp_path / "llama-server"
    if content is not None:
        program.write_bytes(content)
        program.chmod(mode)
    with refused("RUNTIME_NOT_EXECUTABLE", HostError) as caught:
        Server(plan(tmp_path)).keep()
    assert f"{program}: " in caught.value.message
    assert f"({reason})" in caught.value.message
    assert "--store" in caught.value.hint
    with refused("RUNTIME_NOT_EXECUTABLE", HostError, re.escape(f"({reason})")):
        devices.list_devices(tmp_path, ENVIRON)


def test_ten_megabytes_of_log_at_once(impostor: Impostor) -> None:
    with Server(plan(impostor.behave(flood=10_000_000))) as server:
        assert len(server._log.tail()) == 200
        assert server._log.tail()[0] == "x" * 999
        assert server.client().completion("x", max_tokens=1).text == "!"


def test_the_group_goes_too_and_deafness_does_not_help(
    impostor: Impostor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_loader.server.STOP_GRACE", 0.3)
    with Server(plan(impostor.behave(child=True, deaf=True))) as server:
        pid = server.pid
        child = int((impostor.folder / "child").read_text())
        assert processes.lives(child)
        assert pid is not None
    assert gone(pid)
    assert gone(child)


def test_a_model_on_the_cpu_is_an_error_unless_allowed(impostor: Impostor) -> None:
    say = [
        "load_tensors: offloaded 0/31 layers to GPU",
        "load_tensors:   CPU_Mapped model buffer size =    92.10 MiB",
    ]
    runtime = impostor.behave(say=say)
    error = failure(runtime, devices=("CUDA0",))
    assert (error.code, error.exit_status) == ("MODEL_ON_CPU", 5)
    assert "CUDA0, but it is in CPU_Mapped" in error.message
    with Server(plan(runtime, devices=("CUDA0",), allow_cpu=True)) as server:
        assert server.report.offloaded == 0
    good = impostor.behave(say=[*say, "load_tensors: CUDA0 model buffer size = 900.00 MiB"])
    with Server(plan(good, devices=("CUDA0",))) as server:
        assert server.report.buffers["CUDA0"] == 900 * 1024**2


def test_killed_parents_leave_no_orphans() -> None:
    """Row 56 of docs/faults.md: 20 of them here, as many times more as FAULTS_SCALE says."""
    count = 20 * int(os.environ.get("FAULTS_SCALE", "1"))
    done = heard(
        [sys.executable, str(SPACES.parent / "tests/rigs/orphans.py"), str(count)],
        env={**os.environ, "PYTHONPATH": str(SPACES)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["orphans"] == 0


@pytest.mark.model
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda _: None, "No such file or directory"),
        (lambda model: model.read_bytes()[:20_000_000], "not within the file bounds"),
        (lambda _: b"hello", "invalid magic"),
        (lambda _: b"", "failed to load model"),
        (
            lambda model: model.read_bytes().replace(
                b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama",
                b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0zorko",
                1,
            ),
            "zorko",
        ),
    ],
    ids=["missing", "truncated", "not-gguf", "empty", "unknown-architecture"],
)
def test_the_real_server_says_what_is_wrong_with_a_model(
    real_runtime: Path, real_model: Path, tmp_path: Path, make: Any, words: str
) -> None:
    model = tmp_path / "bad.gguf"
    data = make(real_model)
    if data is not None:
        model.write_bytes(data)
    error = failure(real_runtime, model=model, startup_timeout=60.0)
    assert (error.code, error.exit_status) == ("BAD_MODEL", 7)
    assert words in error.message


@pytest.mark.model
def test_the_real_server_without_memory(real_runtime: Path, real_model: Path) -> None:
    """A context of 16 million tokens: 360 GB of cache."""
    error = failure(real_runtime, model=real_model, n_ctx=16_000_000, startup_timeout=60.0)
    assert error.code == "OUT_OF_MEMORY"
    assert "MB" in error.message or "size" in error.message


@pytest.mark.model
@pytest.mark.parametrize(
    ("argument", "words"),
    [("--frobnicate", "--frobnicate"), ("--help", "not serve"), ("--list-devices", "not serve")],
)
def test_the_real_server_with_an_argument_that_it_cannot_serve_with(
    real_runtime: Path, real_model: Path, argument: str, words: str
) -> None:
    error = failure(real_runtime, model=real_model, extra=(argument,))
    assert (error.code, error.exit_status) == ("SERVER_ARGUMENT_INVALID", 2)
    assert words in error.message


class Interrupt:
    """Interrupts this thread when it comes to the nth line of the loader's modules."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.seen: set[tuple[str, int]] = set()

    def __call__(self, frame: FrameType, event: str, _: object) -> Any:
        if frame.f_globals.get("__name__") not in {"llama_loader.server", "llama_loader.processes"}:
            return None
        place = (frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and place not in self.seen:
            self.seen.add(place)
            if len(self.seen) == self.number:
                raise KeyboardInterrupt
        return self


def interrupted(runtime: Path, number: int) -> int:
    """Start a server with an interrupt at the nth line; returns how many lines there were."""
    server, interrupt, before = Server(plan(runtime)), Interrupt(number), sys.gettrace()
    sys.settrace(interrupt)
    try:
        server.start()
    except KeyboardInterrupt:
        pass
    else:
        sys.settrace(before)
        server.stop()
    finally:
        sys.settrace(before)  # coverage's
    assert server.pid is None
    return len(interrupt.seen)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # closed by gc
def test_an_interrupt_at_any_line_of_a_start_leaves_nothing(
    impostor: Impostor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here at every eighth line; at all of them where FAULTS_SCALE is 8 or more."""
    monkeypatch.setattr(processes, "_PATIENCE", 0.5)  # for a thread that was never started
    runtime, before = impostor.behave(), threading.active_count()
    step = max(1, 8 // int(os.environ.get("FAULTS_SCALE", "1")))
    lines = interrupted(runtime, 0)
    assert lines > 80
    for number in range(1, lines, step):
        interrupted(runtime, number)
        until(lambda: threading.active_count() <= before, "its threads end", 10)
    assert not [
        pid for pid in (runtime / "starts").read_text().split() if processes.lives(int(pid))
    ]
