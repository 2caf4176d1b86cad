"""Sets on a Dask cluster: a real scheduler and real workers, each a process, compiling for real."""

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
from dask_hosts import Hosts, Net
from distributed import Client
from docker import DockerClient
from docker.errors import APIError
from needs import must_or_skip
from process_table import command_lines
from rich.console import Console
from spread_run import LINE, MARKS, TINY, Held, Run, tarballs
from verbs import PROJECT
from waiting import until

from farm import pipeline, source
from farm.cluster import dispatch, host, scheduler
from farm.cluster.dispatch import Dispatcher
from farm.engines.docker import DockerEngine
from farm.engines.docker.container import LABEL
from farm.errors import EngineError
from farm.inputs.packages import cache_folder, cache_root
from farm.options import BuildRequest
from farm.plan import BuildPlan
from farm.tarball import archive
from farm.targets import ArchSet
from farm.terminal.progress import BuildReport, Fleet
from tests.rigs.refusals import refused
from tests.rigs.relays import Relay, to_port

pytestmark = MARKS

SOON = 8.0
"""Seconds; a machine that is busy with other tests included."""


@pytest.fixture
def net() -> Iterator[Net]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if shutil.which("ip") is None:
        must_or_skip("no ip (iproute2)")
    made = Net()
    try:
        try:
            made.up()
        except subprocess.CalledProcessError as error:
            must_or_skip(f"this machine makes no network namespaces: {error.stderr}")
        yield made
    finally:
        made.down()


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(tmp_path)
    yield made
    made.end()


