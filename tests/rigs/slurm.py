"""Slurm, all of it, on this machine: munged, a controller, and a ``slurmd`` for each node."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import server_process
from needs import must_or_skip
from waiting import until

from llama_loader.server import free_port

_CONFIG = """\
ClusterName=farm
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
"""
_NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {has}\n"
_SECONDS = 60


@dataclass(frozen=True)
class Slurm:
    """A cluster; ``environ`` is what its commands need besides."""

    environ: dict[str, str]

    def ask(self, *argv: str) -> str:
        """Run a command of Slurm's; returns what it prints."""
        environment = os.environ | self.environ
        done = subprocess.run(argv, env=environment, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def nodes(self) -> list[str]:
        """Return the state of each node."""
        return self.ask("sinfo", "--noheader", "--Node", "--format=%t").split()

    def jobs(self) -> dict[str, str]:
        """Return the running jobs, each with its node."""
        told = self.ask("squeue", "--noheader", "--states=running", "--format=%A %N")
        return dict(line.split() for line in told.splitlines())


@contextmanager
def running(*nodes: str) -> Iterator[Slurm]:
    """Bring a cluster up, and wait until its nodes are idle."""
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons are started by root")
    path = f"{os.environ['PATH']}:/usr/sbin"
    programs = [shutil.which(name, path=path) for name in ("munged", "slurmctld", "slurmd")]
    if None in programs:
        must_or_skip("no Slurm (slurm-wlm, munge)")
    munged, controller, node = map(str, programs)
    ports = {name: free_port() for name in ("", *nodes)}
    with ExitStack() as ends:
        # a step's socket lies deep in the folder, and its path has at most 107 characters
        folder = Path(ends.enter_context(TemporaryDirectory(prefix="slurm-", dir="/tmp")))
        _configure(folder, ports)
        environ = {"SLURM_CONF": f"{folder}/slurm.conf"}
        ends.enter_context(_munged(munged, folder))
        daemons = {"": [controller, "-D"]} | {name: [node, "-D", "-N", name] for name in nodes}
        for name, argv in daemons.items():
            log, where = folder / f"log-{name or 'controller'}", ("127.0.0.1", ports[name])
            env = os.environ | environ
            ends.enter_context(server_process.running(argv, where, log, env))
        slurm = Slurm(environ)
        until(lambda: slurm.nodes() == ["idle"] * len(nodes), lambda: f"{slurm.nodes()}", _SECONDS)
        yield slurm


def _configure(folder: Path, ports: dict[str, int]) -> None:
    host = socket.gethostname().partition(".")[0]
    folder.chmod(0o755)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    has = "CPUs=1 RealMemory=2000 State=UNKNOWN"  # whatever this machine has
    nodes = [(name, port) for name, port in ports.items() if name]
    lines = [_NODE.format(name=name, host=host, port=port, has=has) for name, port in nodes]
    partition = f"PartitionName=build Nodes={','.join(filter(None, ports))} Default=YES State=UP\n"
    config = _CONFIG.format(host=host, port=ports[""], folder=folder)
    (folder / "slurm.conf").write_text("".join((config, *lines, partition)))


@contextmanager
def _munged(program: str, folder: Path) -> Iterator[None]:
    """Run the daemon that Slurm's parts know each other by, until the block ends."""
    files = {"key-file": "key", "pid-file": "pid", "seed-file": "seed", "socket": "socket",
             "log-file": "log"}  # fmt: skip
    options = [f"--{option}={folder}/munge.{end}" for option, end in files.items()]
    # --force: the test's folder may be written by more than its owner
    with subprocess.Popen(
        [program, "--foreground", "--force", *options], stderr=subprocess.DEVNULL
    ) as process:
        try:
            listens = (folder / "munge.socket").exists
            until(lambda: listens() or process.poll() is not None, "no munged", _SECONDS)
            assert process.poll() is None, "munged has ended"
            yield
        finally:
            process.terminate()
