"""OpenSSH's server as a process of a test's own, and a home whose ``.ssh`` leads to it."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import server_process
from needs import must_or_skip

from llama_loader.server import free_port

_SERVER = """\
Port {port}
{listen}
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
SetEnv XDG_CACHE_HOME={folder}/cache CCACHE_DIR={folder}/ccache
"""
_CLIENT = """\
Host {name}
    HostName {address}
    Port {port}
    User {user}
    IdentityFile {folder}/user
    UserKnownHostsFile {home}/.ssh/known_hosts
"""


@contextmanager
def serving(folder: Path, home: Path, hosts: dict[str, str]) -> Iterator[None]:
    """Let ``home``'s SSH reach hosts by name: each at a loopback address, all by one server."""
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        must_or_skip("no sshd (openssh-server)")
    folder.mkdir()
    for name in ("host", "user"):
        argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(argv, check=True)
    if os.geteuid() == 0:  # where it shuts itself in; systemd would make it
        Path("/run/sshd").mkdir(exist_ok=True)
    port = free_port()
    listen = "\n".join(f"ListenAddress {address}" for address in hosts.values())
    (folder / "config").write_text(_SERVER.format(port=port, listen=listen, folder=folder))
    _lead(folder, home, hosts, port)
    argv = [program, "-D", "-e", "-f", str(folder / "config")]
    with server_process.running(argv, ("127.0.0.1", port), folder / "log"):
        yield


def _lead(folder: Path, home: Path, hosts: dict[str, str], port: int) -> None:
    ssh = home / ".ssh"
    ssh.mkdir(mode=0o700, parents=True)
    user = subprocess.run(["id", "-un"], check=True, capture_output=True, text=True).stdout.strip()
    facts = {"port": port, "folder": folder, "home": home, "user": user}
    leads = [_CLIENT.format(name=name, address=to, **facts) for name, to in hosts.items()]
    (ssh / "config").write_text("".join(leads))
    key = " ".join((folder / "host.pub").read_text().split()[:2])
    known = [f"[{where}]:{port} {key}\n" for pair in hosts.items() for where in pair]
    (ssh / "known_hosts").write_text("".join(known))
