"""A Dask cluster of processes on this machine, and networks of its hosts that can be cut."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from verbs import PROJECT
from waiting import until

from llama_loader.server import free_port


@dataclass
class Net:
    """A host's own network: a namespace with one end of a cable, the other end is here."""

    ours: str = field(init=False)
    ip: str = field(init=False)
    name: str = field(init=False)
    cable: str = field(init=False)

    def __post_init__(self) -> None:
        # a link-local /30 of this process: nothing else on the machine is in it
        block = os.getpid() * 4 % 65024
        base = f"169.254.{block // 256}"
        self.ours, self.ip = f"{base}.{block % 256 + 1}", f"{base}.{block % 256 + 2}"
        self.name = self.cable = f"farm{os.getpid()}"

    def up(self) -> None:
        ip("netns", "add", self.name)
        far = ("peer", "name", "host", "netns", self.name)
        ip("link", "add", self.cable, "type", "veth", *far)
        ip("addr", "add", f"{self.ours}/30", "dev", self.cable)
        ip("link", "set", self.cable, "up")
        for argv in (
            ("link", "set", "lo", "up"),
            ("addr", "add", f"{self.ip}/30", "dev", "host"),
            ("link", "set", "host", "up"),
        ):
            ip("-n", self.name, *argv)

    def cut(self) -> None:
        """Pull the cable: no side gets an answer or a notice."""
        ip("link", "set", self.cable, "down")

    def down(self) -> None:
        ip("link", "del", self.cable, check=False)
        ip("netns", "del", self.name, check=False)


def ip(*argv: str, check: bool = True) -> None:
    subprocess.run(["ip", *argv], check=check, capture_output=True, text=True)


@dataclass
class Hosts:
    """A scheduler and workers, each in a process group and with a cache of its own."""

    folder: Path
    ip: str = "127.0.0.1"
    checkout: Path = PROJECT
    port: int = field(default_factory=free_port)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"tcp://{self.ip}:{self.port}"

    def scheduler(self) -> subprocess.Popen[bytes]:
        options = ("--host", self.ip, "--port", str(self.port), "--no-dashboard")
        started = self._start("scheduler", "dask_scheduler", *options)
        until(self._answers, "the scheduler does not listen")
        return started

    def worker(
        self, name: str, address: str | None = None, *, net: Net | None = None, **environ: str
    ) -> subprocess.Popen[bytes]:
        options = ("--nthreads", "1", "--no-nanny", "--resources", "FARM_BUILD=1", "--name", name)
        local = (
            "--host",
            net.ip if net else self.ip,
            "--no-dashboard",
            "--local-directory",
            f"{self.folder}/{name}",
        )
        before = ("ip", "netns", "exec", net.name) if net else ()
        where = address or self.address
        return self._start(name, "dask_worker", where, *options, *local, before=before, **environ)

    def _start(
        self,
        name: str,
        program: str,
        *options: str,
        before: tuple[str, ...] = (),
        **environ: str,
    ) -> subprocess.Popen[bytes]:
        home = self.folder / name
        home.mkdir(exist_ok=True)
        environment = (
            os.environ
            | {
                "PYTHONPATH": f"{self.checkout}:{self.checkout / 'spaces'}",
                "XDG_CACHE_HOME": str(home / "cache"),
                "CCACHE_DIR": str(self.folder / "ccache"),
            }
            | environ
        )
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*before, sys.executable, "-m", f"distributed.cli.{program}", *options],
                cwd=self.checkout,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection((self.ip, self.port), 1):
            return True
        return False

    def end(self) -> None:
        for process in self.started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
