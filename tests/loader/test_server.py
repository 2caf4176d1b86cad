from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from waiting import until

from llama_loader import processes, self_test, server_log
from llama_loader import server as server_module
from llama_loader.client import Client
from llama_loader.errors import HostError, IntegrityError, LoaderError, ServerError, SettingError
from llama_loader.server import Server
from llama_loader.server_plan import ServerPlan
from llama_loader.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from conftest import Impostor

ENVIRON = processes.environment({"PATH": os.environ["PATH"]})
SPACES = Path(__file__).parent.parent.parent / "spaces"


def plan(runtime: Path, **changes: Any) -> ServerPlan:
    default = ServerPlan(
        runtime=runtime, model=Path("/m.gguf"), environ=ENVIRON, startup_timeout=20.0
    )
    return replace(default, **changes)


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def gone(pid: int, within: float = 2.0) -> bool:
    deadline = time.monotonic() + within
    while alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture(autouse=True)
def nothing_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    yield
    assert list(place.iterdir()) == []


def failure(runtime: Path, **changes: Any) -> LoaderError:
    with pytest.raises(LoaderError) as caught:
        Server(plan(runtime, **changes)).start()
    return caught.value


def test_it_starts_answers_and_ends(impostor: Impostor) -> None:
    with Server(plan(impostor.behave(loading=0.2))) as server:
        assert server.started is not None
        assert 0.2 <= server.started.loaded <= server.started.first_token
        pid = server.pid
        assert pid is not None
        assert server.url == f"http://127.0.0.1:{server.port}"
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
    with pytest.raises(ServerError, match="loads the model still"):
        server.start()
    assert time.monotonic() - began > 1.5


def test_what_before_raises_prevents_the_execution(impostor: Impostor) -> None:
    def before() -> None:
        raise IntegrityError("RUNTIME_DAMAGED", "it changed")

    with pytest.raises(IntegrityError):
        Server(plan(impostor.behave()), before=before).start()
    assert not (impostor.folder / "starts").exists()


def test_the_key_is_random_private_and_not_on_the_command_line(impostor: Impostor) -> None:
    with Server(plan(impostor.behave())) as one, Server(plan(impostor.behave())) as two:
        assert one.api_key
        assert two.api_key
        assert one.api_key != two.api_key
        seen = impostor.seen()
        argv = seen["argv"]
        assert argv[argv.index("--api-key-file") + 1] == "/dev/stdin"
        assert two.api_key not in json.dumps(seen)
        assert not list(Path(tempfile.gettempdir()).iterdir())
        with pytest.raises(ServerError, match="Invalid API Key"):
            Client(two.port, one.api_key).completion("x", max_tokens=1)


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
    program = tmp_path / "llama-server"
    program.write_text(
        '#!/bin/sh\ncase "$*" in *--no-repack*)'
        " echo 'error: invalid argument: --no-repack'; exit 1;; esac\nkill -ILL $$\n"
    )
    program.chmod(0o755)
    error = failure(tmp_path)
    assert (error.code, error.exit_status) == ("ILLEGAL_INSTRUCTION", 5)


SPILLS = {
    "pinned_build": True,
    "devices": ("CUDA0",),
    "model": self_test.MODEL,
    "main_memory": 1 << 30,
}
NO_MEMORY = "allocating 9000.00 MiB on device 0: cudaMalloc failed: out of memory"


def test_layers_that_do_not_fit_are_left_to_the_server(impostor: Impostor) -> None:
    runtime = impostor.behave(say=[NO_MEMORY], exit=1, bad_starts=1)
    with Server(plan(runtime, **SPILLS)) as server:
        argv = impostor.seen()["argv"]
        assert argv[argv.index("--n-gpu-layers") + 1] == "-1"
        assert "--fit" not in argv
        assert server.plan.fitted
    assert impostor.starts() == 2


@pytest.mark.parametrize(
    ("changes", "starts"),
    [
        ({"pinned_build": False}, 1),  # may not know how to fit
        ({"n_gpu_layers": 20}, 1),  # asked for
        ({"devices": ()}, 1),  # on the CPU there is no room to be made
        ({"n_ctx": 16_777_216}, 1),  # main memory has no room for it, either
        ({"main_memory": 0}, 1),  # … or nobody knows
        ({"model": Path("/m.gguf")}, 1),
        ({}, 2),  # once more, not for ever
    ],
)
def test_what_cannot_be_eased_is_an_error(
    changes: dict[str, Any], starts: int, impostor: Impostor
) -> None:
    error = failure(impostor.behave(say=[NO_MEMORY], exit=1), **SPILLS | changes)
    assert error.code == "OUT_OF_MEMORY"
    assert impostor.starts() == starts


