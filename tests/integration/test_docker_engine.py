"""The docker engine on a real engine, with a source tree that compiles in a second."""

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest
import small_disk
from docker import DockerClient
from rich.console import Console
from tiny_release import Silent
from verbs import INVOKE, PROJECT, invoke
from waiting import until

from farm import preflight, source, targets
from farm.engines.docker import DockerEngine, container
from farm.engines.local import LocalEngine
from farm.errors import EngineError, PackError
from farm.execute import execute
from farm.options import BuildRequest
from farm.plan import LONGEST_LINE, BuildPlan
from farm.terminal.progress import BuildReport
from tests.rigs import relays
from tests.rigs.heard import heard
from tests.rigs.refusals import refused

pytestmark = [pytest.mark.docker, pytest.mark.timeout(900)]

TINY = PROJECT / "tests" / "rigs" / "tiny_llama"
TABLE = targets.load()


def plan_of(tree: Path) -> BuildPlan:
    return BuildPlan(TABLE.sets["cpu"], TABLE.line("cpu"), source.from_folder(tree))


def our_containers(client: DockerClient, maker: int | None = None) -> list[str]:
    """Containers that this process or another one made: beside others' builds on the engine."""
    made = f"^llama-farm-[a-z0-9-]+-{maker or os.getpid()}-"
    found = client.containers.list(all=True, filters={"name": made}, ignore_removed=True)
    return [container.name for container in found]


def test_products_come_out_and_nothing_stays(
    client: DockerClient, base_image: str, tmp_path: Path
) -> None:
    docker = DockerEngine(client, reference=base_image)
    with execute(plan_of(TINY), docker, logs=tmp_path, reporter=Silent()) as built:
        program = built.folder / "llama-server"
        told = subprocess.run([program], capture_output=True, text=True, check=True)
        assert told.stdout == "version: 0 (unknown) llama.cpp/llama.cpp\n"
        assert (built.folder / "libllama.so").is_symlink()
        assert built.toolchain.image == base_image
        assert str(built.toolchain.image_digest).startswith("sha256:")
        (made,) = our_containers(client)
        assert client.containers.get(made).status == "paused", "the products were read at rest"
    assert our_containers(client) == []


def test_the_container_has_no_network_and_no_folder_of_the_host(
    client: DockerClient, base_image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container, "_PROCESSES", 300)
    monkeypatch.setattr(container, "_PROCESSES_EACH", 1)
    docker = DockerEngine(client, reference=base_image)
    with docker.open(plan_of(TINY), lambda _: None) as workspace:
        details = client.api.inspect_container(workspace.container.id)
        assert details["HostConfig"]["NetworkMode"] == "none"
        assert {mount["Type"] for mount in details["Mounts"]} == {"volume"}
        lines: list[str] = []
        status = workspace.run(("cat", "/proc/net/route"), {}, lines.append)
        assert (status, len(lines)) == (0, 1)
        lines.clear()
        workspace.run(("printf", "%0300000d"), {}, lines.append)
        assert "".join(lines) == "0" * 300_000
        assert max(map(len, lines)) < 2 * LONGEST_LINE, "one without end comes in pieces"
        assert 0 < details["HostConfig"]["Memory"] < client.info()["MemTotal"]
        bomb = "for i in $(seq 500); do sleep 60 > /dev/null 2>&1 & done"
        assert "fork" in " ".join(workspace.ask("sh", "-c", bomb)), "and is not the host's fault"


def test_a_log_on_a_full_disk_is_not_called_the_engine_s_fault(
    client: DockerClient, base_image: str, tmp_path: Path
) -> None:
    def full(line: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), line)

    docker = DockerEngine(client, reference=base_image)
    with docker.open(plan_of(TINY), lambda _: None) as workspace:
        with pytest.raises(OSError, match="No space left") as failed:
            workspace.run(("echo", "words"), {}, full)
        assert failed.value.filename == "words"
        # and so for the products, on a small disk here
        with (
            small_disk.mounted(tmp_path / "small", "64k"),
            pytest.raises(PackError) as not_written,
        ):
            workspace.collect(PurePosixPath("/usr/include"), tmp_path / "small")
    assert not_written.value.code == "WRITE_FAILED"
    assert not_written.value.message.endswith("No space left on device")


def slow_tree(place: Path) -> Path:
    tree = Path(shutil.copytree(TINY, place))
    with (tree / "CMakeLists.txt").open("a", encoding="utf-8") as file:
        file.write("add_custom_target(slow ALL COMMAND sleep 300)\nadd_dependencies(llama slow)\n")
    return tree


