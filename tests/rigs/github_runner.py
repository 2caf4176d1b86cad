"""A GitHub runner in small: Ubuntu 24.04 of its own archive, a new container for each job.

It has what a runner's image has of the distribution that a step could need, and nothing of
Debian's. The Docker engine is this host's, at a runner's own socket; so is the network, so that
servers of a test on loopback answer. Steps run as a user who may use sudo.
"""

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
from docker import DockerClient
from docker.models.containers import Container

from farm.errors import EngineError
from tests.rigs import pythons

KEY: Final = Path(__file__).with_name("ubuntu_archive_2018.asc")
"""The key that signs Ubuntu's archive: F6ECB3762474EDA9D21B7022871920D1991BC93C."""
ROOT: Final = (
    *("--architectures=amd64", "--components=main,universe"),
    "--include=apt,ca-certificates,curl,g++,git,jq,python3-venv,sudo,ubuntu-keyring",
    "noble",
)
IMAGE: Final = "llama-farm-runner:noble"
TOOLS: Final = "/opt/hostedtoolcache/Python/3.12/x64"
"""Where setup-python puts its Python; the jobs of one test run share it, installed packages too."""
_CERTIFICATES: Final = "/etc/ssl/certs/ca-certificates.crt"
_TRUST: Final = dict.fromkeys(("SSL_CERT_FILE", "PIP_CERT"), _CERTIFICATES)
_SOCKET: Final = "/var/run/docker.sock"
_USER: Final = "runner"
_SET_UP: Final = f"""
useradd --create-home --home-dir "$1" --uid "$2" {_USER}
groupadd --gid "$(stat --format %g {_SOCKET})" --non-unique engine
usermod --append --groups engine {_USER}
echo '{_USER} ALL=(ALL) NOPASSWD:ALL' > /etc/sudoers.d/{_USER}
echo 'Defaults env_keep += "{" ".join(_TRUST)}"' >> /etc/sudoers.d/{_USER}
test -x {TOOLS}/bin/python || python3 -m venv {TOOLS}
chown --recursive {_USER} "$1" "$3" {TOOLS}
"""


def image(client: DockerClient) -> str:
    """Return the runner's image, made unless it is here."""
    try:
        return pythons.image_of(client, IMAGE, ROOT, f"--keyring={KEY}")
    except EngineError as error:  # its archive is out of reach: no defect of ours, in CI either
        pytest.skip(f"no Ubuntu 24.04 can be made: {error.message}")


class Machine:
    """A runner of one job; its steps run in ``workspace``, the same folder here and inside."""

    def __init__(self, container: Container, home: Path, workspace: Path) -> None:
        self._container = container
        self.home = home
        self.workspace = workspace

    def run(self, command: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """Run a step's command in the shell that GitHub names ``bash``."""
        api = self._container.client.api
        shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", command]
        started = api.exec_create(
            self._container.id,
            shell,
            user=_USER,
            workdir=str(self.workspace),
            environment={**_TRUST, **environment},
        )["Id"]
        out, err = api.exec_start(started, demux=True)
        status = api.exec_inspect(started)["ExitCode"]
        return subprocess.CompletedProcess(
            shell, status, (out or b"").decode("utf-8", "replace"), (err or b"").decode()
        )

    def own(self) -> None:
        """Give the runner's user what an action has put into the workspace."""
        self._container.exec_run(["chown", "--recursive", _USER, str(self.workspace)])


@contextmanager
def machine(client: DockerClient, folder: Path, tools: Path) -> Iterator[Machine]:
    """Start a runner in a job's own folder; its steps see the folder above, at its own place."""
    home, workspace = folder / "home", folder / "work"
    for path in (home, workspace, tools):
        path.mkdir(parents=True, exist_ok=True)
    socket = os.environ.get("DOCKER_HOST", f"unix://{_SOCKET}").removeprefix("unix://")
    shared = str(folder.parent)
    folder.parent.chmod(0o755)
    volumes = {
        shared: {"bind": shared, "mode": "rw"},
        str(tools): {"bind": TOOLS, "mode": "rw"},
        socket: {"bind": _SOCKET, "mode": "rw"},
        # what this host trusts: its proxy, where it has one
        os.path.realpath(_CERTIFICATES): {"bind": _CERTIFICATES, "mode": "ro"},
    }
    container = client.containers.create(
        image(client), ["sleep", "infinity"], volumes=volumes, network_mode="host", init=True
    )
    try:
        container.start()
        words = [str(home), str(os.getuid() or 1001), shared]
        done = container.exec_run(["bash", "-euc", _SET_UP, "set-up", *words])
        assert done.exit_code == 0, done.output
        yield Machine(container, home, workspace)
    finally:
        # what the engine's containers and sudo made belongs to root
        container.exec_run(["chown", "--recursive", str(os.getuid()), shared])
        container.remove(force=True)
