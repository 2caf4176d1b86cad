import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import IO, Any

import pytest
import small_disk
from waiting import until

from llama_loader import processes
from tests.rigs.binaries import compile_c
from tests.rigs.heard import script

ENVIRON = processes.environment({"PATH": os.environ["PATH"]})


def say(argv: list[str], environ: dict[str, str], **more: Any) -> bytes:
    program, (output,) = started(argv, environ, **more)
    with output:
        seen = output.read()
    assert program.wait(5)
    assert program.status == 0
    return seen


def started(
    argv: list[str], environ: dict[str, str], **more: Any
) -> tuple[processes.Program, list[IO[bytes]]]:
    program, outputs = processes.Program(), list[IO[bytes]]()
    try:
        program.start(argv, environ, read=outputs.append, **more)
    except BaseException:
        program.stop(grace=5)
        assert program.pid is None
        outputs[0].close()
        raise
    return program, outputs


def test_a_program_outlives_the_thread_that_asked_for_it() -> None:
    """The kernel's parent-death signal comes when the starting thread ends."""
    programs: list[processes.Program] = []

    def start() -> None:
        for argv in (["/bin/true"], ["/bin/sleep", "60"]):
            program, (output,) = started(argv, ENVIRON)
            output.close()
            programs.append(program)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    short, long = programs
    assert short.wait(5)
    assert not long.wait(0.2)
    long.stop(grace=5)
    assert (short.status, long.status) == (0, -signal.SIGTERM)
    assert long.pid is None


def test_the_program_sees_the_arguments_text_and_variables_that_it_was_given() -> None:
    argv, environ = ["/bin/sh", "-c", "pwd; cat; env -0"], {"ONE": "1 = \n2"}
    assert say(["/bin/echo", "a b\nc\udcff"], environ) == b"a b\nc\xff\n"
    assert say(argv, environ, text=b"key\n") == b"/proc\nkey\nONE=1 = \n2\0PWD=/proc\0"


def test_neither_text_nor_variables_are_on_a_command_line() -> None:
    """Any user of the machine can read a command line, the launcher's too."""
    seen: list[bytes] = []

    def launchers() -> bool:
        tasks = Path("/proc/self/task").iterdir()
        children = " ".join((task / "children").read_text() for task in tasks).split()
        lines = (Path("/proc", pid, "cmdline").read_bytes() for pid in children)
        seen[:] = [line for line in lines if b"prctl" in line]
        return bool(seen)

    say(["/bin/true"], {"ONE": "secret"}, text=b"secret", before=lambda: until(launchers, "one"))
    assert len(seen) == 1
    assert b"secret" not in seen[0]


def test_a_program_is_executed_after_before_and_at_once(tmp_path: Path) -> None:
    """The interpreter of the launcher starts meanwhile."""
    program, clock = script(tmp_path / "clock", "#!/bin/sh\ndate +%s.%N\n"), []

    def before() -> None:
        time.sleep(1.0)
        clock.append(time.time())

    began = float(say([str(program)], ENVIRON, before=before))
    assert 0 < began - clock[0] < 0.5


def test_a_program_that_cannot_or_must_not_be_executed_is_an_error(tmp_path: Path) -> None:
    for argv in ([str(tmp_path / "no")], ["/bin/echo", "a\0b"]):
        with pytest.raises(OSError, match=r"No such file|Invalid argument") as caught:
            started(argv, ENVIRON)
        assert caught.value.filename == argv[0]

    def before() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):  # and leaves nothing
        started(["/bin/touch", str(tmp_path / "executed")], ENVIRON, before=before)
    assert not list(tmp_path.iterdir())


def test_its_children_end_with_a_program() -> None:
    program, (output,) = started(["/bin/sh", "-c", "sleep 99 & echo $!"], ENVIRON)
    with output:
        child = int(output.readline())
        assert output.read() == b""
    assert program.wait(5)
    until(lambda: not processes.lives(child), "it is gone")


def test_run_ends_a_whole_group_in_time_and_a_program_that_never_stops_printing(
    tmp_path: Path,
) -> None:
    script = f"echo begun; sleep 99 & echo $! > {tmp_path}/pid; wait"
    done = processes.run(["/bin/sh", "-c", script], ENVIRON, timeout=0.5)
    assert (done.status, done.output) == (None, "begun\n")
    child = int((tmp_path / "pid").read_text())
    until(lambda: not processes.lives(child), "it is gone")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, limit[1]), limit[1]))
    held = [os.dup(0) for _ in range(1024)]  # as an app does that has many connections
    done = processes.run(["/usr/bin/yes"], ENVIRON, timeout=30.0)
    for one in held:
        os.close(one)
    resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert done.status is None
    assert 1024**2 <= len(done.output) < 1024**2 + 65536
    assert done.seconds < 10


def test_the_real_server_loads_no_plugin_of_the_callers_folder(
    real_runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ggml opens each ``libggml-cpu-*.so`` of its working folder, to ask how it fits the CPU."""
    ran = tmp_path / "ran"
    source = (
        "#include <fcntl.h>\n#include <unistd.h>\n"
        f'__attribute__((constructor)) void f(void) {{ close(creat("{ran}", 0600)); }}\n'
    )
    compile_c(tmp_path / "libggml-cpu-evil.so", source, "-shared", "-fPIC")
    argv = [str(real_runtime / "llama-server"), "--list-devices"]
    monkeypatch.chdir(tmp_path)
    assert processes.run(argv, ENVIRON, timeout=60).status == 0
    assert not ran.exists()
    monkeypatch.setattr(processes, "FOLDER", str(tmp_path))  # the attack works where it may
    processes.run(argv, ENVIRON, timeout=60)
    assert ran.exists()


def test_program_on_a_disk_that_is_mounted_noexec_is_told_at_once(tmp_path: Path) -> None:
    with small_disk.mounted(tmp_path / "disk", "16m,noexec"):
        program = shutil.copy("/bin/true", tmp_path / "disk")
        done = processes.run([program], ENVIRON, timeout=10)
        assert "noexec" in done.failure
        started = processes.Program()
        with pytest.raises(PermissionError) as refused:
            started.start([program], ENVIRON, read=lambda output: output.close())
        started.stop(grace=1)
    assert "noexec" in processes.why_not_executable(refused.value)


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