def test_the_command_line(impostor: Impostor) -> None:
    runtime = impostor.behave()
    wanted = plan(
        runtime,
        devices=("CUDA0", "CUDA1"),
        n_ctx=8192,
        pinned_build=True,
        allow_cpu=True,
        extra=("--threads", "3"),
    )
    with Server(wanted) as server:
        argv = impostor.seen()["argv"]
        text = " ".join(argv)
        assert f"--model /m.gguf --host 127.0.0.1 --port {server.port} --ctx-size 8192" in text
        assert "--n-gpu-layers 999 --device CUDA0,CUDA1" in text
        assert "--cors-origins localhost --threads 1 --fit off" in text
        assert text.endswith("--no-webui --no-warmup --threads 3")
    with Server(plan(runtime, key=None)) as server:
        text = " ".join(impostor.seen()["argv"])
        assert "--n-gpu-layers 0 --device none" in text
        assert "--fit" not in text
        assert "--cors-origins" not in text
        assert "api-key" not in text
        assert server.api_key is None


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"devices": ()}, id="on the CPU"),
        pytest.param({"n_gpu_layers": 20}, id="some layers are on the CPU"),
        pytest.param({"n_gpu_layers": -1}, id="some layers may be on the CPU"),
    ],
)
def test_all_threads_where_the_cpu_has_layers(impostor: Impostor, changes: dict[str, Any]) -> None:
    wanted = plan(impostor.behave(), **{"devices": ("CUDA0",), "pinned_build": True} | changes)
    assert "--threads" not in wanted.argv(1)
    limited = replace(wanted, threads=2).argv(1)
    assert limited[limited.index("--threads") + 1] == "2"


def test_a_port_that_is_taken_is_named(impostor: Impostor) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        port = other.getsockname()[1]
        error = failure(impostor.behave(), port=port)
    assert (error.code, error.exit_status) == ("PORT_IN_USE", 7)
    assert str(port) in error.message
    assert not (impostor.folder / "starts").exists()


def test_a_port_of_ones_own(impostor: Impostor) -> None:
    port = server_module.free_port()
    with Server(plan(impostor.behave(), port=port)) as server:
        assert server.port == port
        assert server_module.listens(server.pid or 0, port) is True
        assert server_module.listens(os.getpid(), port) is False
    assert server_module.listens(os.getpid(), port) is not True


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
    assert server_module.listens(5, 80, proc=tmp_path) is expected
    assert server_module.listens(6, 80, proc=tmp_path / "nowhere") is None


def test_stopped_while_it_is_hashed(impostor: Impostor) -> None:
    server = Server(plan(impostor.behave()))
    server.before = server.stop
    with pytest.raises(ServerError) as caught:
        server.start()
    assert caught.value.code == "SERVER_STOPPED"
    assert not (impostor.folder / "starts").exists()


