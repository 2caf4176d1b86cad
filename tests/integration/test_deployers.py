"""Clusters that Dask's own deployers bring up, by the programs that stand in docs/scaling.md."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import documented
import farm_hosts
import pytest
import slurm as slurm_rig
import ssh_server
from process_table import command_lines
from spread_run import MARKS, Held, Run
from waiting import until

from farm import pipeline
from farm.options import BuildRequest

pytestmark = [
    *MARKS,
    # numpy is here and not there
    pytest.mark.filterwarnings("ignore::distributed.versions.VersionMismatchWarning"),
]

SETS = ("one", "two")


@dataclass
class Site:
    """Where hosts have their checkout, and the home of the person who brings a cluster up."""

    python: Path
    home: Path

    @contextmanager
    def cluster(self, program: str, **environ: str) -> Iterator[str]:
        """Run a program of the documentation, until Enter is pressed; gives the scheduler's."""
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.home), **environ}
        environment["XDG_CACHE_HOME"] = str(self.home / "cache")
        log = self.home / "log"
        pipe = subprocess.PIPE
        with (
            log.open("wb") as told,
            subprocess.Popen(
                [self.python, "-c", program],
                cwd=self.home,
                env=environment,
                stdin=pipe,
                stdout=pipe,
                stderr=told,
                text=True,
            ) as process,
        ):
            try:
                assert process.stdout is not None
                address = process.stdout.readline().strip()
                assert address, log.read_text()
                yield address
                process.communicate("\n", timeout=60)
                assert process.returncode == 0, log.read_text()
                until(lambda: not self.workers(), lambda: f"they stay: {self.workers()}", 30)
            finally:
                process.kill()
                for worker in self.workers():
                    with suppress(ProcessLookupError):
                        os.kill(worker, signal.SIGKILL)

    def workers(self) -> dict[int, str]:
        """Return what runs of Dask in the hosts' Python, the person's own program aside."""
        return {
            pid: line
            for pid, line in command_lines().items()
            if f"{self.python} -" in line and " -c from dask" not in line
        }


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return farm_hosts.prepare(tmp_path_factory.mktemp("hosts") / "farm")


@pytest.fixture
def site(checkout: Path, tmp_path: Path) -> Site:
    home = tmp_path / "home"
    home.mkdir()
    return Site(checkout, home)


def program(word: str, **instead: str) -> str:
    """Return the documented program that has a word in it, with some of its words changed."""
    (found,) = [text for kind, text in documented.fences("docs/scaling.md")
                if kind == "python" and word in text]  # fmt: skip
    for old, new in instead.items():
        assert old in found
        found = found.replace(old, new)
    return found


def started(held: Held, request: BuildRequest, address: str) -> Run:
    """Begin two sets, and wait until two hosts have one each."""
    run = Run(held.tree, SETS, replace(request, scheduler=address))
    run.start()
    until(lambda: held.begun == 2 or not run.is_alive(), lambda: f"they do not begin: {run.told}")
    assert held.begun == 2, (run.told, run.error)
    return run


def finished(held: Held, run: Run) -> str:
    held.let_go()
    return run.succeed(*SETS)


def test_hosts_that_are_reached_over_ssh(
    site: Site, held: Held, request_: BuildRequest, tmp_path: Path
) -> None:
    hosts = {"builder-1": "127.0.0.1", "builder-2": "127.0.0.2"}
    changed = {"/farm/.venv/bin/python": str(site.python)}
    with (
        ssh_server.serving(tmp_path / "ssh", site.home, hosts),
        site.cluster(program("SSHCluster", **changed)) as address,
    ):
        told = finished(held, started(held, request_, address))
        assert len(set(re.findall(r"cpu-\w+: to (\S+)", told))) == 2, told
        private = site.python.parents[2] / ".farm" / "dask" / "dask-scratch-space"
        kinds = {one.name.partition("-")[0] for one in private.glob("*-*[!k]")}
        assert {"scheduler", "worker"} <= kinds, kinds
        assert len(site.workers()) >= 3


def test_a_job_of_slurm_that_is_cancelled_is_replaced_and_its_set_built_again(
    site: Site, held: Held, request_: BuildRequest
) -> None:
    changed = {"cores=16": "cores=1", "32GB": "1GB", "jobs=4": "jobs=2"}
    with slurm_rig.running("node-1", "node-2") as slurm:
        environ = slurm.environ | {"DASK_DISTRIBUTED__DEPLOY__LOST_WORKER_TIMEOUT": "2s"}
        with site.cluster(program("SLURMCluster", **changed), **environ) as address:
            run = started(held, request_, address)
            jobs = slurm.jobs()
            assert sorted(jobs.values()) == ["node-1", "node-2"]
            slurm.ask("scancel", min(jobs, key=int))
            until(lambda: held.begun == 3, lambda: f"no other job builds it: {run.told}", 90)
            assert "was lost; it is built elsewhere" in finished(held, run)
            for name in SETS:  # a job of one CPU, whatever its node has
                assert " -j 1 " in (pipeline.STATE / "logs" / f"cpu-{name}.log").read_text()
        until(lambda: slurm.jobs() == {}, "jobs stay", 30)