def test_sets_on_this_machine_with_one_that_fails_twice(
    request_: BuildRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_MOST_LOG", 100)
    run = Run(TINY, ("one", "bad", "two"), replace(request_, workers=2))
    run.plans[1] = replace(run.plans[1], targets=("llama-server", "no-such-target"))
    (pipeline.STATE / "logs").mkdir(parents=True)
    (pipeline.STATE / "logs" / "cpu-bad.log").symlink_to("/dev/full")  # another user's link
    run.start()
    told = run.fail(words="(cpu-bad)")
    assert tarballs(request_) == {"one", "two"}
    assert told.count("cpu-bad: failed (COMPILE_FAILED); it is tried once more") == 1
    log = (pipeline.STATE / "logs" / "cpu-bad.log").read_text()
    assert "no-such-target" in log
    assert re.match(r"\[\d+ bytes before this were not sent\]\n.{,100}\Z", log, re.DOTALL)
    assert told.count("source: ") == 1, "one machine has the source once"
    (kept,) = cache_folder("sources").glob("sent-*")
    (kept / "llama.cpp").write_text("int changed;\n")
    again = Run(TINY, ("one", "two", "three"), request_)
    again.start()
    told = again.succeed("one", "two", "three")
    assert (told.count("built already"), told.count("source: ")) == (2, 1)


def test_scheduler_of_this_machine_takes_no_connection_of_another_program(
    request_: BuildRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it use Dask's folder for all users, where another user's link costs a file."""

    def listening() -> set[tuple[str, int]]:
        there = psutil.net_connections("tcp")
        return {one.laddr for one in there if (one.pid, one.status) == (os.getpid(), "LISTEN")}

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "dask-scratch-space").mkdir()
    (file := tmp_path / "file").write_text("a person's")
    (tmp_path / "dask-scratch-space" / "global.lock").symlink_to(file)
    before = listening()
    with (
        scheduler.cluster(replace(request_, workers=2), 2) as address,
        closing(scheduler.SchedulerClient(address, lambda _: None)) as ours,
    ):
        assert len(ours.hosts()) == 2
        assert listening() == before, "every client of Dask's protocol runs code"
    assert file.read_text() == "a person's"
    assert {one.name for one in tmp_path.iterdir()} >= {"dask-scratch-space", "file"}
    assert not list(tmp_path.glob("llama-farm-dask-*"))


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def client_process() -> Iterator[Start]:
    """Starts a run in a process of its own, with caches of its own, as a person does."""
    started = []

    def start(tree: Path, folder: Path, **options: str) -> subprocess.Popen[str]:
        told = [f"{name}={value}" for name, value in options.items()]
        argv = [sys.executable, str(PROJECT / "tests" / "rigs" / "dask_client.py"), str(tree)]
        environment = os.environ | {"PYTHONPATH": f"{PROJECT}:{PROJECT / 'spaces'}"}
        process = subprocess.Popen(
            [*argv, str(folder), *told],
            cwd=PROJECT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.send_signal(signal.SIGINT)  # so that it ends its compilers, too; of no use if ended
        process.communicate(timeout=60)


def interrupted(process: subprocess.Popen[str]) -> float:
    """Press Ctrl-C; returns the seconds until the run has ended."""
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "error[INTERRUPTED]" in told
    assert "Traceback" not in told
    return time.monotonic() - began


def running(what: str) -> list[str]:
    """Name the processes whose command line has this in it."""
    return [line for line in command_lines().values() if what in line and "pytest" not in line]


def test_ctrl_c_ends_a_compiler_that_says_nothing(
    client_process: Start, held: Held, tmp_path: Path
) -> None:
    process = client_process(held.tree, tmp_path, worker_engine="local")
    held.await_begun(1)
    assert interrupted(process) < SOON
    assert running(str(held.folder / "wait")) == []
    assert not list((tmp_path / "cache").glob("*/builds/*"))


@pytest.mark.docker
def test_ctrl_c_removes_the_container_of_a_compiler_that_says_nothing(
    client_process: Start, client: DockerClient, base_image: str, tmp_path: Path
) -> None:
    tree = tmp_path / "slow"
    shutil.copytree(TINY, tree)
    with (tree / "CMakeLists.txt").open("a", encoding="utf-8") as file:
        file.write("add_custom_target(slow ALL COMMAND sleep 301)\nadd_dependencies(llama slow)\n")
    ours: dict[str, Any] = {"all": True, "filters": {"label": f"{LABEL}=cpu-cpu"}}
    found: set[str] = set()

    def compiling() -> bool:
        for one in client.containers.list(**ours, ignore_removed=True):
            with suppress(APIError):  # it is not started yet, or has gone meanwhile
                if "sleep 301" in str(one.top()["Processes"]):
                    found.add(one.id)
        return bool(found)

    # of a cache of its own, too, the builder image is the farm's
    shutil.copytree(cache_root() / "images", tmp_path / "cache" / cache_root().name / "images")
    process = client_process(tree, tmp_path, worker_engine="docker", image=base_image)
    until(compiling, "the build does not begin", seconds=300)
    assert interrupted(process) < SOON
    assert found.isdisjoint(x.id for x in client.containers.list(**ours, ignore_removed=True))


def test_a_host_ends_its_build_when_the_client_is_killed(
    client_process: Start, hosts: Hosts, held: Held, tmp_path: Path
) -> None:
    hosts.scheduler()
    hosts.worker("first")
    run = client_process(held.tree, tmp_path, worker_engine="local", scheduler=hosts.address)
    held.await_begun(1)
    run.kill()
    run.communicate(timeout=10)
    until(lambda: not running(str(held.folder / "wait")), "it goes on", seconds=10)
    builds = tmp_path / "first" / "cache"
    until(lambda: not list(builds.glob("*/builds/*")), "its folder stays", seconds=10)
    held.let_go()
    again = client_process(held.tree, tmp_path, worker_engine="local", scheduler=hosts.address)
    _, told = again.communicate(timeout=100)
    assert again.returncode == 0, told
    assert "cpu-cpu: resumes: an earlier run did not finish it" in told


def test_sets_of_lost_hosts_are_built_in_the_order_they_had(
    hosts: Hosts, held: Held, request_: BuildRequest
) -> None:
    """Longest first, also for what has to be built again."""
    hosts.scheduler()
    workers = [hosts.worker(name) for name in ("first", "second", "third")]
    run = Run(held.tree, ("one", "two", "three"), replace(request_, scheduler=hosts.address))
    run.start()
    held.await_begun(3)
    order = re.findall(r"(cpu-\w+): to", run.told)
    for worker in workers:
        os.killpg(worker.pid, signal.SIGKILL)
    until(lambda: run.told.count("was lost") == 3, lambda: f"they are not missed: {run.told}")
    held.let_go()
    hosts.worker("fourth")
    told = run.succeed("one", "two", "three")
    assert re.findall(r"(cpu-\w+): to", told) == [*order, *order]
    assert told.count("was lost; it is built elsewhere") == 3
    assert told.count("source: ") == 4, "each host gets the source once"


def test_a_scheduler_that_is_started_again_gets_the_sets_again(
    hosts: Hosts, held: Held, request_: BuildRequest
) -> None:
    scheduler = hosts.scheduler()
    worker = hosts.worker("first")
    run = Run(held.tree, ("one",), replace(request_, scheduler=hosts.address))
    run.start()
    held.await_begun(1)
    os.killpg(scheduler.pid, signal.SIGKILL)
    os.killpg(worker.pid, signal.SIGKILL)
    hosts.scheduler()
    hosts.worker("first")
    held.await_begun(2, run)
    held.let_go()
    told = run.succeed("one")
    assert told.count("source: ") == 1, "the host still has the source"


def test_a_host_whose_network_is_cut_gives_its_set_back(
    hosts: Hosts, held: Held, request_: BuildRequest
) -> None:
    hosts.scheduler()
    with Relay(to_port(hosts.port)) as relay:
        hosts.worker("far", f"tcp://127.0.0.1:{relay.port}")
        run = Run(held.tree, ("one",), replace(request_, scheduler=hosts.address))
        run.start()
        held.await_begun(1)
        hosts.worker("near")
        relay.cut()
        held.await_begun(2, run)
        held.let_go()
        run.succeed("one")


def test_a_host_in_a_network_of_its_own_whose_cable_is_pulled(
    tmp_path: Path, net: Net, held: Held, request_: BuildRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection does not close: only silence shows that the host is lost."""
    monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP", "12s")
    hosts = Hosts(tmp_path, ip=net.ours)
    try:
        hosts.scheduler()
        hosts.worker("far", net=net)
        run = Run(held.tree, ("one",), replace(request_, scheduler=hosts.address))
        run.start()
        held.await_begun(1, run)
        assert f"cpu-one: to {net.ip}:" in run.told
        hosts.worker("near")
        net.cut()
        held.await_begun(2, run)
        held.let_go()
        told = run.succeed("one")
    finally:
        hosts.end()
    assert f"{net.ip}" in next(line for line in told.splitlines() if "was lost" in line)


def test_a_set_on_a_slow_host_is_built_by_one_that_is_idle(
    hosts: Hosts, held: Held, request_: BuildRequest
) -> None:
    """The first host never ends; the other host finishes its own set soon."""
    wait = held.folder / "wait"
    wait.write_text(
        f"#!/bin/sh\necho begun >> {held.folder}/begun\n"
        f"mkdir {held.folder}/first || exit 0\n"
        f"while [ ! -e {held.folder}/go ]; do sleep 0.1; done\n"
    )
    hosts.scheduler()
    hosts.worker("slow")
    hosts.worker("quick")
    run = Run(held.tree, ("one", "two"), replace(request_, scheduler=hosts.address))
    run.start()
    told = run.succeed("one", "two")
    assert told.count("and the first that is done counts") == 1, told
    assert held.begun == 3
    assert not (held.folder / "go").exists(), "the run did not wait for the slow host"


def test_hosts_are_never_taken_for_lost_by_what_a_timer_of_the_client_s_writes(
    hosts: Hosts,
) -> None:
    """``Client.scheduler_info`` gave no workers now and then: all builds were begun again."""
    hosts.scheduler()
    hosts.worker("one")
    hosts.worker("two")
    console = Console(quiet=True)
    with (
        dask.config.set({"distributed.client.scheduler-info-interval": "1ms"}),
        Dispatcher(hosts.address, bytes, Fleet(BuildReport(console), {})) as dispatcher,
    ):
        until(lambda: len(dispatcher.link.hosts()) == 2, "the workers do not come")
        assert {len(dispatcher.link.hosts()) for _ in range(1000)} == {2}


def test_a_scheduler_without_hosts_or_none_at_all_is_named(
    hosts: Hosts, request_: BuildRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "_CONNECT_SECONDS", 2.0)
    monkeypatch.setattr(dispatch, "_HOSTS_SECONDS", 2.0)
    run = Run(TINY, ("one",), replace(request_, scheduler=hosts.address))
    run.start()
    run.fail("SCHEDULER_UNREACHABLE")
    hosts.scheduler()
    run.run()
    assert run.error is not None
    assert (run.error.code, "FARM_BUILD=1" in run.error.hint) == ("WORKERS_MISSING", True)


def test_products_that_cannot_be_used_fail_their_set_and_not_the_run(
    request_: BuildRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker is a thread of this process: what it packs is replaced, for one set."""
    honest = host.pack_products

    def hostile(folder: Path, programs: tuple[str, ...]) -> bytes:
        """Of the set that has llama-server alone."""
        if (folder / "llama-cli").exists():
            return honest(folder, programs)
        made = io.BytesIO()
        outside = archive.TarMember("../outside", 0, archive.FILE_MODE, io.BytesIO())
        archive.write(made, "tar.zst", [outside], 0)
        return made.getvalue()

    monkeypatch.setattr(host, "pack_products", hostile)
    run = Run(TINY, ("bad", "good"), request_)
    run.plans[0] = replace(run.plans[0], targets=("llama-server",))
    run.start()
    told = run.fail(words="(cpu-bad)")
    assert tarballs(request_) == {"good"}, told
    assert "cpu-bad: failed (PRODUCTS_UNSAFE); it is tried once more" in told
    assert told.count("error[PRODUCTS_UNSAFE]") == 1


DEADLY = """#!{python}
import os, signal
from pathlib import Path
pid = os.getppid()
while b"dask_worker" not in Path(f"/proc/{{pid}}/cmdline").read_bytes():
    pid = int(Path(f"/proc/{{pid}}/stat").read_text().rpartition(")")[2].split()[1])
os.kill(pid, signal.SIGKILL)
"""


def test_a_set_that_kills_its_hosts_is_given_up_and_the_others_finish(
    hosts: Hosts, request_: BuildRequest, tmp_path: Path
) -> None:
    shutil.copytree(TINY, tmp_path / "tree")
    deadly = tmp_path / "deadly"
    deadly.write_text(DEADLY.format(python=sys.executable))
    deadly.chmod(0o755)
    with (tmp_path / "tree" / "CMakeLists.txt").open("a", encoding="utf-8") as file:
        file.write(f'\nadd_custom_target(deadly COMMAND "{deadly}")\n')
    hosts.scheduler()
    for name in ("first", "second", "third", "fourth"):
        hosts.worker(name)
    run = Run(tmp_path / "tree", ("bad", "good"), replace(request_, scheduler=hosts.address))
    run.plans[0] = replace(run.plans[0], targets=("deadly",))
    run.start()
    told = run.fail(words="(cpu-bad)")
    assert tarballs(request_) == {"good"}, told
    assert told.count("error[HOSTS_LOST]: 3 hosts were lost while they built it: 127.0.0.1:") == 1


@pytest.mark.parametrize("what", ["cache", "compiler", "shared"])
def test_a_host_that_cannot_build_is_named_and_left_out(
    hosts: Hosts, request_: BuildRequest, tmp_path: Path, what: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing").chmod(0o777)
    name, place, code = {
        "cache": ("XDG_CACHE_HOME", "file", "CACHE_UNUSABLE"),
        "compiler": ("PATH", "nothing", "COMPILER_MISSING"),
        "shared": ("TMPDIR", "nothing", "FOLDER_NOT_OWN"),
    }[what]
    hosts.scheduler()
    hosts.worker("broken", **{name: str(tmp_path / place)})
    run = Run(TINY, ("one", "two"), replace(request_, scheduler=hosts.address))
    run.start()
    assert "HOST_DROPPED" not in run.fail("HOSTS_UNUSABLE", words=code)  # told once
    hosts.worker("good")
    with closing(Client(hosts.address, set_as_default=False)) as client:
        client.wait_for_workers(2, timeout=60)
    again = Run(TINY, ("one", "two"), replace(request_, scheduler=hosts.address))
    again.start()
    told = again.succeed("one", "two")
    assert told.count(f"is not used: {code}") == 1


@pytest.fixture
def other_cloudpickle(tmp_path: Path) -> str:
    """PYTHONPATH of a host that has another version of a package of Dask's."""
    found = tmp_path / "other" / "cloudpickle-0.1.dist-info"
    found.mkdir(parents=True)
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: cloudpickle\nVersion: 0.1\n")
    return f"{PROJECT}:{PROJECT / 'spaces'}:{found.parent}"


def test_another_version_of_what_dask_consists_of_is_named(
    client_process: Start, hosts: Hosts, tmp_path: Path, other_cloudpickle: str
) -> None:
    hosts.scheduler()
    hosts.worker("other", PYTHONPATH=other_cloudpickle)
    with closing(Client(hosts.address, set_as_default=False)) as client:
        client.wait_for_workers(1, timeout=60)
    process = client_process(TINY, tmp_path, scheduler=hosts.address, worker_engine="local")
    _, told = process.communicate(timeout=100)
    assert process.returncode == 0, told
    (line,) = [line for line in told.splitlines() if "cloudpickle" in line]
    assert "0.1" in line


def test_a_scheduler_that_goes_away_before_the_first_question_is_named(
    hosts: Hosts, request_: BuildRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_HOSTS_SECONDS", 2.0)
    plan = BuildPlan(ArchSet("one", ""), LINE, source.from_folder(TINY))
    scheduler = hosts.scheduler()
    hosts.worker("first")
    fleet = Fleet(BuildReport(Console(quiet=True)), {})
    with Dispatcher(hosts.address, bytes, fleet) as dispatcher:
        until(lambda: dispatcher.link.hosts() != [], "the worker does not come")
        os.killpg(scheduler.pid, signal.SIGKILL)
        with refused("SCHEDULER_UNREACHABLE", EngineError):
            dispatcher.identities(host.BuildJob(plan, request_))


@pytest.mark.parametrize("address", ["tls://127.0.0.1:1", "mute"])
def test_a_scheduler_that_does_not_answer_is_one_line(
    client_process: Start, tmp_path: Path, address: str
) -> None:
    """One that takes the connection and says nothing, too."""
    with closing(socket.create_server(("127.0.0.1", 0))) as mute:
        named = address.replace("mute", f"tcp://127.0.0.1:{mute.getsockname()[1]}")
        process = client_process(TINY, tmp_path, scheduler=named, worker_engine="local")
        _, told = process.communicate(timeout=40)
    assert process.returncode == 1, told
    assert f"error[SCHEDULER_UNREACHABLE]: no Dask scheduler answers at {named}" in told
    assert "Traceback" not in told


def test_a_host_with_another_checkout_is_refused(
    hosts: Hosts, request_: BuildRequest, tmp_path: Path
) -> None:
    for folder in ("farm", "build", "spaces"):
        shutil.copytree(PROJECT / folder, tmp_path / "other" / folder)
    with (tmp_path / "other" / "build" / "cmake" / "host_size.cmake").open("a") as file:
        file.write("# another commit\n")
    hosts.scheduler()
    hosts.checkout = tmp_path / "other"
    hosts.worker("other")
    run = Run(TINY, ("one",), replace(request_, scheduler=hosts.address))
    run.start()
    run.fail("HOSTS_UNUSABLE", words="FARM_DIFFERS")
    assert "check out the same commit" in str(run.error)


def test_a_host_that_joins_with_another_compiler_gets_nothing(
    hosts: Hosts, held: Held, request_: BuildRequest, tmp_path: Path
) -> None:
    other = tmp_path / "another" / "c++"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\necho another compiler\n")
    other.chmod(0o755)
    hosts.scheduler()
    hosts.worker("first")
    run = Run(held.tree, ("one", "two"), replace(request_, scheduler=hosts.address))
    run.start()
    held.await_begun(1)
    path = f"{other.parent}:{os.environ['PATH']}"
    hosts.worker("late", PATH=path)
    until(lambda: "is not used: COMPILER_DIFFERS" in run.told, lambda: f"not asked: {run.told}", 60)
    held.let_go()
    run.succeed("one", "two")


@pytest.mark.docker
def test_a_host_names_its_devel_image_as_the_engine_does(
    client: DockerClient, base_image: str
) -> None:
    """By its digest and by what is built on it: a tag that moves is another identity."""
    plan = BuildPlan(ArchSet("one", ""), LINE, source.from_folder(TINY))
    request = BuildRequest(engine="docker", image=base_image, line=LINE.name)
    told = host.compilers(host.BuildJob(plan, request))
    assert told == DockerEngine(client, reference=base_image).identity(plan)
    assert str(client.images.get(base_image).id) in str(told)