@contextlib.contextmanager
def recording() -> Iterator[tuple[int, list[bytes]]]:
    """Another program: answers 200 to everything, and keeps all that it receives."""
    listener = socket.create_server(("127.0.0.1", 0))
    seen: list[bytes] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    seen.append(connection.recv(65536))
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1], seen
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def test_a_program_that_binds_the_port_first_never_sees_a_key(
    impostor: Impostor, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[bytes] = []
    start = processes.Program.start

    def watched(self: processes.Program, argv: list[str], environ: Any, **more: Any) -> Any:
        keys.append(more["text"].strip())
        return start(self, argv, environ, **more)

    monkeypatch.setattr(processes.Program, "start", watched)
    with recording() as (port, seen):
        for known in (True, False):  # whether /proc tells whose the port is
            if not known:
                monkeypatch.setattr(server_module, "listens", lambda *_: None)
            runtime = impostor.behave(never_listen=True, bad_starts=len(keys) + 2)
            ports = iter([port, port, server_module.free_port()])
            with monkeypatch.context() as patch:
                patch.setattr(server_module, "free_port", lambda ports=ports: next(ports))
                with Server(plan(runtime)) as server:
                    assert server.port != port
                    assert (server.api_key or "").encode() == keys[-1]
    assert len(set(keys)) == len(keys) == 6
    assert seen
    assert all(keys)
    assert not [one for one in seen for key in keys if key in one]


def test_a_program_that_takes_the_port_of_a_dead_server_never_sees_the_key(
    impostor: Impostor,
) -> None:
    with Server(plan(impostor.behave())) as server, recording() as (port, seen):
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


def test_a_stranger_on_the_port_is_found_out(
    impostor: Impostor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our server hangs before it binds, and somebody else binds the port meanwhile."""
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "llama-server").write_bytes((impostor.folder / "llama-server").read_bytes())
    (stranger / "llama-server").chmod(0o755)
    (stranger / "behaviour.json").write_text('{"keyless": true}')
    with Server(plan(stranger, key=None)) as other:
        monkeypatch.setattr(server_module, "free_port", lambda: other.port)
        for proc_is_there in (True, False):
            if not proc_is_there:
                monkeypatch.setattr(server_module, "listens", lambda *_: None)
            error = failure(impostor.behave(never_listen=True))
            assert error.code == "PORT_IN_USE"
            assert f"another program answers on port {other.port}" in error.message
        assert other.client().completion("x", max_tokens=1).text == "!"


def test_a_free_port_that_is_lost_to_somebody_is_tried_again(impostor: Impostor) -> None:
    runtime = impostor.behave(
        bad_starts=2, say=["E srv start: couldn't bind HTTP server socket, port: 1"], exit=1
    )
    with Server(plan(runtime)):
        assert impostor.starts() == 3


@pytest.mark.parametrize(
    ("do", "kind", "code", "words"),
    [
        (
            {
                "say": [
                    (
                        "0.00.1.2 E ggml_backend_cuda_buffer_type_alloc_buffer: allocating"
                        " 15000.50 MiB on device 0: cudaMalloc failed: out of memory"
                    ),
                    (
                        "0.00.1.3 E llama_model_load: error loading model: unable to allocate CUDA0"
                        " buffer"
                    ),
                ],
                "exit": 1,
            },
            ServerError,
            "OUT_OF_MEMORY",
            (
                "not enough GPU memory for the model and its context; its last lines:"
                " ggml_backend_cuda_buffer_type_alloc_buffer: allocating 15000.50 MiB on device 0"
            ),
        ),
        (
            {
                "say": [
                    "0.0.1.2 E load: unknown model architecture: 'zork'",
                    "0.0.1.3 E srv load_model: failed to load model, '/m.gguf'",
                ],
                "exit": 1,
            },
            ServerError,
            "BAD_MODEL",
            "unknown model architecture: 'zork'",
        ),
        (
            {"say": ["error: invalid argument: --frob"], "exit": 1},
            SettingError,
            "SERVER_ARGUMENT_INVALID",
            "--frob",
        ),
        (
            {"say": ['error while handling argument "--device": invalid device: CUDA7'], "exit": 1},
            HostError,
            "INVALID_DEVICE",
            "CUDA7",
        ),
        (
            {
                "say": [
                    (
                        "llama-server: error while loading shared libraries: libcublas.so.12:"
                        " cannot open shared object file"
                    )
                ],
                "exit": 127,
            },
            HostError,
            "LIBRARY_MISSING",
            "libcublas.so.12",
        ),
        (
            {
                "say": ["CUDA error: no kernel image is available for execution on the device"],
                "signal": 6,
            },
            HostError,
            "NO_KERNEL_IMAGE",
            "no code for this GPU",
        ),
        (
            {"say": ["CUDA error: misaligned address"], "signal": 6},
            ServerError,
            "CUDA_ERROR",
            "misaligned",
        ),
        *(
            ({"say": [line], "signal": 6}, HostError, "DRIVER_TOO_OLD", line)
            for line in (
                "CUDA error: the provided PTX was compiled with an unsupported toolchain.",
                "CUDA error: forward compatibility was attempted on non supported HW",
                "CUDA error: system has unsupported display driver / cuda driver combination",
            )
        ),
        (
            {
                "say": [
                    (
                        "/r/llama-server: symbol lookup error: /opt/old/libcublas.so.12:"
                        " undefined symbol: cublasLtFoo, version libcublasLt.so.12"
                    )
                ],
                "exit": 127,
            },
            HostError,
            "LIBRARY_MISMATCH",
            "symbol lookup error: /opt/old/libcublas.so.12",
        ),
        (
            {
                "say": [
                    (
                        "/r/llama-server: /opt/old/libcudart.so.12: version `libcudart.so.12' not"
                        " found (required by /r/libggml-cuda.so)"
                    )
                ],
                "exit": 1,
            },
            HostError,
            "LIBRARY_MISMATCH",
            "/opt/old/libcudart.so.12",
        ),
        (
            {
                "say": [
                    (
                        "llama-server: error while loading shared libraries: /s/libllama.so.0:"
                        " failed to map segment from shared object"
                    )
                ],
                "exit": 127,
            },
            HostError,
            "RUNTIME_NOT_EXECUTABLE",
            "noexec",
        ),
        (
            {
                "say": ["0.0.0.1 I llama_model_loader: - kv 2: general.name str = out of memory"],
                "exit": 3,
            },
            ServerError,
            "SERVER_ENDED",
            "status 3",
        ),
        ({"signal": 9}, ServerError, "SERVER_KILLED", "SIGKILL) while loading"),
        ({"signal": 11}, ServerError, "SERVER_CRASHED", "SIGSEGV while loading"),
        ({"signal": 4}, HostError, "ILLEGAL_INSTRUCTION", "this CPU does not have (SIGILL)"),
        ({"exit": 3}, ServerError, "SERVER_ENDED", "status 3 while loading"),
        ({"exit": 0, "say": ["bye"]}, SettingError, "SERVER_ARGUMENT_INVALID", "bye"),
        ({"completion": "die"}, ServerError, "CUDA_ERROR", "illegal memory access"),
        ({"completion": "refuse"}, ServerError, "REQUEST_REFUSED", "the context is full"),
        ({"completion": "garbage"}, ServerError, "NOT_LLAMA_SERVER", "not llama-server"),
    ],
)
def test_ends_are_told_apart(
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


def test_no_program_there(tmp_path: Path) -> None:
    error = failure(tmp_path)
    assert (error.code, error.exit_status) == ("RUNTIME_NOT_EXECUTABLE", 5)
    assert "cannot start llama-server: No such file" in error.message


def write(runtime: Path, content: bytes, mode: int = 0o755) -> Path:
    program = runtime / "llama-server"
    program.write_bytes(content)
    program.chmod(mode)
    return runtime


ELF = bytearray(Path(sys.executable).read_bytes()[:4096].ljust(4096, b"\0"))
OTHER_MACHINE = bytes(ELF[:18] + b"\xf3\0" + ELF[20:])
NO_LOADER = b"#!/lib/ld-nowhere.so.2\n"


@pytest.mark.parametrize(
    ("content", "mode", "reason"),
    [
        (b"hello", 0o755, "it is no program, or built for another processor"),
        (OTHER_MACHINE, 0o755, "it is no program, or built for another processor"),
        (NO_LOADER, 0o755, "it, or the dynamic loader that it needs, is not on this system"),
        (b"#!/bin/sh\n", 0o644, "its disk is mounted noexec, or this user may not execute it"),
    ],
)
def test_what_cannot_be_executed_is_told_at_once_with_the_reason(
    tmp_path: Path, content: bytes, mode: int, reason: str
) -> None:
    runtime = write(tmp_path, content, mode)
    supervisor = Supervisor(Server(plan(runtime)))
    with pytest.raises(HostError) as caught:
        supervisor.start()
    assert (caught.value.code, caught.value.exit_status) == ("RUNTIME_NOT_EXECUTABLE", 5)
    assert f"({reason})" in caught.value.message
    assert "--store" in caught.value.hint
    done = processes.run([str(runtime / "llama-server")], ENVIRON, timeout=5)
    assert f"({reason})" in done.failure


def test_ten_megabytes_of_log_at_once(impostor: Impostor) -> None:
    with Server(plan(impostor.behave(flood=10_000_000))) as server:
        assert len(server.tail()) == 200
        assert server.tail()[0] == "x" * 999
        assert server.client().completion("x", max_tokens=1).text == "!"


def test_the_group_goes_too_and_deafness_does_not_help(
    impostor: Impostor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_loader.server.STOP_GRACE", 0.3)
    with Server(plan(impostor.behave(child=True, deaf=True))) as server:
        pid = server.pid
        child = int((impostor.folder / "child").read_text())
        assert alive(child)
        assert pid is not None
    assert gone(pid)
    assert gone(child)


def test_stopped_while_it_loads(impostor: Impostor) -> None:
    server = Server(plan(impostor.behave(loading=60)))
    seen: list[LoaderError] = []

    def start() -> None:
        try:
            server.start()
        except LoaderError as error:
            seen.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    while server.pid is None or not (impostor.folder / "seen.json").exists():
        time.sleep(0.01)
    pid = server.pid
    server.stop()
    thread.join(5)
    assert [error.code for error in seen] == ["SERVER_STOPPED"]
    assert gone(pid)


def test_a_death_later_on_is_explained(impostor: Impostor) -> None:
    with Server(plan(impostor.behave(exit_after=0.6, late_status=4))) as server:
        assert server.wait(10)
        with pytest.raises(ServerError, match="status 4 while it served"):
            server.check()


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


@pytest.mark.parametrize(
    ("buffer", "on_it"),
    [
        ("CUDA1", True),
        ("CUDA10", False),
        ("CUDA0", False),
        ("CUDA_Host", False),
        ("CUDA_Split", True),
        ("CPU_Mapped", False),
    ],
)
def test_a_buffer_is_of_the_device_that_it_names(buffer: str, on_it: object) -> None:
    report = server_log.LoadReport(None, None, {buffer: 5, "CPU": 9})
    assert report.on_devices(("CUDA1",)) is on_it
    assert report.owners(("CUDA1",)) == (("CUDA1",) if on_it else ())


@pytest.mark.parametrize(
    ("name", "buffer"),
    [("MTL0", "MTL0_Mapped"), ("RPC0", "RPC0[h:1]"), ("RPC[h:1]", "RPC[h:1]"), ("Metal", "Metal")],
)
def test_buffers_of_other_backends(name: str, buffer: str) -> None:
    assert server_log.LoadReport(None, None, {buffer: 5}).owners((name,)) == (name,)


PARENT = """
import sys, threading, time
sys.path.insert(0, {spaces!r})
from pathlib import Path
from llama_loader.server import Server
from llama_loader.server_plan import ServerPlan
server = Server(ServerPlan(Path({runtime!r}), Path("/m"), {{"PATH": "/bin"}}))
thread = threading.Thread(target=server.start)
thread.start(); thread.join()
print(server.pid, flush=True)
time.sleep(3600)
"""


def test_it_outlives_the_calling_thread_and_dies_with_the_process(
    impostor: Impostor, tmp_path: Path
) -> None:
    """FAULTS 56 and 57: on ZeroGPU every call is a new thread of one worker process."""
    code = PARENT.format(spaces=str(SPACES), runtime=str(impostor.behave()))
    for number in (signal.SIGKILL, signal.SIGTERM):
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, env={"TMPDIR": str(tmp_path)}
        ) as parent:
            assert parent.stdout is not None
            pid = int(parent.stdout.readline())
            time.sleep(0.3)
            assert alive(pid)
            parent.send_signal(number)
        assert gone(pid, 1.0)


def test_a_parent_killed_at_any_moment_leaves_nothing(impostor: Impostor, tmp_path: Path) -> None:
    code = PARENT.format(spaces=str(SPACES), runtime=str(impostor.behave(loading=3600)))
    for delay in (0.08, 0.12, 0.16, 0.2, 0.25):
        with subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"TMPDIR": str(tmp_path)},
        ) as parent:
            time.sleep(delay)
            parent.kill()
    time.sleep(0.3)
    with contextlib.suppress(FileNotFoundError):
        for pid in (impostor.folder / "starts").read_text().split():
            assert gone(int(pid), 1.0)


def test_killed_parents_leave_no_orphans() -> None:
    """FAULTS 56: 20 of them here, as many times more as FAULTS_SCALE says."""
    count = 20 * int(os.environ.get("FAULTS_SCALE", "1"))
    done = subprocess.run(
        [sys.executable, str(SPACES.parent / "tests/rigs/orphans.py"), str(count)],
        env={**os.environ, "PYTHONPATH": str(SPACES)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["orphans"] == 0


def test_a_fork_gets_a_keeper_of_its_own(impostor: Impostor) -> None:
    with Server(plan(impostor.behave())):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                with Server(plan(impostor.folder)) as inner:
                    os.write(writer, str(inner.pid).encode())
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        assert gone(int(os.read(reader, 20)))
        os.close(reader)
        os.close(writer)


def test_run_ends_a_whole_group_in_time(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    done = processes.run(
        ["/bin/sh", "-c", f"echo begun; sleep 99 & echo $! > {pid_file}; wait"],
        ENVIRON,
        timeout=0.5,
    )
    assert done.status is None
    assert done.output == "begun\n"
    assert gone(int(pid_file.read_text()))


def test_run_ends_a_program_that_never_stops_printing() -> None:
    done = processes.run(["/usr/bin/yes"], ENVIRON, timeout=30.0)
    assert done.status is None
    assert 1024**2 <= len(done.output) < 1024**2 + 65536
    assert done.seconds < 10


def test_what_is_quoted_complains_or_comes_last() -> None:
    lines = ["0.00.1.2 I loading", "0.00.1.3 E failed to open", "0.00.1.4 I cleaning up"]
    assert server_log.quote(lines) == "failed to open"
    assert server_log.quote([*"abcdefgh"]) == "c | d | e | f | g | h"
    assert server_log.quote([]) == "(it printed nothing)"


def test_whole_lines_are_quoted_the_decisive_one_first() -> None:
    cause = "0.00.1.2 E load: cudaMalloc failed: " + "x" * 400
    later = [f"0.00.1.{number} E failed {number} " + "y" * 200 for number in range(3, 9)]
    quoted = server_log.quote(["0.00.1.1 W failed to look", cause, *later]).split(" | ")
    assert quoted == [line.split(" E ")[1] for line in (cause, later[-1])]
    model = "0.00.1.0 I llama_model_loader: - kv 2: general.name str = an error"
    assert server_log.quote([model, "0.00.1.1 I loading"]) == "loading"
    long = "0.00.1.9 I " + "z" * 1500
    assert server_log.quote(["0.00.1.1 I a", long]) == "z" * 1500
    error = server_log.explain(1, [cause, *later, "no kernel image is available"], loading=True)
    assert "its last lines: no kernel image is available | " in error.message


FORGED = "load_tensors:        CUDA0 model buffer size =   900.00 MiB"


@pytest.mark.parametrize("stamp", ["", "0.00.123.637 I "])
def test_only_the_servers_own_report_counts(stamp: str, tmp_path: Path) -> None:
    """A model's name is printed with its line breaks; its stamp would have to be guessed."""
    lines = [
        f"{stamp}llama_model_loader: - kv   2: general.name str = {FORGED}",
        f"{stamp}print_info: general.name = {FORGED}",
        f"{stamp}print_info: general.name = a offloaded 31/31 layers to GPU",
        *([FORGED, "load_tensors: offloaded 31/31 layers to GPU"] if stamp else []),
        f"{stamp}load_tensors: offloaded 0/31 layers to GPU",
        f"{stamp}load_tensors:   CPU_Mapped model buffer size =    92.10 MiB",
        f"{stamp}load_tensors:   CPU_Mapped model buffer size =    1.2.3 MiB",
        f"{stamp}load_tensors:   CPU_Mapped model buffer size = {'9' * 400} MiB",
        f"{stamp}load_tensors: offloaded {'9' * 5000}/1 layers to GPU",
        "the last one",
    ]
    (tmp_path / "lines").write_text("\n".join(lines))
    with subprocess.Popen(["/bin/cat", tmp_path / "lines"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        log = server_log.ServerLog()
        log.read(process.stdout)
        log.finish(10)
    assert log.report == server_log.LoadReport(0, 31, {"CPU_Mapped": int(92.1 * 1024**2)})
    assert log.tail()[-1] == "the last one"


def test_report_of_a_million_buffers_is_read_at_once() -> None:
    line = b"load_tensors: x%d model buffer size = 1 MiB\n"
    log, began = server_log.ServerLog(), time.process_time()
    log.read(io.BytesIO(b"".join(line % number for number in range(200_000))))
    log.finish(60)
    assert len(log.report.buffers) == 100
    assert time.process_time() - began < 20


def test_the_middle_of_a_long_line_is_not_taken_for_a_line() -> None:
    line = b"x" * 2000 + FORGED.encode().ljust(2000) + FORGED.encode() + b"\n"
    log = server_log.ServerLog()
    log.read(io.BytesIO(line))
    log.finish(10)
    assert log.report == server_log.LoadReport(None, None, {})


# --- the real llama-server -----------------------------------------------------------------


@pytest.mark.model
def test_the_real_server_answers_paris(real_runtime: Path, real_model: Path) -> None:
    wanted = plan(real_runtime, model=real_model, pinned_build=True, startup_timeout=120.0)
    with Server(wanted) as server:
        answer = server.client().completion("The capital of France is", max_tokens=3)
        assert answer.text.startswith(" Paris")
        assert server.report.buffers
        pid = server.pid
        assert pid is not None
    assert gone(pid)


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
def test_the_real_server_refuses_an_argument(real_runtime: Path, real_model: Path) -> None:
    error = failure(real_runtime, model=real_model, extra=("--frobnicate",))
    assert (error.code, error.exit_status) == ("SERVER_ARGUMENT_INVALID", 2)


@pytest.mark.model
def test_the_real_server_stopped_at_once(real_runtime: Path, real_model: Path) -> None:
    server = Server(plan(real_runtime, model=real_model))
    starter = threading.Thread(target=_start_quietly, args=(server,))
    starter.start()
    while server.pid is None:
        time.sleep(0.001)
    pid = server.pid
    server.stop()
    starter.join(10)
    assert not starter.is_alive()
    assert gone(pid)


def _start_quietly(server: Server) -> None:
    with contextlib.suppress(LoaderError):
        server.start()


# --- an end before its time ----------------------------------------------------------------------


def test_an_argument_that_makes_it_end_without_an_error_is_told_once(impostor: Impostor) -> None:
    """``serve … -- --help``: an end with status 0 is no crash that another start would cure."""
    runtime = impostor.behave(exit=0, say=["usage: out of memory, CUDA error", "-h  print usage"])
    supervisor = Supervisor(Server(plan(runtime, extra=("--help",))))
    with pytest.raises(SettingError) as caught:
        supervisor.start()
    assert (caught.value.code, caught.value.exit_status) == ("SERVER_ARGUMENT_INVALID", 2)
    assert "did not serve; its last lines: usage" in caught.value.message
    assert "--help" in caught.value.hint
    assert impostor.starts() == 1


@pytest.mark.model
@pytest.mark.parametrize("argument", ["--help", "--version", "--list-devices", "--cache-list"])
def test_the_real_server_that_only_prints(
    real_runtime: Path, real_model: Path, argument: str
) -> None:
    error = failure(real_runtime, model=real_model, extra=(argument,))
    assert (error.code, error.exit_status) == ("SERVER_ARGUMENT_INVALID", 2)
    assert "did not serve" in error.message


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
    server, interrupt = Server(plan(runtime)), Interrupt(number)
    sys.settrace(interrupt)
    try:
        server.start()
    except KeyboardInterrupt:
        pass
    else:
        sys.settrace(None)
        server.stop()
    finally:
        sys.settrace(None)
    assert server.pid is None
    return len(interrupt.seen)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # closed by gc
def test_an_interrupt_at_any_line_of_a_start_leaves_nothing(impostor: Impostor) -> None:
    """Here at every eighth line; at all of them where FAULTS_SCALE is 8 or more."""
    runtime, before = impostor.behave(), threading.active_count()
    step = max(1, 8 // int(os.environ.get("FAULTS_SCALE", "1")))
    lines = interrupted(runtime, 0)
    assert lines > 80
    for number in range(1, lines, step):
        interrupted(runtime, number)
        until(lambda: threading.active_count() <= before, "its threads end", 10)
    assert not [pid for pid in (runtime / "starts").read_text().split() if alive(int(pid))]


def test_a_second_interrupt_ends_a_server_that_does_not_heed_sigterm_at_once(
    impostor: Impostor,
) -> None:
    runtime = impostor.behave(deaf=True, loading=60, say=["deaf now"])
    server, began = Server(plan(runtime)), time.monotonic()

    def interrupt_twice() -> None:
        until(lambda: "deaf now" in server.tail(), "it loads", 20)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)

    thread = threading.Thread(target=interrupt_twice)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        server.start()
    assert server.pid is None
    assert time.monotonic() - began < server_module.STOP_GRACE
    thread.join()
    assert gone(impostor.seen()["pid"], 0)