@contextmanager
def slow_build(
    client: DockerClient, image: str, folder: Path, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """A build that is in the middle of its compile step, in a process of its own."""
    tree, log = slow_tree(folder / "slow"), PROJECT / ".farm" / "logs" / "cpu-cpu.log"
    log.unlink(missing_ok=True)
    build = ("build-cpu", "--engine", "docker", "--image", image, "--source", str(tree))
    build += ("--patches", "none")
    process = subprocess.Popen(
        [*INVOKE, *build, "--out", str(folder / "out")],
        cwd=PROJECT,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if log.is_file() and "--build" in log.read_text() and our_containers(client, process.pid):
            break
        time.sleep(0.2)
    time.sleep(1)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def test_ctrl_c_removes_the_container_and_keeps_the_cache(
    client: DockerClient, base_image: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with slow_build(client, base_image, tmp_path) as process:
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "error[INTERRUPTED]" in told
    assert "Traceback" not in told
    assert our_containers(client, process.pid) == []
    assert not out.exists() or not list(out.iterdir())
    client.volumes.get(f"llama-farm-ccache-{source.from_folder(tmp_path / 'slow').cache}").remove()


def test_a_container_whose_maker_was_killed_is_removed_by_the_engine(
    client: DockerClient, base_image: str, tmp_path: Path
) -> None:
    with slow_build(client, base_image, tmp_path) as process:
        assert len(our_containers(client, process.pid)) == 1
        process.kill()
        process.communicate()
    until(lambda: our_containers(client, process.pid) == [], "its container stays")


@pytest.mark.skipif(
    not os.environ.get("DOCKER_HOST", "unix:").startswith("unix:"), reason="needs a local socket"
)
def test_an_engine_that_dies_in_the_middle_is_one_line_and_the_next_run_goes_on(
    client: DockerClient, base_image: str, tmp_path: Path
) -> None:
    engine = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    address = tmp_path / "engine.sock"
    with (
        relays.before_file(address, Path(engine.removeprefix("unix://"))) as cut,
        slow_build(client, base_image, tmp_path, DOCKER_HOST=f"unix://{address}") as process,
    ):
        cut()
        _, told = process.communicate(timeout=60)
        until(lambda: our_containers(client, process.pid) == [], "its container stays")
    errors = [line for line in told.splitlines() if line.startswith("error[")]
    assert process.returncode == 1, told
    assert len(errors) == 1, told
    assert errors[0].startswith("error[ENGINE_LOST]: ")
    assert "Traceback" not in told
    assert "--build" in (PROJECT / ".farm" / "logs" / "cpu-cpu.log").read_text()
    (tmp_path / "slow" / "CMakeLists.txt").write_text((TINY / "CMakeLists.txt").read_text())
    again = ("--image", base_image, "--source", str(tmp_path / "slow"), "--patches", "none")
    done = invoke("build-cpu", "--engine", "docker", *again, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr


def test_without_an_engine_docker_is_refused_and_auto_builds_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path / 'nobody.sock'}")
    told, out = io.StringIO(), tmp_path / "out"
    report = BuildReport(Console(file=told, width=400))
    docker = BuildRequest(
        arch_set="cpu", line="cpu", engine="docker", source=TINY, out=out, patches="none"
    )
    with refused("ENGINE_NOT_RUNNING", EngineError) as caught, preflight.opened(docker, report):
        pass
    assert caught.value.hint.startswith("start one")
    assert not out.exists()
    with preflight.opened(replace(docker, engine="auto"), report) as ready:
        assert isinstance(ready.engine, LocalEngine)
    assert "engine: local, because no Docker engine answers" in told.getvalue()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a user without permission")
def test_no_permission_is_told_apart_from_no_engine(client: DockerClient) -> None:
    del client
    script = (  # the import comes first: its files may lie where only root may look
        "import os, sys; sys.path[:0] = ['.', 'spaces']\n"
        "from farm.engines.docker.connection import connect\n"
        "from farm.errors import EngineError\n"
        "os.setgid(65534); os.setgroups([]); os.setuid(65534)\n"
        "try: connect()\n"
        "except EngineError as error: print(error.render())\n"
    )
    told = heard([sys.executable, "-c", script], cwd=PROJECT, check=True)
    assert "error[ENGINE_PERMISSION]" in told.stdout
    assert "group docker" in told.stdout


def test_an_image_that_cannot_be_pulled_is_named_with_a_way_out(client: DockerClient) -> None:
    image = "localhost:1/no/such:image"
    with refused("IMAGE_UNAVAILABLE", EngineError, image, hint="invoke base-image"):
        DockerEngine(client, reference=image).tools()
    assert our_containers(client) == []
